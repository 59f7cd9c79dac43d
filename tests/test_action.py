"""The GitHub Action: its steps are run as GitHub runs them, with files for what they set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models.factory_file import small_model

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
_EXPRESSION = re.compile(r"\$\{\{ *([\w.]+) *\}\}")


def _run(name: str, known: dict[str, str], folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run the step of a name; returns what it printed, and the outputs that it set."""
    (step,) = [step for step in ACTION["runs"]["steps"] if step.get("name") == name]
    values = {key: _EXPRESSION.sub(lambda found: known[found[1]], text) for key, text in step["env"].items()}
    outputs, summary = folder / "outputs", folder / "summary"
    outputs.write_text("")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ, **values, "PATH": path, "GITHUB_OUTPUT": str(outputs), "GITHUB_STEP_SUMMARY": str(summary),
    }  # fmt: skip
    # As GitHub calls bash: https://docs.github.com/actions/reference/workflow-syntax-for-github-actions
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done, dict(line.split("=", 1) for line in outputs.read_text().splitlines())


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "deploy").mkdir()
    small_model(tmp_path / "deploy", "models")
    rows = "".join(f'[[model]]\nname = "{name}"\nsource = "models.py:{factory}"\nvalidate = false\n'
                   for name, factory in (("right", "net"), ("wrong", "gone")))  # fmt: skip
    (tmp_path / "deploy" / "rmsnorm.toml").write_text(f'output = "results"\n{rows}')
    return tmp_path


def test_the_steps_ship_the_recipe_and_fail_where_a_row_fails(repository: Path) -> None:
    known: dict[str, str] = {f"inputs.{name}": str(row["default"]) for name, row in ACTION["inputs"].items()}
    known["inputs.recipe"] = "deploy/rmsnorm.toml"
    found, outputs = _run("Find the folder of the results", known, repository)
    assert (found.returncode, outputs) == (0, {"output": "deploy/results"})
    known["steps.place.outputs.output"] = outputs["output"]
    failed, outputs = _run("Ship", known, repository)
    assert (failed.returncode, outputs) == (2, {"output": "deploy/results"})
    assert "verdict: fail (1 done, 1 failed)" in failed.stdout
    assert failed.stdout in (repository / "summary").read_text()
    assert (repository / "deploy" / "results" / "junit.xml").is_file()
    passed, _ = _run("Ship", {**known, "inputs.options": "--only right"}, repository)
    assert (passed.returncode, "verdict: pass (1 unchanged)" in passed.stdout) == (0, True)


def test_every_expression_names_something() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    steps: list[dict[str, Any]] = ACTION["runs"]["steps"]
    known = {f"inputs.{name}" for name in ACTION["inputs"]} | {"github.ref", "github.run_id"}
    known |= {f"steps.{step['id']}.outputs.output" for step in steps if "id" in step}
    assert set(_EXPRESSION.findall(text)) <= known
    assert all(set(step) <= {"name", "id", "uses", "with", "if", "shell", "env", "run"} for step in steps)
    assert all(step["shell"] == "bash" for step in steps if "run" in step)


def test_the_job_of_gitlab_in_the_readme_ships_the_recipe(tmp_path: Path) -> None:
    """Its last command is run, and the files that it keeps are those that were written."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "artifacts:" in block]
    (job,) = yaml.safe_load(text).values()
    assert job["script"][0].startswith('pip install "rmsnorm-deploy[')
    small_model(tmp_path, "models")
    row = '[[model]]\nname = "right"\nsource = "models.py:net"\nvalidate = false\n'
    (tmp_path / "rmsnorm.toml").write_text(row)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(job["script"][1], shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True)
    kept = [*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"], *job["cache"]["paths"]]
    assert [path for path in kept if not (tmp_path / path).exists()] == []
