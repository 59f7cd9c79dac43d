"""Export, build, run and validate small decoders in TensorRT and TensorRT-RTX, in one table.

    python -m benchmarks.tensorrt_check                    # every row, for the products that run here
    python -m benchmarks.tensorrt_check --list
    python -m benchmarks.tensorrt_check --runtime tensorrt --only 'qwen3/float16'
    python -m benchmarks.tensorrt_check --deep 'qwen3/float16/plugin' --seconds 600 --json FILE --markdown FILE

Requires an NVIDIA GPU, PyTorch for CUDA, and `pip install 'rmsnorm-deploy[tensorrt,hf]'`, or `[rtx,hf]`, from a
checkout. `scripts/tensorrt_check.sh` installs what is missing, and runs `pytest -m tensorrt` too.

A row is one product, one model of transformers with a KV cache and random weights, one dtype, and its norms: `native`
(target `standard`), in the `plugin` (target `plugin`), or for the full TensorRT in one row as `quick` plugins. Stages:

  build      seconds, plugin layers, and the precision of each norm's result and statistics, as the inspector says
  run        are all outputs finite
  validate   `rmsnorm validate`, outputs only, and with `--deep` the norms too; the largest error against the float64
             reference, and the largest share of the error that is allowed
  tokens     16 greedy tokens are those of PyTorch's `generate`; in half precision a tie may fall either way
  graphs     runs with CUDA graphs have the bits of runs without
  contexts   32 concurrent requests in 4 contexts have the bits of the same requests one by one
  step       median time of 50 decode steps, with the cache on the GPU

Rows run in a process of their own, so that a crash or a hang fails one row. After `--seconds` no further row is begun.
What is needed to repair failed rows is written to OUT/failures.tar.gz, without weights. The exit code is 0 if every row
ran and passed, 1 if one failed or was not run, 2 for wrong arguments, 4 if there is nothing to run on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rmsnorm_deploy import __version__
from rmsnorm_deploy.runtime.engines.api import RUNTIMES

from . import archive, table
from .products import machine, usable
from .rows import FAILED, Row, all_rows, passed
from .worker import Examine, Worker, in_this_process

SECONDS: Final = 480.0
ROW_SECONDS: Final = 120.0
# Remove a line here, with the date and the GPU in benchmarks/measured, once it has run.
NEVER_RUN: Final = (
    "the runner of TensorRT and TensorRT-RTX (runtime/runners/tensorrt.py)",
    "CUDA graphs of engines",
    "several contexts of one engine",
    "the decoder's cache in the GPU's memory (DeviceCache)",
    "validate, bisect --deep and generate with engines",
    "the plugin in an engine, from the C++ library and from Python",
    "quick deployable plugins",
    "the inspector's list of layers and precisions",
)


def never_run() -> str:
    """What no GPU has run yet, in the lines that are printed first."""
    since = f"never run before on a GPU as of version {__version__}"
    return "\n".join(f"{since}: {what}" for what in NEVER_RUN)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.tensorrt_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--runtime", choices=(*RUNTIMES, "both"), default="both", help="products (default: %(default)s)")
    made.add_argument(
        "--only", type=re.compile, metavar="REGEX", help="rows whose names match, such as 'qwen3/float16'"
    )
    made.add_argument("--deep", type=re.compile, metavar="REGEX", help="rows whose norms are validated too")
    made.add_argument("--plugin", choices=("auto", "library", "python"), default="auto", help="as for rmsnorm build")
    made.add_argument("--seconds", type=float, default=SECONDS, help="begin no row after this (default: %(default).0f)")
    made.add_argument(
        "--row-seconds", type=float, default=ROW_SECONDS, help="limit of one row (default: %(default).0f; deep: twice)"
    )
    made.add_argument("--list", action="store_true", help="print the names of the rows, and run none")
    made.add_argument("--in-process", action="store_true", help="run the rows in this process, for a debugger")
    made.add_argument("--out", type=Path, default=Path("tensorrt-check-out"), metavar="DIR", help="for failures.tar.gz")
    made.add_argument("--attach", type=Path, nargs="+", default=[], metavar="FILE", help="logs to put into the archive")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every result")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    return made


def selected(given: argparse.Namespace, runtimes: Sequence[str]) -> list[Row]:
    """The rows that the options name."""
    rows = all_rows(runtimes, given.plugin)
    rows = [row for row in rows if given.only is None or given.only.search(row.name)]
    return [dataclasses.replace(row, deep=bool(given.deep and given.deep.search(row.name))) for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    command = parser()
    given = command.parse_args(arguments)
    wanted = list(RUNTIMES) if given.runtime == "both" else [given.runtime]
    if given.list:
        print("\n".join(row.name for row in selected(given, wanted)))
        return 0
    missing = [file for file in given.attach if not file.is_file()]
    if missing:
        command.error(f"--attach: {missing[0]} does not exist")
    runtimes, reasons = usable(wanted)
    if not runtimes:
        print(f"tensorrt_check has nothing to run on: {'; '.join(reasons)}. Nothing was written.", file=sys.stderr)
        return 4
    rows = selected(given, runtimes)
    if not rows:
        command.error(f"--only: no row of {', '.join(runtimes)} matches; see --list")
    print(never_run(), flush=True)
    here = machine(runtimes)
    print("\n" + "\n".join([_title(here), *(f"Not run: {reason}" for reason in reasons)]) + "\n", flush=True)
    if given.in_process:
        return _run(given, rows, here, in_this_process)
    worker = Worker()
    try:
        return _run(given, rows, here, worker.run)
    finally:
        worker.stop()


def _title(here: dict[str, Any]) -> str:
    gpu, found = here["gpu"], ", ".join(f"{name} {version}" for name, version in here["runtimes"].items())
    return f"{gpu['name']} ({gpu['architecture']}), driver {here['driver']}, {found}, torch {here['versions']['torch']}"


def _run(given: argparse.Namespace, rows: list[Row], here: dict[str, Any], run: Examine) -> int:
    began = time.monotonic()
    found: list[tuple[Row, dict[str, Any]]] = []
    left: list[Row] = []
    failed: dict[str, tuple[Path, dict[str, Any]]] = {}
    given.out.mkdir(parents=True, exist_ok=True)
    place = given.out / archive.NAME
    place.unlink(missing_ok=True)
    if given.attach:
        archive.pack(place, here, failed, given.attach)
    print(f"{table.HEAD}\n{table.RULE}", flush=True)
    with tempfile.TemporaryDirectory(prefix="tensorrt-check-") as temporary:
        for row in rows:
            if time.monotonic() - began >= given.seconds:
                left.append(row)
                continue
            folder = Path(temporary) / row.folder
            folder.mkdir()
            results = _results(row, folder, given.row_seconds * (2 if row.deep else 1), run)
            found.append((row, results))
            print(table.row_line(row, results), flush=True)
            if not passed(results, row):
                failed[row.folder] = (folder, {"row": dataclasses.asdict(row), "stages": results})
                archive.pack(place, here, failed, given.attach)  # whole after every row
            _write(given, here, found, [*left, *rows[len(found) + len(left) :]])
    last = _write(given, here, found, left)
    seconds = time.monotonic() - began
    print(f"\n{len(found)} of {len(rows)} rows in {seconds:.0f} s\n\n{last}", flush=True)
    if place.is_file():
        print(f"\nWhat is needed to repair them: {place}", flush=True)
    return 1 if failed or left else 0


def _results(row: Row, folder: Path, limit: float, run: Examine) -> dict[str, Any]:
    """The result of each stage, whose progress goes to stderr."""
    results: dict[str, Any] = {}

    def report(name: str, result: dict[str, Any] | None) -> None:
        if result is None:
            print(f"{row.name}: {name}", file=sys.stderr, flush=True)
            return
        results[name] = result
        if result["state"] == FAILED:
            print(f"{row.name}: {name} failed: {result['text']}", file=sys.stderr, flush=True)

    run(row, folder, limit, report)
    return results


def _write(
    given: argparse.Namespace, here: dict[str, Any], found: list[tuple[Row, dict[str, Any]]], left: list[Row]
) -> str:
    """Write the files that were asked for, and return what is printed last."""
    names = [row.name for row in left]
    last = "\n\n".join([
        *([text] if (text := table.steps_table(found)) else []),
        table.listed("Failed", table.problems(found), f"None of {len(found)} rows."),
        table.listed("Not run", names, "Every row was run."),
    ])  # fmt: skip
    if given.markdown is not None:
        given.markdown.write_text(f"{_title(here)}\n\n{table.rows_table(found)}\n\n{last}\n", encoding="utf-8")
    if given.json is not None:
        rows = [
            {"name": row.name, **dataclasses.asdict(row), "passed": passed(results, row), "stages": results}
            for row, results in found
        ]
        content = {"machine": here, "never_run_before": NEVER_RUN, "rows": rows, "left": names}
        given.json.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    return last
