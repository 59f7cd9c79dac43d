"""`rmsnorm ship` and `rmsnorm init`: rows that are new, unchanged, interrupted, changed, damaged and wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy import verify_folder
from rmsnorm_deploy.runtime.shipping import steps
from tests.helpers.interface.command_line import CommandLine
from tests.helpers.interface.shipped_sample import sample_row, ship_sample
from tests.helpers.models.factory_file import SMALL_MODEL
from tests.helpers.models.families import build

_MODELS = (
    SMALL_MODEL
    + """

def broken():
    raise RuntimeError("no <luck> & no \\x1b model")


def quitting():
    raise SystemExit(3)
"""
)
_RECIPE = """
[defaults]
targets = ["ort"]
validate = false

[[model]]
name = "first"
source = "models.py:net"

[[model]]
name = "second"
source = "models.py:net"
package = ["triton"]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text(_MODELS)
    path = tmp_path / "rmsnorm.toml"
    path.write_text(_RECIPE)
    return path


def _words(summary: dict[str, Any]) -> dict[str, list[str]]:
    return {row["row"]: [step["status"] for step in row["steps"]] for row in summary["rows"]}


def _row(output: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / name / "row.json").read_text())
    return content


def test_what_has_not_changed_is_not_done_again(rmsnorm: CommandLine, recipe: Path) -> None:
    output = recipe.parent / "dist"
    outcome = rmsnorm("ship", recipe, "--dry-run")
    assert (outcome.code, output.exists()) == (0, False)
    assert outcome.out == "first: export (new)\nsecond: export, package:triton (new)\n"
    first = rmsnorm("ship", recipe, "--json")
    assert first.code == 0
    assert _words(first.json) == {"first": ["done"], "second": ["done", "done"]}
    assert json.loads((output / "summary.json").read_text()) == first.json
    assert (output / "second" / "triton" / "second" / "config.pbtxt").is_file()

    written = (output / "first" / "model" / "model.onnx").stat().st_mtime_ns
    again = rmsnorm("ship", recipe)
    assert again.code == 0
    assert [line.split()[:4] for line in again.out.splitlines()[1:3]] == [
        ["first", "unchanged", "-", "-"], ["second", "unchanged", "-", "unchanged"],
    ]  # fmt: skip
    assert again.out.splitlines()[-1] == f"verdict: pass (2 unchanged); {output}"
    assert (output / "first" / "model" / "model.onnx").stat().st_mtime_ns == written

    # A step that is not done goes on there; an option, the source's code and a damaged file do the row again.
    record = _row(output, "second")
    del record["steps"]["package:triton"]
    (output / "second" / "row.json").write_text(json.dumps(record))
    assert rmsnorm("ship", recipe, "--dry-run").out == "first: unchanged\nsecond: package:triton (continued)\n"
    assert _words(rmsnorm("ship", recipe, "--json").json) == {"first": ["unchanged"], "second": ["unchanged", "done"]}

    recipe.write_text(_RECIPE.replace('package = ["triton"]', 'package = ["triton"]\nquantize = "int8"'))
    outcome = rmsnorm("ship", recipe, "--dry-run")
    assert outcome.out == "first: unchanged\nsecond: export, package:triton (changed: quantize)\n"
    recipe.write_text(_RECIPE)

    model = output / "first" / "model" / "model.onnx"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    outcome = rmsnorm("ship", recipe, "--only", "first", "--json")
    assert _words(outcome.json) == {"first": ["done"]}
    assert "model was changed since it was written; it was kept as model.changed-1" in outcome.err + outcome.out
    assert (model.parent.with_name("model.changed-1") / "model.onnx").read_bytes() == content
    assert [file.problem for file in verify_folder(model.parent) if file.problem] == []

    with (recipe.parent / "models.py").open("a") as file:
        file.write("# another\n")
    outcome = rmsnorm("ship", recipe, "--dry-run", "--json")
    assert [row["reason"] for row in outcome.json["rows"]] == ["changed: source", "changed: source"]
    assert [row["steps"] for row in outcome.json["rows"]] == [["export"], ["export", "package:triton"]]


def test_a_row_that_fails_does_not_stop_the_others(rmsnorm: CommandLine, recipe: Path) -> None:
    broken = '[[model]]\nname = "broken"\nsource = "models.py:broken"\nvalidate = true\npackage = ["triton"]\n'
    quitting = '[[model]]\nname = "quitting"\nsource = "models.py:quitting"\n'
    recipe.write_text(broken + quitting + _RECIPE.replace('package = ["triton"]', 'dtypes = ["fp32", "fp16"]'))
    outcome = rmsnorm("ship", recipe, "--only", "broken", "--only", "quitting", "--only", "second-float16")
    assert outcome.code == 2
    assert "broken: export: " in outcome.out
    assert outcome.out.splitlines()[-1].startswith("verdict: fail (1 done, 2 failed); ")
    summary = json.loads((recipe.parent / "dist" / "summary.json").read_text())
    assert _words(summary) == {
        "broken": ["failed", "not run", "not run"], "quitting": ["failed"], "second-float16": ["done"],
    }  # fmt: skip
    from xml.etree import ElementTree as ET

    root = ET.parse(recipe.parent / "dist" / "junit.xml").getroot()
    suites = {suite.get("name"): suite for suite in root}
    assert [case.get("name") for case in suites["rmsnorm ship export"].iter("testcase")] == [
        "broken",
        "quitting",
        "second-float16",
    ]
    (error,) = suites["rmsnorm ship export"].findall("testcase[@name='broken']/error")
    assert "no <luck> & no \ufffd model" in (error.get("message") or "")
    assert suites["rmsnorm ship package"].get("skipped") == "1"
    # What failed is tried again.
    assert "broken: export, validate, package:triton (continued)" in rmsnorm("ship", recipe, "--dry-run").out


def test_an_interrupted_run_keeps_what_is_done(
    rmsnorm: CommandLine, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def interrupted(*_: Any) -> Any:
        seen.append(_words(json.loads((recipe.parent / "dist" / "summary.json").read_text())))
        raise KeyboardInterrupt

    monkeypatch.setitem(steps.STEPS, "package", interrupted)
    outcome = rmsnorm("ship", recipe)
    assert outcome.code == 130
    # Rows that end are in the summary at once, for those who watch, and if the run is killed.
    assert seen == [{"first": ["done"], "second": ["not run", "not run"]}]
    summary = json.loads((recipe.parent / "dist" / "summary.json").read_text())
    assert (summary["verdict"], _words(summary)) == ("fail", {"first": ["done"], "second": ["done", "not run"]})
    monkeypatch.undo()
    assert _words(rmsnorm("ship", recipe, "--json").json) == {"first": ["unchanged"], "second": ["unchanged", "done"]}
    assert list(recipe.parent.rglob(".*")) == []


def test_a_validated_row_brings_its_report(rmsnorm: CommandLine, recipe: Path) -> None:
    recipe.write_text(_RECIPE.replace("validate = false", "validate = true"))
    outcome = rmsnorm("ship", recipe, "--only", "second", "--json")
    assert _words(outcome.json) == {"second": ["done", "done", "done"]}
    place = recipe.parent / "dist" / "second"
    assert json.loads((place / "triton" / "report.json").read_text())["verdict"] == "pass"
    assert (place / "report.html").is_file()
    (place / "report.json").unlink()
    outcome = rmsnorm("ship", recipe, "--only", "second", "--dry-run")
    assert outcome.out == "second: validate, package:triton (report.json is missing)\n"


def test_what_we_did_not_write_stays(rmsnorm: CommandLine, recipe: Path) -> None:
    output = recipe.parent / "dist"
    (output / "first" / "model").mkdir(parents=True)
    (output / "first" / "model" / "mine.txt").write_text("mine")
    (output / "second").mkdir()
    (output / "second" / "row.json").write_text("mine")
    outcome = rmsnorm("ship", recipe, "--force")
    assert outcome.code == 2
    assert "first: export: " in outcome.out
    assert "holds files that no export wrote" in outcome.out
    assert "row.json exists and rmsnorm did not write it" in outcome.out
    assert (
        (output / "first" / "model" / "mine.txt").read_text() == (output / "second" / "row.json").read_text() == "mine"
    )
    (output / "summary.json").unlink()
    (output / "summary.json").write_text("mine")
    outcome = rmsnorm("ship", recipe)
    assert (outcome.code, (output / "summary.json").read_text()) == (2, "mine")
    assert "summary.json exists and rmsnorm did not write it" in outcome.err


def test_wrong_recipes_and_names(rmsnorm: CommandLine, recipe: Path) -> None:
    outcome = rmsnorm("ship", recipe, "--only", "frist")
    assert outcome.code == 2
    assert "only: expected one of first, second, got 'frist'. Did you mean 'first'?" in outcome.err
    recipe.write_text(_RECIPE + "opst = 23\n")
    outcome = rmsnorm("ship", recipe)
    assert (outcome.code, (recipe.parent / "dist").exists()) == (2, False)
    assert f"error: {recipe}:14:1: opst: unknown key; " in outcome.err


def test_a_first_recipe_of_a_checkpoint_ships(
    rmsnorm: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build("llama", num_hidden_layers=1).save_pretrained(tmp_path / "tiny llama")
    path = tmp_path / "recipes" / "rmsnorm.toml"
    path.parent.mkdir()
    assert rmsnorm("init", "tiny llama", "-o", path).code == 0
    text = path.read_text()
    for line in ('name = "tiny-llama"', 'source = "../tiny llama"', 'package = ["genai"]  #', "with_past = true  #"):
        assert f"\n{line}" in text
    outcome = rmsnorm("init", "builtin:small", "-o", path)
    assert (outcome.code, path.read_text()) == (2, text)
    path.write_text(text.replace("# validate = true", "validate = false  #"))
    outcome = rmsnorm("ship", path, "--json")
    assert _words(outcome.json) == {"tiny-llama": ["done", "done"]}
    config = json.loads((path.parent / "dist" / "tiny-llama" / "genai" / "genai_config.json").read_text())
    assert config["model"]["type"] == "decoder"


@pytest.mark.parametrize("model", ["builtin:small", "owner/model-1B", "package.module:factory", "models.py:net"])
def test_a_first_recipe_of_other_sources(
    rmsnorm: CommandLine, recipe: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    outcome = rmsnorm("init", model, "-o", "new.toml")
    assert outcome.code == 0
    (row,) = rmsnorm("ship", "new.toml", "--dry-run", "--json").json["rows"]
    assert row["steps"] == ["export", "validate"]


def test_a_first_recipe_needs_a_model(rmsnorm: CommandLine, tmp_path: Path) -> None:
    outcome = rmsnorm("init", "./nosuch", "-o", tmp_path / "new.toml")
    assert (outcome.code, list(tmp_path.iterdir())) == (2, [])
    assert "MODEL: expected an existing folder, .onnx file or file.py:factory, or a hub name" in outcome.err


def _history(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def test_a_page_and_a_history_of_two_runs(rmsnorm: CommandLine, recipe: Path) -> None:
    pytest.importorskip("jinja2")
    output = recipe.parent / "dist"
    recipe.write_text(_RECIPE.replace("validate = false", "validate = true").replace('package = ["triton"]', ""))
    assert rmsnorm("ship", recipe, "--only", "second").code == 0
    page = (output / "summary.html").read_text()
    assert '<a href="second/report.html">' in page
    assert 'id="drift"' not in page
    assert rmsnorm("ship", recipe, "--only", "second").code == 0
    first, second = _history(output)
    assert first["schema"] == "rmsnorm_deploy.ship_history/1"
    (row,) = first["rows"]
    assert (row["row"], row["status"]) == ("second", "done")
    assert 0 < row["worst"] <= 1
    assert second["rows"] == [{**row, "status": "unchanged"}]
    # The report of the validation before is kept beside the new one.
    before = (output / "second" / "report.json").read_bytes()
    assert rmsnorm("ship", recipe, "--only", "second", "--force").code == 0
    assert (output / "second" / "report.before.json").read_bytes() == before
    assert len(_history(output)) == 3
    page = (output / "summary.html").read_text()
    assert "verdicts worse: 0, better: 0; rows missing: 0; figures changed more than 2 times: 0" in page
    assert "The last 3 of 3 runs" in page


def test_without_jinja2_there_is_no_page(rmsnorm: CommandLine, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsnorm_deploy.runtime.report import html

    html.environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    outcome = rmsnorm("ship", recipe, "--only", "first")
    assert outcome.code == 0
    assert "note: summary.html was not written: an HTML report requires jinja2" in outcome.err
    output = recipe.parent / "dist"
    assert not (output / "summary.html").exists()
    assert len(_history(output)) == 1


def test_results_are_served_until_a_signal(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    output = tmp_path / "dist"
    ship_sample(output, [sample_row(output, "first")], "2026-11-21T08:15:00+00:00")
    command = [sys.executable, "-m", "rmsnorm_deploy", "serve-report", str(output), "--port", "0", "--json"]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        answer = json.loads("".join(lines))
        assert answer["schema"] == "rmsnorm_deploy.serve_report/1"
        with urllib.request.urlopen(answer["url"], timeout=30) as response:
            assert b"Pass" in response.read()
        process.send_signal(number)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 0


def test_a_folder_without_results_is_not_served(rmsnorm: CommandLine, tmp_path: Path) -> None:
    outcome = rmsnorm("serve-report", tmp_path)
    assert outcome.code == 2
    assert f"error: {tmp_path}: expected a folder with summary.json, got none there." in outcome.err
