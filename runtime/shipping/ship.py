"""Ship the models of a recipe (`ship`): every row that is not as it was, one after the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...export.onnx_io.destinations import check_new_file
from ...export.onnx_io.owned_files import is_own_report
from ...export.onnx_io.partial_files import claimed
from ...models.errors import UsageError
from ..recipe.hashes import HASHES, Hashes
from ..recipe.recipe import Recipe, suggestion
from ..recipe.recipe_file import RECIPE, read_recipe
from ..recipe.rows import Row, rows_of
from .row_record import examine, read_record, valid_steps
from .ship_row import not_run, ship_row, step_result, worst
from .steps import Progress
from .summary import FILES, SCHEMA, write_progress, write_summary


@dataclass(frozen=True, slots=True)
class Shipment:
    """What became of the rows of a recipe.

    Attributes:
        recipe: its file.
        output: the folder of the results.
        rows: the result of each row, see `ship_row`.
        created: when it was made, in UTC.
        notes: on what was not written.
    """

    recipe: Path
    output: Path
    rows: list[dict[str, Any]]
    created: str
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """The exit code of the worst row: 0 if all of them are done."""
        return worst([row["exit_code"] for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        complete = all(step["status"] != "not run" for row in self.rows for step in row["steps"])
        return {
            "schema": SCHEMA,
            "verdict": "pass" if self.exit_code == 0 and complete else "fail",
            "exit_code": self.exit_code,
            "created": self.created,
            "recipe": str(self.recipe),
            "output": str(self.output),
            "rows": self.rows,
        }


def ship(
    recipe: str | os.PathLike[str] = RECIPE,
    *,
    only: Sequence[str] = (),
    force: bool = False,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Shipment:
    """Export or rewrite, build, validate and package every row of a recipe, and write the summary.

    It is in `summary.json`, `junit.xml` and `summary.html`.

    `summary.json` is written as rows end; `history.jsonl` gets a line for each run.

    A row that is as it was is skipped, and one that was interrupted goes on where it stopped. The error of a row is in
    its result; it does not stop the others.

    Args:
        recipe: the file.
        only: names of rows or models; all rows when empty.
        force: do all of them again.
        ray: the address of a cluster of Ray on which rows are shipped side by side, each with the cores, GPUs and
            memory that the recipe asks for: `local` (on this machine), `auto`, HOST:PORT or ray://HOST:PORT. None is
            one row after the other in this process.
        progress: called with a line of text at each step.

    Raises:
        UsageError: the recipe has problems, a name is not in it, another process ships to the same folder, the summary
            cannot be written, or there is no cluster at the address.
        EnvironmentMissingError: Ray is not installed.
    """
    read = read_recipe(Path(recipe))
    hashes = Hashes(read.output)
    rows = chosen(rows_of(read, hashes), only)
    _check_output(read)
    done: dict[str, dict[str, Any]] = {}
    with claimed(read.output):
        hashes.save()
        try:
            for result in _results(rows, read.output, force, ray, progress):
                done[result["row"]] = result
                if len(done) < len(rows):
                    with contextlib.suppress(UsageError):  # what stops it now will stop the last one too
                        write_progress(_shipment(read, rows, done).to_dict(), read.output)
        except BaseException as error:
            if done or isinstance(error, KeyboardInterrupt):
                _write(read, rows, done)
            raise
        return _write(read, rows, done)


def _write(recipe: Recipe, rows: list[Row], done: Mapping[str, dict[str, Any]]) -> Shipment:
    """Write the summary of the rows that are done."""
    shipment = _shipment(recipe, rows, done)
    return replace(shipment, notes=tuple(write_summary(shipment.to_dict(), recipe.output)))


def _shipment(recipe: Recipe, rows: list[Row], done: Mapping[str, dict[str, Any]]) -> Shipment:
    """The rows that are done; of the others it says that they are not run."""
    results = [done.get(row["row"]) or _not_run(row) for row in rows]
    return Shipment(recipe.path, recipe.output, results, datetime.now(UTC).isoformat(timespec="seconds"))


def _results(
    rows: list[Row], output: Path, force: bool, ray: str | None, progress: Progress | None
) -> Iterator[dict[str, Any]]:
    """The result of each row, as rows end."""
    if ray is not None:
        from .on_cluster import rows_on_cluster

        yield from rows_on_cluster(rows, ray, output, force=force, progress=progress)
        return
    for row in rows:
        yield ship_row(row, force=force, progress=progress)


def plan(recipe: str | os.PathLike[str], *, only: Sequence[str] = (), force: bool = False) -> list[dict[str, Any]]:
    """What `ship` would do: for each row its name, the steps that remain, and why. Nothing is written.

    Raises:
        UsageError: as `ship`.
    """
    found = []
    for row in chosen(rows_of(read_recipe(Path(recipe))), only):
        state = examine(row, force=force)
        found.append({"row": row["row"], "folder": row["folder"], "steps": state.steps, "reason": state.reason})
    return found


def chosen(rows: list[Row], only: Sequence[str]) -> list[Row]:
    """The rows of some names.

    Raises:
        UsageError: a name is neither that of a row nor that of a model.
    """
    known = list(dict.fromkeys(name for row in rows for name in (row["row"], row["model"])))
    for name in only:
        if name not in known:
            raise UsageError(f"only: expected one of {', '.join(known)}, got {name!r}{suggestion(name, known) or '.'}")
    return [row for row in rows if not only or {row["row"], row["model"]} & set(only)]


def _check_output(recipe: Recipe) -> None:
    """Create the folder of the results, and check before slow work that the summary can be written there."""
    try:
        recipe.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{recipe.output}: cannot be created: {error.strerror or error}.") from error
    for name in (*FILES, HASHES):
        check_new_file(recipe.output / name, is_own_report)


def _not_run(row: Row) -> dict[str, Any]:
    """The result of a row that an interrupt kept from ending: what its record says is done, and what is not run."""
    record = read_record(Path(row["folder"]))
    done = {} if record is None else valid_steps(row, record)
    steps = [
        step_result(step, "done", done[step["step"]].seconds, done[step["step"]].result)
        if step["step"] in done
        else not_run(step)
        for step in row["steps"]
    ]
    same = {name: row[name] for name in ("row", "model", "folder", "target", "dtype")}
    rest = {"exit_code": 0, "seconds": 0.0, "bytes": 0, "notes": [], "steps": steps}
    return {**same, "status": "not run", "reason": "", **rest}
