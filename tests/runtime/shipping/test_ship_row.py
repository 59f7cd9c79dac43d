"""One row: its steps, its errors and the worst of them, with stand-ins for the steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import EnvironmentMissingError, MismatchError, UnsupportedError
from rmsnorm_deploy.runtime.recipe.recipe_file import parse_recipe
from rmsnorm_deploy.runtime.recipe.rows import rows_of
from rmsnorm_deploy.runtime.recipe.steps import KINDS
from rmsnorm_deploy.runtime.shipping import row_record
from rmsnorm_deploy.runtime.shipping import ship_row as module
from rmsnorm_deploy.runtime.shipping.ship_row import ship_row, worst
from rmsnorm_deploy.runtime.shipping.summary import junit


@pytest.fixture
def row(tmp_path: Path) -> dict[str, Any]:
    text = '[[model]]\nname = "a"\nsource = "owner/name"\nwith_past = true\npackage = ["genai", "triton"]\n'
    return rows_of(parse_recipe(text, tmp_path / "rmsnorm.toml"))[0]


def _steps(monkeypatch: pytest.MonkeyPatch, **errors: BaseException) -> list[str]:
    """Stand-ins for the steps, of which some raise an error; the names of those that ran."""
    ran: list[str] = []

    def of(kind: str) -> Any:
        def work(row: Any, step: Any, progress: Any) -> dict[str, Any]:
            name = step["step"].removeprefix("package:")
            ran.append(name)
            if name in errors:
                raise errors[name]
            return {"bytes": 3, "notes": ["a note"]}

        return work

    monkeypatch.setattr(module, "STEPS", {kind: of(kind) for kind in KINDS})
    return ran


def test_the_steps_of_a_row(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _steps(monkeypatch)
    result = ship_row(row)
    assert ran == ["export", "validate", "genai", "triton"]
    assert (result["status"], result["reason"], result["exit_code"], result["bytes"]) == ("done", "new", 0, 12)
    assert result["notes"] == ["a note"]
    record = json.loads((Path(row["folder"]) / "row.json").read_text())
    assert next(iter(record)) == "schema"
    assert (record["schema"], list(record["steps"])) == (
        "rmsnorm_deploy.row/2", ["export", "validate", "package:genai", "package:triton"],
    )  # fmt: skip
    assert [done["facts"] for done in record["steps"].values()] == [step["facts"] for step in row["steps"]]


@pytest.mark.parametrize(
    ("errors", "ran", "code"),
    [
        ({"export": UnsupportedError("x")}, ["export"], 3),
        ({"export": SystemExit(3)}, ["export"], 2),
        ({"export": KeyError("x")}, ["export"], 70),
        ({"export": ModuleNotFoundError("no", name="transformers")}, ["export"], 4),
        ({"validate": MismatchError("x")}, ["export", "validate"], 1),
        ({"genai": UnsupportedError("x")}, ["export", "validate", "genai", "triton"], 3),
        (
            {"genai": UnsupportedError("x"), "triton": EnvironmentMissingError("y")},
            ["export", "validate", "genai", "triton"],
            4,
        ),
    ],
)
def test_an_error_ends_the_row_but_not_the_other_packages(
    errors: dict[str, BaseException], ran: list[str], code: int, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _steps(monkeypatch, **errors) == []
    seen = _steps(monkeypatch, **errors)
    result = ship_row(row)
    assert seen == ran
    assert (result["status"], result["exit_code"]) == ("failed", code)
    statuses = {step["step"].removeprefix("package:"): step["status"] for step in result["steps"]}
    assert {name for name, status in statuses.items() if status == "failed"} == set(errors)
    assert {name for name, status in statuses.items() if status == "not run"} == set(statuses) - set(ran)
    text = junit({"schema": "rmsnorm_deploy.ship/1", "verdict": "fail", "rows": [result]})
    assert text.count("<failure") == sum(isinstance(error, MismatchError) for error in errors.values())
    assert text.count("<failure") + text.count("<error") == len(errors)
    assert text.count("<skipped") == 4 - len(ran)


def test_a_record_that_is_not_one_is_replaced_only_if_it_is_ours(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _steps(monkeypatch)
    file = Path(row["folder"]) / "row.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"schema": "rmsnorm_deploy.row/2", "steps": 3}')
    assert ship_row(row)["status"] == "done"
    file.write_text("{}")
    result = ship_row(row)
    assert (result["exit_code"], file.read_text()) == (2, "{}")
    assert "rmsnorm did not write it" in result["steps"][0]["error"]["message"]


def test_the_worst_exit_code() -> None:
    assert [worst([]), worst([0, 3]), worst([3, 4]), worst([4, 2]), worst([2, 1]), worst([1, 70])] == [
        0,
        3,
        4,
        2,
        1,
        70,
    ]


def test_another_process_that_writes_there_ends_the_row(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = _steps(monkeypatch)
    folder = Path(row["folder"])
    folder.mkdir(parents=True)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from rmsnorm_deploy.export.onnx_io.partial_files import claimed\n"
        "with claimed(Path(sys.argv[1])): print('claimed', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        refused = ship_row(row)
        process.communicate("\n", timeout=30)
    assert (refused["status"], refused["exit_code"], ran) == ("failed", 2, [])
    assert "another process is writing there" in refused["steps"][0]["error"]["message"]
    assert ship_row(row)["status"] == "done"


def test_only_what_reads_a_failed_step_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        '[[model]]\nname = "a"\nsource = "owner/name"\nbuild = ["rtx", "tensorrt"]\npackage = ["triton", "trtexec"]\n'
    )
    row = rows_of(parse_recipe(text + 'backend = "tensorrt"\n', tmp_path / "rmsnorm.toml"))[0]
    ran = _steps(monkeypatch, **{"build:tensorrt": EnvironmentMissingError("x")})
    result = ship_row(row)
    assert ran == ["export", "validate", "build:rtx", "validate:rtx", "build:tensorrt", "trtexec"]
    statuses = {step["step"]: step["status"] for step in result["steps"] if step["status"] != "done"}
    assert statuses == {"build:tensorrt": "failed", "validate:tensorrt": "not run", "package:triton": "not run"}
    assert result["exit_code"] == 4


def test_the_row_that_follows_does_what_is_left(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(row_record, "_problem", lambda *_: "")
    _steps(monkeypatch, genai=UnsupportedError("x"))
    ship_row(row)
    ran = _steps(monkeypatch)
    assert (ship_row(row)["reason"], ran) == ("continued", ["genai"])
    # A fact of the validation is one of what reads its report, and not of the export.
    for step in row["steps"]:
        if "lossy" in step["facts"]:
            step["facts"]["lossy"] = "other"
    ran = _steps(monkeypatch)
    assert (ship_row(row)["reason"], ran) == ("changed: lossy", ["validate", "genai", "triton"])
    # A step of a row that is no longer asked for stays as it is.
    row["steps"].pop()
    ran = _steps(monkeypatch)
    assert (ship_row(row)["status"], ran) == ("unchanged", [])


@pytest.mark.parametrize(
    ("step", "message", "expected"),
    [
        (
            "export",
            "Omit --with-past, or --profile.",
            " In a recipe, --with-past is with_past and --profile is profiles.",
        ),
        ("validate", "--inputs: expected arrays.", " In a recipe, --inputs is test_inputs."),
        ("export", "--inputs: expected arrays.", " In a recipe, --inputs is inputs."),
        ("export", "Try: rmsnorm build x --memory-limit 3", ""),
        ("export", "Use --made-up.", ""),
    ],
)
def test_options_of_the_command_line_have_the_names_of_fields(
    step: str, message: str, expected: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _steps(monkeypatch, **{step: UnsupportedError(message)})
    found = [done["error"]["message"] for done in ship_row(row)["steps"] if done["error"]]
    assert found == [message + expected]


def test_notes_say_what_options_are_called_in_a_recipe(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _steps(monkeypatch)
    note = "onnx.load needs --weights pack"
    monkeypatch.setitem(module.STEPS, "export", lambda *_: {"bytes": 1, "notes": [note, "a note"]})
    assert ship_row(row)["notes"] == [f"{note}. In a recipe, --weights is weights.", "a note"]
