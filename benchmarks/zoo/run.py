"""The command line: run the chosen rows, print and write the table.

    python -m benchmarks.zoo [--only NAME ...] [--kind KIND ...] [--quick] [--jobs N] [--steps STEP,...]
                             [--json FILE] [--markdown FILE]

Every model is small, with random weights. A row shows the norms found and the norms there, the export, its validation,
the export with a KV cache, whether its tokens are PyTorch's over 24 greedy steps from a left-padded batch of two, and
whether transformers' own exporter exports the model. Rows that FILE of `--json` already has are not run again. The exit
code is 1 if a row is wrong: an export without an error whose validation fails or whose tokens differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rmsnorm_deploy.models.errors import RmsnormDeployError

from .catalog import ENTRIES
from .entries import KINDS
from .isolation import isolated
from .rows import STEPS
from .table import Rows, line, markdown, read, summary, write, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = _parser().parse_args(arguments)
    unknown = [name for name in given.steps if name not in STEPS]
    if unknown:
        print(f"--steps: expected some of {','.join(STEPS)}, got {','.join(unknown)}", file=sys.stderr)
        return 2
    try:
        rows = read(given.json) if given.json is not None else {}
    except RmsnormDeployError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    run(_chosen(given), given.steps, given.jobs, rows, given.json)
    if given.markdown is not None:
        given.markdown.write_text(markdown(rows), encoding="utf-8")
    print(summary(rows))
    return 1 if wrong(rows) else 0


def run(names: Sequence[str], steps: Sequence[str], jobs: int, rows: Rows, path: Path | None) -> None:
    """Run the rows that `rows` lacks; add, print and write each as it finishes."""
    left = [name for name in names if name not in rows]
    with ThreadPoolExecutor(jobs) as pool:
        for name, results in zip(left, pool.map(lambda name: isolated(name, steps), left), strict=True):
            rows[name] = [result.to_dict() for result in results]
            print(line(name, rows[name]), flush=True)
            if path is not None:
                write(path, rows)


def _chosen(given: argparse.Namespace) -> list[str]:
    return [
        name
        for name, entry in ENTRIES.items()
        if (not given.only or name in given.only)
        and (not given.kind or entry.kind in given.kind)
        and (not given.quick or entry.quick)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), metavar="NAME", help="names of rows")
    parser.add_argument("--kind", nargs="+", choices=KINDS)
    parser.add_argument("--quick", action="store_true", help="the rows that the tests take through all steps")
    parser.add_argument("--jobs", type=int, default=1, help="rows at the same time")
    parser.add_argument("--steps", type=lambda text: text.split(","), default=list(STEPS), metavar="STEP,...")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write each row as it finishes; continue an earlier run"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    return parser
