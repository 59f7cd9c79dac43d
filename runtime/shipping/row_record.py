"""The state of a row: `row.json` with the steps that are done, and the steps that remain (`examine`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from ...export.onnx_io.owned_files import foreign_files, sha256
from ...export.onnx_io.verify import verify_folder
from ...models.errors import UsageError
from ...models.regular_files import read_json
from ..engines.api import ORT
from ..engines.engine_file import read_record as read_engine_record
from ..engines.engine_file import record_of
from ..recipe.steps import BUILD, VALIDATE
from ..report.text import write_text

SCHEMA: Final = "rmsnorm_deploy.row/2"
FILE: Final = "row.json"
MODEL: Final = "model"
ENGINE: Final = "model.engine"
Step = Mapping[str, Any]


class DoneStep(BaseModel):
    """A step that is done: how long it took, the hashes of the facts that it depends on, and what it gave."""

    model_config = ConfigDict(strict=True)

    seconds: float
    facts: dict[str, str]
    result: dict[str, Any]


class RowRecord(BaseModel):
    """The content of `row.json`."""

    model_config = ConfigDict(strict=True)

    schema_: str = SCHEMA
    row: str
    steps: dict[str, DoneStep] = {}

    def save(self, folder: Path) -> None:
        """Write it, completely or not at all.

        Raises:
            UsageError: the file cannot be written, or is another's.
        """
        content = {"schema": SCHEMA, **self.model_dump(exclude={"schema_"})}
        write_text(json.dumps(content, indent=2) + "\n", folder / FILE)


def read_record(folder: Path) -> RowRecord | None:
    """The record in a row's folder; None without one that can be read."""
    try:
        content = read_json(folder / FILE, "Ship again.")
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            return None
        return RowRecord.model_validate(content)
    except (UsageError, OSError, ValidationError):
        return None


def folder_name(step: Step) -> str:
    """The name of the folder that a step writes, in that of its row: `model`, or the runtime or server it is for."""
    return step["subject"] or MODEL


def report_name(runner: str, suffix: str = ".json") -> str:
    """The name of a report in a row's folder: `report.json` of the file, `report-rtx.json` of an engine."""
    return f"report{'' if runner == ORT else f'-{runner}'}{suffix}"


@dataclass(frozen=True, slots=True)
class RowState:
    """What remains to do for a row.

    Attributes:
        steps: the names of the steps to run, in order; empty if the row is finished.
        done: the steps that stay as they are.
        reason: why there is something to do; empty if there is not.
        changed: folders of earlier steps whose files were changed, which are moved away before a step writes there.
    """

    steps: list[str]
    done: dict[str, DoneStep] = field(default_factory=dict)
    reason: str = ""
    changed: list[Path] = field(default_factory=list)


def examine(row: Mapping[str, Any], *, force: bool = False) -> RowState:
    """Which steps of a row remain: nothing is written.

    Args:
        row: one of `rows_of`.
        force: all of them.

    Raises:
        OSError: a folder cannot be read.
    """
    folder = Path(row["folder"])
    names = [step["step"] for step in row["steps"]]
    record = read_record(folder)
    if record is None:
        return RowState(names, reason="new")
    written = [step for step in row["steps"] if step["step"] in record.steps]
    wrong = {step["step"]: text for step in written if (text := _problem(folder, step, record.steps[step["step"]]))}
    changed = [folder / folder_name(step) for step in written if step["step"] in wrong and _is_changed(folder, step)]
    if force:
        return RowState(names, reason="forced", changed=changed)
    valid = valid_steps(row, record, wrong)
    remaining = [name for name in names if name not in valid]
    differing = dict.fromkeys(fact for step in written for fact in differing_facts(step, record))
    if differing:
        reason = f"changed: {', '.join(differing)}"
    else:
        reason = next(iter(wrong.values()), "continued") if remaining else ""
    return RowState(remaining, valid, reason, changed)


def valid_steps(
    row: Mapping[str, Any], record: RowRecord, wrong: Mapping[str, str] | None = None
) -> dict[str, DoneStep]:
    """The steps of a record that are those of a row, as are all before them.

    Args:
        row: one of `rows_of`.
        record: the record in its folder.
        wrong: steps whose files are no longer as they were written.
    """
    valid: dict[str, DoneStep] = {}
    for step in row["steps"]:
        name = step["step"]
        is_same = name in record.steps and not differing_facts(step, record) and name not in (wrong or ())
        if is_same and all(before in valid for before in step["after"]):
            valid[name] = record.steps[name]
    return valid


def differing_facts(step: Step, record: RowRecord) -> list[str]:
    """The names of the facts of a step that are not those of its record; none if it is not in the record."""
    done = record.steps.get(step["step"])
    return [] if done is None else [name for name, value in step["facts"].items() if done.facts.get(name) != value]


def _is_changed(folder: Path, step: Step) -> bool:
    """Whether the folder of a step holds something that the step did not write."""
    place = folder / folder_name(step)
    match step["kind"]:
        case "validate":
            return False
        case "build":
            return (place / ENGINE).exists()
        case _:
            return place.is_dir() and bool(foreign_files(place))


def _problem(folder: Path, step: Step, done: DoneStep) -> str:
    """Why the result of a step is no longer what it was; empty if it is."""
    place = folder / folder_name(step)
    try:
        if step["kind"] == VALIDATE:
            return _report_problem(folder / report_name(step["subject"]), done)
        if not place.is_dir():
            return f"{place.name} is missing"
        if step["kind"] == BUILD:
            return _engine_problem(place / ENGINE)
        broken = [file for file in verify_folder(place) if file.problem is not None]
    except UsageError as error:
        return str(error)
    return f"{place.name}/{broken[0].name}: {broken[0].problem}" if broken else ""


def _report_problem(path: Path, done: DoneStep) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    return "" if sha256(path) == done.result.get("sha256") else f"{path.name} was changed"


def _engine_problem(path: Path) -> str:
    record, place = read_engine_record(path), path.parent.name
    if record is None or not path.is_file():
        return f"{place}/{path.name if record is not None else record_of(path).name} is missing"
    return "" if sha256(path) == record["sha256"] else f"{place}/{path.name} was changed"
