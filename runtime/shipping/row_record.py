"""The state of a row: `row.json` with the steps that are done, and the steps that remain (`examine`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...export.onnx_io.owned_files import foreign_files, sha256
from ...export.onnx_io.verify import verify_folder
from ...models.errors import UsageError
from ...models.regular_files import read_json
from ..report.text import write_text

SCHEMA = "rmsnorm_deploy.row/1"
FILE, MODEL, REPORT, HTML = "row.json", "model", "report.json", "report.html"
# The report of the validation before.
EARLIER = "report.before.json"
EXPORT, VALIDATE, PACKAGE = "export", "validate", "package"


class DoneStep(BaseModel):
    """A step that is done: how long it took, and what it gave."""

    model_config = ConfigDict(strict=True)

    seconds: float
    result: dict[str, Any]


class RowRecord(BaseModel):
    """The content of `row.json`."""

    model_config = ConfigDict(strict=True)

    schema_: str = SCHEMA
    row: str
    key: str
    facts: dict[str, str]
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


def steps_of(row: Mapping[str, Any]) -> list[str]:
    """The steps of a row in order: `export`, `validate`, and `package:SERVER` for each server."""
    return [EXPORT, *([VALIDATE] if row["validate"] else []), *(f"{PACKAGE}:{name}" for name in row["package"])]


@dataclass(frozen=True, slots=True)
class RowState:
    """What remains to do for a row.

    Attributes:
        steps: the steps to run, in order; empty if the row is finished.
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
    folder, steps = Path(row["folder"]), steps_of(row)
    record = read_record(folder)
    if record is None:
        return RowState(steps, reason="new")
    wrong = {name: problem for name in record.steps if (problem := _problem(folder, name, record.steps[name]))}
    changed = [place for name in wrong if (place := _folder(folder, name)).is_dir() and foreign_files(place)]
    if force:
        return RowState(steps, reason="forced", changed=changed)
    if record.key != row["key"]:
        facts = row["facts"]
        differing = [name for name in facts if facts[name] != record.facts.get(name)]
        return RowState(steps, reason=f"changed: {', '.join(differing)}", changed=changed)
    open_ = [name for name in steps if name not in record.steps or name in wrong]
    if EXPORT in open_ or VALIDATE in open_:
        open_ = steps[steps.index(open_[0]) :]
    reason = "" if not open_ else next(iter(wrong.values()), "continued")
    done = {name: step for name, step in record.steps.items() if name in steps and name not in open_}
    return RowState(open_, done, reason, changed)


def _folder(folder: Path, step: str) -> Path:
    """The folder that a step writes."""
    return folder / (MODEL if step == EXPORT else step.removeprefix(f"{PACKAGE}:"))


def _problem(folder: Path, step: str, done: DoneStep) -> str:
    """Why the result of a step is no longer what it was; empty if it is."""
    if step == VALIDATE:
        path = folder / REPORT
        if not path.is_file():
            return f"{REPORT} is missing"
        return "" if sha256(path) == done.result.get("sha256") else f"{REPORT} was changed"
    place = _folder(folder, step)
    try:
        broken = [file for file in verify_folder(place) if file.problem is not None]
    except UsageError as error:
        return str(error)
    return f"{place.name}/{broken[0].name}: {broken[0].problem}" if broken else ""
