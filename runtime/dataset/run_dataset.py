"""Run a model on the rows of a data set (`run_dataset`): in parts, each written once, here or on a cluster of Ray."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...export.onnx_io.owned_files import sha256
from ...export.onnx_io.partial_files import claimed
from ...export.onnx_io.read_model import read_model
from ...models import errors
from ...models.companions import companion_files
from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UsageError
from ...models.regular_files import read_json
from ...models.versions import installed_version
from ..cluster.calls import Needs
from ..cluster.connection import connected, shared_folder
from ..inputs.cases import PER_TOKEN
from ..inputs.exported import Exported, open_exported
from ..report.text import write_text
from ..runners.base import TensorInfo
from ..tensorrt.on_demand import open_model
from .parts import Part, dataset_files, foreign_parts, is_written, plan_parts
from .run_part import MASK, PartOptions, PartRunner, problem_of_model, rows_at_once
from .texts import TOKENS, tokenizer_of

SCHEMA = "rmsnorm_deploy.dataset/1"
RECORD = "_dataset.json"  # readers of Parquet folders skip names that begin so
ROWS = 4096
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DatasetRun:
    """A data set that was run.

    Attributes:
        output: the folder of the results.
        rows: the number of rows of the data set, each of which has its result there.
        parts: the number of files of results.
        ran: the parts that were run now; the others were there.
        seconds: that the runs of now took.
    """

    output: Path
    rows: int
    parts: int
    ran: int
    seconds: float


def run_dataset(
    model: str | os.PathLike[str],
    dataset: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    batch: int = 32,
    rows: int = ROWS,
    columns: Mapping[str, str] | None = None,
    outputs: Sequence[str] = (),
    runner: str | None = None,
    provider: str = "cpu",
    tokenizer: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    ray: str | None = None,
    needs: Needs | None = None,
    progress: Progress | None = None,
) -> DatasetRun:
    """Run a model on every row of a data set, and write the outputs of each row.

    The data set is cut into parts; the result of a part is one file, written completely or not at all. Called again, it
    goes on with the parts that are missing, so that every row has one result whatever was killed. Rows of one shape are
    run together; nothing is padded. Other columns are copied to the results, and a missing
    `attention_mask` is all ones. A column of texts for `input_ids` is tokenized, and copied too.

    Args:
        model: an exported folder, an .onnx file or an engine.
        dataset: a Parquet file, or a folder of them, with a column for each input: numbers, or nested lists.
        output: the folder of the results, which is created: `part-NNNNNN.parquet`, and `_dataset.json` when all are
            there.
        batch: the most rows of one run of the model.
        rows: the most rows of a part.
        columns: the column of an input, where their names differ.
        outputs: the outputs that are written; empty for all.
        runner: see `open_model`.
        provider: see `open_model`.
        tokenizer: that of texts, a folder or a hub name; None for that of the exported folder.
        max_tokens: the most tokens of a text, the rest of which is cut off; None for all.
        ray: the address of a cluster of Ray, see `connected`; None for this process.
        needs: what a worker of the cluster occupies; one core when None.
        progress: called with a line of text as parts end.

    Raises:
        UsageError: the data set does not fit the model, or the folder has the results of another run.
        EnvironmentMissingError: pyarrow or Ray is not installed.
    """
    say = progress or (lambda _: None)
    _check_pyarrow()
    for name, value in (("batch", batch), ("rows", rows), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}.")
    start, place = time.monotonic(), Path(output).expanduser().absolute()
    files = dataset_files(Path(dataset))
    parts, schema = plan_parts(files, rows)
    exported = open_exported(Path(model).expanduser().absolute())  # other nodes have other working folders
    inputs, names = _signature(exported, runner, provider)
    renamed = dict(columns or {})
    texts = renamed.get(TOKENS, TOKENS)
    reader = tokenizer_of(schema, texts, None if tokenizer is None else str(tokenizer), exported)
    if max_tokens is not None and reader is None:
        raise UsageError(f"max_tokens: expected a column of texts for {TOKENS}, got none.")
    keep = _checked(
        schema.names, inputs, names, renamed, outputs, str(dataset), str(exported.model), texts if reader else None
    )
    facts = {
        "model": [sha256(path) for path in _model_files(exported)],
        "files": [[path.name, sha256(path)] for path in files],
        "rows": rows, "columns": renamed, "outputs": list(outputs), "version": installed_version("rmsnorm-deploy"),
        "tokenizer": None if reader is None else [*_tokenizer_facts(reader), max_tokens],
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    options = PartOptions(
        str(exported.folder or exported.model) if not exported.is_engine else str(exported.model),
        str(place), key, rows_at_once(inputs, batch), renamed, tuple(outputs), keep, runner, provider, reader,
        max_tokens,
    )  # fmt: skip
    _prepare(place, parts, key)
    with claimed(place):
        left = [part for part in parts if not is_written(part, place, key)]
        if len(left) < len(parts):
            say(f"{len(parts) - len(left)} of {len(parts)} parts are there")
        ran, done, total = 0, len(parts) - len(left), len(parts)
        results = _here(left, options) if ray is None else _there(left, options, ray, needs or Needs(), say)
        for part_rows, was_run in results:
            ran, done = ran + was_run, done + 1
            say(f"part {done} of {total}: {part_rows} rows")
        count = _check_all(parts, place, key)
        record = {"schema": SCHEMA, "key": key, "model": str(exported.model), "dataset": str(dataset), "rows": count}
        record |= {"parts": len(parts), **{name: facts[name] for name in ("columns", "outputs", "version")}}
        write_text(json.dumps(record, indent=2) + "\n", place / RECORD)
    return DatasetRun(place, count, len(parts), ran, round(time.monotonic() - start, 3))


def _signature(exported: Exported, runner: str | None, provider: str) -> tuple[list[TensorInfo], list[str]]:
    """The inputs, and the names of the outputs; of the manifest if it has them, as this machine may lack the GPU."""
    rows = exported.manifest.get("inputs"), exported.manifest.get("outputs")
    if rows[0] and rows[1]:
        inputs = [TensorInfo(row["name"], row["dtype"], tuple(row["shape"])) for row in rows[0]]
        return inputs, [row["name"] for row in rows[1]]
    with open_model(exported, runner, provider) as opened:
        return opened.inputs(), [info.name for info in opened.outputs()]


def _model_files(exported: Exported) -> list[Path]:
    """The files that decide what the model computes: its own, and those of its weights."""
    weights = [] if exported.is_engine else read_model(exported.model).external_files
    return [exported.model, *weights]


def _tokenizer_facts(reader: str) -> list[Any]:
    """What decides the tokens: the files of a folder, or the name of the hub."""
    folder = Path(reader)
    if not folder.is_dir():
        return [reader]
    return [[path.name, sha256(path)] for path in companion_files(folder)[0]]


def _check_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise EnvironmentMissingError(
            f"pyarrow is not installed ({error}). Install it with: pip install 'rmsnorm-deploy[ray]'"
        ) from error


def _checked(
    columns: Sequence[str],
    inputs: Sequence[TensorInfo],
    outputs: Sequence[str],
    renamed: Mapping[str, str],
    wanted: Sequence[str],
    dataset: str,
    model: str,
    texts: str | None,
) -> tuple[str, ...]:
    """Check that a data set has what a model reads; returns the other columns, and that of the texts."""
    problem = problem_of_model(inputs)
    if problem is not None:
        raise UsageError(f"{model}: {problem}. Export it without --with-past and with a dynamic batch.")
    names = [info.name for info in inputs]
    unknown = [name for name in renamed if name not in names]
    if unknown:
        raise UsageError(f"columns: expected inputs of {', '.join(names)}, got {', '.join(unknown)}.")
    made = (MASK,) if texts is None else PER_TOKEN
    read = {name: renamed.get(name, name) for name in names}
    missing = [
        f"{column} (for the input {name})" if column != name else column
        for name, column in read.items()
        if column not in columns and not (name in made and TOKENS in names and name not in renamed)
    ]
    if missing:
        raise UsageError(
            f"{dataset}: expected the columns {', '.join(missing)}, got {', '.join(columns) or 'none'}. "
            "Name the column of an input with --column INPUT=COLUMN."
        )
    strange = [name for name in wanted if name not in outputs]
    if strange:
        raise UsageError(f"outputs: expected some of {', '.join(outputs)}, got {', '.join(strange)}.")
    keep = tuple(column for column in columns if column not in read.values() or column == texts)
    twice = [column for column in keep if column in (wanted or outputs)]
    if twice:
        raise UsageError(
            f"{dataset}: expected no column with the name of an output, got {', '.join(twice)}. Rename the column."
        )
    return keep


def _prepare(place: Path, parts: Sequence[Part], key: str) -> None:
    """Create the folder; refuse one with the results of another run before anything runs."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{place}: cannot be created: {error.strerror or error}.") from error
    foreign = next(foreign_parts(place, list(parts)), None)
    record = place / RECORD
    earlier = read_json(record, "Choose another folder.") if record.exists() else None
    if foreign is not None or (earlier is not None and (not isinstance(earlier, dict) or earlier.get("key") != key)):
        raise UsageError(
            f"{foreign or record}: expected the results of the same model, data set and options, got those of another "
            "run. Choose another folder with -o, or delete this one."
        )


def _here(parts: Sequence[Part], options: PartOptions) -> Iterator[tuple[int, bool]]:
    """Run parts one after the other; yields the rows of each, and whether it was run."""
    if not parts:
        return
    runner = PartRunner(options)
    try:
        for part in parts:
            yield part.rows, runner.run(part)
    finally:
        runner.close()


def _there(
    parts: Sequence[Part], options: PartOptions, address: str, needs: Needs, say: Progress
) -> Iterator[tuple[int, bool]]:
    """Run parts on a cluster, with as many workers as it has room for; as `_here`."""
    if not parts:
        return
    with connected(address) as ray, shared_folder(Path(options.output)) as shared:
        import ray.data as data

        workers = sum(needs.copies(node["Resources"]) for node in ray.nodes() if node["Alive"])
        if not workers:
            raise UsageError(f"ray: expected a node with {needs}, got a cluster of {address} without.")
        workers = min(workers, len(parts))
        say(f"{len(parts)} parts on {workers} workers")
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # errors of rows are those that are raised here
        rows = data.from_items([dataclasses.asdict(part) for part in parts], override_num_blocks=len(parts))
        done = rows.map_batches(
            PartRunner,
            fn_constructor_args=(dataclasses.replace(options, shared=shared, threads=max(1, int(needs.cpus))),),
            batch_size=1,
            concurrency=workers,
            **needs.options(),
        )
        for row in done.iter_rows():
            if row["error"]:
                raise getattr(errors, row["error"], RmsnormDeployError)(row["message"])
            yield int(row["rows"]), bool(row["ran"])


def _check_all(parts: Sequence[Part], place: Path, key: str) -> int:
    """The rows of all results, each of which is looked at once more.

    Raises:
        UsageError: a result is missing.
    """
    missing = [part.name for part in parts if not is_written(part, place, key)]
    if missing:
        raise UsageError(f"{place}: expected {len(parts)} files of results, but {missing[0]} is missing. Run it again.")
    return sum(part.rows for part in parts)
