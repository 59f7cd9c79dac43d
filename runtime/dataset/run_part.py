"""Run the rows of a part of a data set (`PartRunner`), and write the result completely or not at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...export.onnx_io.atomic_files import new_file
from ...models.errors import RmsnormDeployError, UsageError, explained
from ..cluster.connection import SharedFolder, check_node
from ..inputs.exported import open_exported
from ..inputs.synthetic import cast_feeds
from ..inputs.tokenizer import Tokenizer, load_tokenizer
from ..runners.base import Array, Runner, TensorInfo
from ..runners.threads import using_threads
from ..tensorrt.on_demand import open_model
from .columns import cells, to_column
from .parts import MARK, Part, is_written, read_part
from .texts import TOKENS, per_token, token_cells

MASK = "attention_mask"


@dataclass(frozen=True, slots=True)
class PartOptions:
    """How the rows of a data set are run.

    Attributes:
        model: an exported folder, an .onnx file or an engine.
        output: the folder of the results.
        key: of the run, see `run_dataset`.
        batch: the most rows of one run of the model.
        columns: the column of an input, where their names differ.
        outputs: the outputs that are written; empty for all.
        keep: the columns that are written beside them.
        runner: see `open_model`.
        provider: see `open_model`.
        tokenizer: that of texts in the column of `input_ids`; None where it holds tokens.
        max_tokens: the most tokens of a text; None for all.
        shared: the folder, where parts run on several nodes.
        threads: of ONNX Runtime; 0 is one for each core.
    """

    model: str
    output: str
    key: str
    batch: int
    columns: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    runner: str | None = None
    provider: str = "cpu"
    tokenizer: str | None = None
    max_tokens: int | None = None
    shared: SharedFolder | None = None
    threads: int = 0


class PartRunner:
    """A model that is opened by the first part, and stays open from part to part."""

    def __init__(self, options: PartOptions) -> None:
        self.options = options

    @cached_property
    def opened(self) -> Runner:
        """The model."""
        if self.options.shared is not None:
            check_node(self.options.shared)
        with using_threads(self.options.threads):
            return open_model(open_exported(self.options.model), self.options.runner, self.options.provider).__enter__()

    @cached_property
    def inputs(self) -> list[TensorInfo]:
        """Its inputs."""
        return self.opened.inputs()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the texts."""
        assert self.options.tokenizer is not None
        return load_tokenizer(self.options.tokenizer)

    def close(self) -> None:
        """Release the model, if it was opened."""
        if "opened" in self.__dict__:
            self.opened.__exit__(None, None, None)

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Run the part of a batch of Ray Data; see `run`. An error is a value: what Ray raises is another one."""
        (row,) = zip(*(batch[name].tolist() for name in Part.__slots__), strict=True)
        ran, kind, message = False, "", ""
        try:
            ran = self.run(Part(*row))
        except RmsnormDeployError as error:
            kind, message, _ = explained(error)
        values = {"rows": row[-1], "ran": ran, "error": kind, "message": message}
        return {name: np.array([value]) for name, value in values.items()}

    def run(self, part: Part) -> bool:
        """Write the result of a part; False if it was there.

        Raises:
            UsageError: the rows do not fit the model; the message names the file and the row.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = Path(self.options.output)
        if is_written(part, folder, self.options.key):
            return False
        table = read_part(part)
        results = self._results(table, part)
        columns = {name: table.column(name) for name in self.options.keep}
        columns.update({name: to_column(values) for name, values in results.items()})
        written = pa.table(columns).replace_schema_metadata({MARK: part.mark(self.options.key)})
        try:
            with new_file(folder / part.name) as place:
                pq.write_table(written, place)
        except UsageError:
            if is_written(part, folder, self.options.key):  # by a worker that was held for lost
                return False
            raise
        return True

    def _results(self, table: Any, part: Part) -> dict[str, list[Array]]:
        """The outputs of each row, by name."""
        names = {info.name: self.options.columns.get(info.name, info.name) for info in self.inputs}
        given = {
            name: self._cells(table.column(column), name, column, part)
            for name, column in names.items()
            if column in table.column_names
        }
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
        for row in range(part.rows):
            groups[tuple(values[row].shape for values in given.values())].append(row)
        results: dict[str, list[Any]] = {}
        for rows in groups.values():
            for start in range(0, len(rows), self.options.batch):
                chosen = rows[start : start + self.options.batch]
                for name, array in self._run(given, chosen, part).items():
                    of_rows = results.setdefault(name, [None] * part.rows)
                    for row, value in zip(chosen, array, strict=True):
                        of_rows[row] = value
        return results

    def _cells(self, values: Any, name: str, column: str, part: Part) -> list[Array]:
        """The value of each row of a column."""
        tokenizer = self.tokenizer if name == TOKENS and self.options.tokenizer is not None else None
        try:
            if tokenizer is not None:
                return token_cells(values, column, tokenizer, self.options.max_tokens, part.start)
            return cells(values, column, part.start)
        except UsageError as error:
            raise UsageError(f"{part.file}: {error}") from error

    def _run(self, given: Mapping[str, Sequence[Array]], rows: Sequence[int], part: Part) -> dict[str, Array]:
        feeds = {name: np.stack([values[row] for row in rows]) for name, values in given.items()}
        if TOKENS in feeds:
            feeds |= per_token(feeds[TOKENS], feeds, self.inputs)
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        where = f"{part.file}: row {part.start + rows[0]}{more}"
        try:
            results = self.opened.run(cast_feeds(feeds, self.inputs))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        wanted = {
            name: array for name, array in results.items() if not self.options.outputs or name in self.options.outputs
        }
        wrong = [
            f"{name} {list(array.shape)}" for name, array in wanted.items() if not array.ndim or len(array) != len(rows)
        ]
        if wrong:
            raise UsageError(
                f"{where}: expected outputs whose first dim is the batch of {len(rows)}, got {', '.join(wrong)}."
            )
        return wanted


def problem_of_model(inputs: Sequence[TensorInfo]) -> str | None:
    """Why the inputs of a model cannot be the rows of a data set, or None."""
    firsts = {info.name: info.shape[0] if info.shape else None for info in inputs}
    fixed = [f"{name} (always {size})" for name, size in firsts.items() if isinstance(size, int) and size != 1]
    without = [name for name, size in firsts.items() if size is None]
    if fixed or without:
        return f"expected inputs whose first dim is a batch of any size, or of 1, got {', '.join([*fixed, *without])}"
    caches = [name for name in firsts if name.startswith("past_")]
    return f"expected a model without a cache, got the inputs {', '.join(caches[:2])}" if caches else None


def rows_at_once(inputs: Sequence[TensorInfo], batch: int) -> int:
    """The rows of one run: 1 where an input has room for one."""
    return 1 if any(info.shape and info.shape[0] == 1 for info in inputs) else batch
