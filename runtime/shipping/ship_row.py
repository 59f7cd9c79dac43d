"""Do the steps of one row (`ship_row`): plain data in and out, so that it may run anywhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...export.onnx_io.partial_files import claimed
from ...models.checkpoint_keys import allowing_missing
from ...models.errors import explained
from ...models.hub.options import hub_options, showing_downloads, using_hub
from ...models.weights.checkpoint import allowing_pickles
from ..recipe.fields import Settings, names_of
from ..recipe.steps import VALIDATE
from .row_record import DoneStep, RowRecord, RowState, examine
from .steps import STEPS, Progress, Result

Step = Mapping[str, Any]
_OPTION = re.compile(r"--[a-z][a-z0-9-]*")
# Fields whose options have other names than theirs, or those in the singular.
_UNLIKE = {"arch": "architectures", "for": "package"}
_COMMAND = re.compile(r"\brmsnorm [a-z]+ [^()]*")
# From the worst to the best: a mismatch is worse than what could not be tried.
_WORST = (70, 1, 2, 4, 3, 0)


def ship_row(row: Mapping[str, Any], *, force: bool = False, progress: Progress | None = None) -> Result:
    """Do the steps of a row that remain; an error ends the row, and is in its result.

    Args:
        row: one of `rows_of`.
        force: do all steps again.
        progress: called with a line of text at each step.

    Returns:
        JSON values: `row`, `model`, `folder`, `target`, `dtype`; `status`: `done`, `unchanged` or `failed`; `reason`,
        why there was something to do; `exit_code`; `seconds` of this run; `bytes` of its folders; `notes`; and `steps`,
        each with `step`, `status` (`done`, `unchanged`, `failed` or `not run`), `seconds` (when it ran), `result` and
        `error` (`kind`, `message`, `exit_code`).
    """
    start = time.monotonic()
    say = progress or (lambda _: None)
    try:
        Path(row["folder"]).mkdir(parents=True, exist_ok=True)
        with claimed(Path(row["folder"])):
            say(f"{row['row']}: comparing with the last run")
            state = examine(row, force=force)
            notes = _prepare(row, state) if state.steps else []
            steps = _run(row, state, lambda text: say(f"{row['row']}: {text}"))
    except Exception as error:  # of any kind: the other rows go on
        return failed_row(row, error)
    return _result(row, state, steps, notes, round(time.monotonic() - start, 3))


def failed_row(row: Mapping[str, Any], error: BaseException) -> Result:
    """The result of a row, as that of `ship_row`, which an error ended before its first step."""
    first, *others = row["steps"]
    return _result(row, RowState([]), [_failed(first, error, 0.0), *map(not_run, others)], [], 0.0)


def _result(row: Mapping[str, Any], state: RowState, steps: list[Result], notes: list[str], seconds: float) -> Result:
    codes = [step["error"]["exit_code"] for step in steps if step["error"]]
    results = [step["result"] for step in steps if step["result"]]
    return {
        "row": row["row"],
        "model": row["model"],
        "folder": row["folder"],
        "target": row["target"],
        "dtype": row["dtype"],
        "status": "failed" if codes else "done" if state.steps else "unchanged",
        "reason": state.reason,
        "exit_code": worst(codes),
        "seconds": seconds,
        "bytes": sum(result.get("bytes", 0) for result in results),
        "notes": list(dict.fromkeys([*notes, *(note for result in results for note in result.get("notes", ()))])),
        "steps": steps,
    }


def worst(codes: list[int]) -> int:
    """The exit code of several: that of a bug, else of a mismatch, wrong usage, what is missing or is unsupported."""
    return min(codes, default=0, key=_WORST.index)


def _prepare(row: Mapping[str, Any], state: RowState) -> list[str]:
    """Move away what was changed in the folder, and forget the steps that are done again."""
    folder = Path(row["folder"])
    notes = []
    for place in state.changed:
        number = 1
        while (aside := place.with_name(f"{place.name}.changed-{number}")).exists():
            number += 1
        place.rename(aside)
        notes.append(f"{place.name} was changed since it was written; it was kept as {aside.name}")
    RowRecord(row=row["row"], steps=state.done).save(folder)
    return notes


def _run(row: Mapping[str, Any], state: RowState, progress: Progress) -> list[Result]:
    """Every step with what became of it."""
    record = RowRecord(row=row["row"], steps=dict(state.done))
    found: list[Result] = []
    for step in row["steps"]:
        name = step["step"]
        if name in state.done:
            found.append(step_result(step, "unchanged", state.done[name].seconds, state.done[name].result))
            continue
        if not all(before in record.steps for before in step["after"]):
            found.append(not_run(step))
            continue
        start = time.monotonic()
        try:
            with _loading(row), showing_downloads(progress):
                result = _in_terms_of_fields(STEPS[step["kind"]](row, step, progress), step["kind"])
            seconds = round(time.monotonic() - start, 3)
            record.steps[name] = DoneStep(seconds=seconds, facts=step["facts"], result=result)
            record.save(Path(row["folder"]))
            found.append(step_result(step, "done", seconds, result))
        except (Exception, SystemExit) as error:
            found.append(_failed(step, error, round(time.monotonic() - start, 3)))
    return found


@contextmanager
def _loading(row: Mapping[str, Any]) -> Iterator[None]:
    """Load the row's model as its fields say, with the options of the hub that hold already."""
    model = row["against"] or row["source"]
    options = replace(hub_options(model), revision=row["revision"], subfolder=row["subfolder"])
    pickles = allowing_pickles() if row["allow_pickle"] else nullcontext()
    with using_hub(options, model), allowing_missing(row["allow_missing"]), pickles:
        yield


def step_result(
    step: Step, status: str, seconds: float, result: Result | None = None, error: Result | None = None
) -> Result:
    """What became of a step, see `ship_row`."""
    return {"step": step["step"], "status": status, "seconds": seconds, "result": result, "error": error}


def not_run(step: Step) -> Result:
    """A step that was not run."""
    return step_result(step, "not run", 0.0)


def _failed(step: Step, error: BaseException, seconds: float) -> Result:
    kind, message, code = explained(error)
    return step_result(
        step,
        "failed",
        seconds,
        error={"kind": kind, "message": f"{message}{_fields_in(message, step['kind'])}", "exit_code": code},
    )


def _in_terms_of_fields(result: Result, kind: str) -> Result:
    """The result of a step, whose notes say what the options in them are called in a recipe."""
    notes = [f"{note}.{more}" if (more := _fields_in(note, kind)) else note for note in result.get("notes") or ()]
    return {**result, "notes": notes} if "notes" in result else result


def _fields_in(message: str, kind: str) -> str:
    """What the options of the command line in a message are called in a recipe; not those of a whole command."""
    known = names_of(Settings)
    fields = {}
    for option in dict.fromkeys(_OPTION.findall(_COMMAND.sub("", message))):
        name = option.removeprefix("--").replace("-", "_")
        own = "test_inputs" if kind == VALIDATE and name == "inputs" else name
        found = next((field for field in (own, f"{own}s", _UNLIKE.get(own)) if field in known), None)
        if found is not None:
            fields[option] = found
    return f" In a recipe, {' and '.join(f'{option} is {field}' for option, field in fields.items())}." * bool(fields)
