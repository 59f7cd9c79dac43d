"""License, changelog, workflows and hooks agree with pyproject.toml and constraints.txt."""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import rmsnorm_deploy
from tests.test_structure import LAYERS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Of LICENSE-2.0.txt as the Apache Software Foundation publishes it.
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _jobs(path: Path) -> list[dict[str, Any]]:
    return list(_yaml(path)["jobs"].values())


def test_the_license_is_complete_and_named() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert "`LICENSE`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_changelog_names_this_version_first() -> None:
    assert PROJECT["version"] == rmsnorm_deploy.__version__
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions[0] == PROJECT["version"]


def test_the_changelog_names_every_schema_after_the_first() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sources = [
        path for folder in ("export", "models", "plugins", "runtime", "src") for path in (ROOT / folder).rglob("*.py")
    ]
    written = {
        schema
        for path in sources
        for schema in re.findall(r'^\w*SCHEMA\b.* = "(rmsnorm_deploy\.\w+/\d+)"', path.read_text("utf-8"), re.MULTILINE)
    }
    assert len(written) >= 10
    later = {schema for schema in written if not schema.endswith("/1")}
    assert later
    assert later == set(re.findall(r"rmsnorm_deploy\.\w+/\d+", changelog))


def test_there_is_a_workflow_for_changes_and_one_for_the_night() -> None:
    assert [path.stem for path in WORKFLOWS] == ["nightly", "test"]
    # YAML 1.1 reads the key `on` as true.
    triggers = {path.stem: set(_yaml(path)[True]) for path in WORKFLOWS}
    assert {"push", "pull_request"} <= triggers["test"]
    assert "schedule" in triggers["nightly"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_on_every_python_that_is_supported(path: Path) -> None:
    supported = re.findall(r"Python :: (\d\.\d+)$", "\n".join(PROJECT["classifiers"]), flags=re.MULTILINE)
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    assert supported == [f"3.{minor}" for minor in range(int(low), int(high))]
    for job in _jobs(path):
        assert job["strategy"]["matrix"]["python"] == supported
        assert job["runs-on"].startswith("ubuntu")
        assert job["timeout-minutes"] == (350 if job["env"].get("RMSNORM_TESTS") == "all" else 40)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_rules_of_the_makefile(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [step["run"] for job in _jobs(path) for step in job["steps"] if "run" in step]
    rules = [re.match(r"make (\w+)", command) for command in commands if command.startswith("make")]
    assert rules
    assert all(rule is not None and f"\n{rule[1]}:" in makefile for rule in rules)
    settings = {name for command in commands for name in re.findall(r"\b([A-Z]+)=", command)}
    assert all(re.search(rf"^{name}\s*\?=", makefile, flags=re.MULTILINE) for name in settings)


def test_only_the_night_takes_the_newest_of_everything() -> None:
    commands = {path.stem: [s["run"] for job in _jobs(path) for s in job["steps"] if "run" in s] for path in WORKFLOWS}
    assert not any("CONSTRAINTS" in command for command in commands["test"])
    assert all("CONSTRAINTS=/dev/null" in command for command in commands["nightly"] if command.startswith("make"))


def test_the_hooks_run_the_pinned_ruff() -> None:
    (pinned,) = re.findall(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (repository,) = _yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["rev"] == f"v{pinned}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]


def test_contributing_names_only_what_exists() -> None:
    """Paths in backticks, files and folders in commands, make targets, modules and tests."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted = re.findall(r"`([^`\n]+)`", prose)
    paths = [word for word in quoted if " " not in word and ("/" in word or word.endswith(".py"))]
    commands = [*re.findall(r"^(?:\S*bin/)?pytest .+|^python -m .+", "\n".join(quoted), flags=re.MULTILINE)]
    commands += [line.partition("#")[0] for line in re.findall(r"^\S*pytest .+", text, flags=re.MULTILINE)]
    tests = [word for command in commands for word in command.split() if word.startswith("tests")]
    assert len(paths) >= 30
    assert len(tests) >= 8
    assert [path for path in (*paths, *tests) if not _exists(path)] == []
    rules = set(re.findall(r"\bmake (\w+)", "\n".join([*quoted, *re.findall(r"^make .+", text, flags=re.MULTILINE)])))
    assert {"install", "test"} <= rules
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [rule for rule in rules if f"\n{rule}:" not in makefile] == []
    modules = re.findall(r"python -m ([\w.]+)", text)
    assert [name for name in modules if not _exists(name.replace(".", "/"), f"{name.replace('.', '/')}.py")] == []
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = [word for word in quoted if re.fullmatch(r"test_\w+", word)]
    assert len(named) >= 5
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_contributing_draws_the_layers_of_the_test() -> None:
    drawing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The rooms")[1].split("```")[1]
    lines = [line.split() for line in drawing.splitlines() if line.strip(" |")]
    assert len(lines) == len(LAYERS)
    for words, rooms in zip(lines, reversed(LAYERS), strict=True):
        assert set(rooms) - {""} <= {word.rstrip(",") for word in words}


def _exists(*paths: str) -> bool:
    """Whether one of these files or folders is in the repository."""
    return any((ROOT / path).exists() for path in paths)
