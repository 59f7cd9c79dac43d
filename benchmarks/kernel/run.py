"""Time the CUDA kernel on a GPU beside other kernels, and beside a copy of the same number of bytes.

    python -m benchmarks.kernel                            # the default rows, in less than eight minutes
    python -m benchmarks.kernel --all --seconds 3600       # the whole grid
    python -m benchmarks.kernel --rows 1 64 --width 4096 --op add_rms_norm --output same fp8-static
    python -m benchmarks.kernel --no-overlap               # without programmatic dependent launch
    python -m benchmarks.kernel --tune                     # every layout, beside the chosen one
    python -m benchmarks.kernel --check                    # results only, for compute-sanitizer
    python -m benchmarks.kernel --json FILE --markdown FILE

Requires an NVIDIA GPU, the CUDA build of torch, and `pip install 'rmsnorm-deploy[kernel]'`. The peers are PyTorch's
operators, torch.compile, and liger-kernel, quack-kernels and flashinfer-python if they are installed.

Each row is one operator, dtype, number of rows and width. Every result is compared with float64 before anything is
timed. All ways are recorded in CUDA graphs of many launches, which are replayed in turns. Cold: each launch has tensors
of its own, and the L2 cache is overwritten before each replay. Warm: all launches have the same tensors. The time is
the median over the replays, divided by the launches in the graph; the JSON has the 10th and 90th percentile too. `copy`
is `Tensor.copy_` of the same total number of bytes, which are those of x, residual, sum and y, without the weight.

After `--seconds` no further row is begun, and the rows that were left out are listed. The last table has ours, the best
peer and the copy; then follow the losses: rows in which ours is slower than the best peer, has less than 97% of the
speed of the copy from 2048 rows on, or less than 93% of the bandwidth of a large copy from 200 MB on. The exit code is
1 if a result of ours is not accurate or a launch failed, and 4 if a requirement is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from rmsnorm_deploy.models.errors import EnvironmentMissingError

from . import table, tune
from .cases import DTYPES, OPS, OUTPUTS, ROWS, WIDTHS, Budget, Case, default_cases, grid, whole_grid
from .compiled import Compile, compiling_processes
from .measure import Gpu, Setting, checked, measured, this_gpu
from .peers import peers, reason_of
from .timing import copy_bandwidth, flushed_tensor

SECONDS: Final = 420.0
_CHECKED_WIDTHS: Final = (128, 1001, 4096, 16384)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.kernel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = made.add_mutually_exclusive_group()
    what.add_argument("--tune", action="store_true", help="measure the layouts")
    what.add_argument("--check", action="store_true", help="compare results of a few rows with float64, without timing")
    what.add_argument("--all", action="store_true", help="measure the whole grid")
    made.add_argument("--seconds", type=float, default=SECONDS, help="time for all rows (default: %(default).0f)")
    made.add_argument("--rows", type=int, nargs="+", help="number of rows, instead of the default selection")
    made.add_argument("--width", type=int, nargs="+", help="elements of a row, instead of the default selection")
    made.add_argument("--op", nargs="+", choices=OPS, help="operators, instead of the default selection")
    made.add_argument("--output", nargs="+", choices=OUTPUTS, help="quantized outputs; `same` is x's dtype")
    made.add_argument("--dtype", nargs="+", choices=DTYPES, help="dtypes of x")
    made.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    made.add_argument("--no-overlap", action="store_true", help="our kernel without programmatic dependent launch")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    return made


def selected(given: argparse.Namespace) -> list[Case]:
    """The cases that the options name."""
    named = (given.rows, given.width, given.op, given.output, given.dtype)
    if given.all:
        return whole_grid()
    if not any(named):
        if given.tune:
            return tune.tuned_cases()
        if given.check:
            narrow = grid((3,), _CHECKED_WIDTHS)
            return narrow + grid((3,), (4096,), outputs=("same",), dtypes=DTYPES[1:])
        return default_cases()
    rows, widths = (tune.ROWS, tune.WIDTHS) if given.tune else (ROWS, WIDTHS)
    outputs = given.output or (("same",) if given.tune else tuple(OUTPUTS))
    return grid(given.rows or rows, given.width or widths, given.op or OPS, outputs, given.dtype or DTYPES[:1])


@dataclass(frozen=True)
class Run:
    """One run: what was asked for, when it began, and what it is measured on."""

    given: argparse.Namespace
    budget: Budget
    setting: Setting
    title: str

    def write(self, text: str, content: Any) -> None:
        """Write the files that were asked for; what they were before is replaced."""
        if self.given.markdown is not None:
            self.given.markdown.write_text(f"{self.title}\n\n{text}\n", encoding="utf-8")
        if self.given.json is not None:
            found = {"device": self.title, **table.as_json(content)}
            self.given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    began = time.perf_counter()
    given = parser().parse_args(arguments)
    cases = selected(given)
    with compiling_processes() as compile_all:
        if not torch.cuda.is_available():
            print("benchmarks.kernel requires an NVIDIA GPU and the CUDA build of torch.", file=sys.stderr)
            return 4
        try:
            setting = _setting(given, cases, compile_all)
        except EnvironmentMissingError as error:
            print(error, file=sys.stderr)
            return 4
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"{title}\n{len(setting.compiled)} kernels compiled after {time.perf_counter() - began:.0f} s", flush=True)
    run = Run(given, Budget(given.seconds, began), setting, title)
    if given.tune:
        return _tune(run, cases)
    return _check(run, cases) if given.check else _measure(run, cases)


def _setting(given: argparse.Namespace, cases: Sequence[Case], compile_all: Compile) -> Setting:
    gpu: Gpu = this_gpu()
    if given.tune:
        compiled = compile_all(work for case in cases for work in tune.works(case, gpu))
    else:
        compiled = compile_all(gpu.work(case) for case in cases)
    torch.manual_seed(0)
    found = [] if given.tune or given.check else peers(not given.no_compile)[0]
    return Setting(gpu, compiled, flushed_tensor(), found, not given.no_overlap)


def _measure(run: Run, cases: Sequence[Case]) -> int:
    versions = {peer.name: peer.version for peer in run.setting.peers}
    missing = peers(not run.given.no_compile)[1]
    bandwidth = copy_bandwidth(run.setting.flushed)
    notes = f"A copy of 2 GiB: {bandwidth:.2f} TB/s."
    notes += f" Not installed: {', '.join(missing)}." if missing else ""
    notes += " Times are microseconds. `-`: the peer has no such operator."
    print(f"{notes}\n\n{table.rows_table([], versions)}", flush=True)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []

    def write(left: Sequence[Case]) -> str:
        """Write the files, whole after every row, and return what is printed last."""
        last = table.conclusion(rows, bandwidth, left, failed)
        content = {
            "bandwidth": bandwidth, "peers": versions, "missing": missing, "rows": rows, "failed": failed,
            "left": [case.name for case in left], "losses": table.losses(rows, bandwidth),
        }  # fmt: skip
        run.write(f"{notes}\n\n{table.rows_table(rows, versions)}\n\n{last}", content)
        return last

    began = time.perf_counter()
    for index, case in enumerate(run.budget.given(cases)):
        started = time.perf_counter()
        try:
            row = measured(case, run.setting)
        except Exception as error:  # the other rows are still measured
            failed.append(f"{case.name}: {reason_of(error)}")
            print(f"{failed[-1]}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        rows.append({**row, "seconds": time.perf_counter() - started})
        print(table.row_line(row), flush=True)
        write(cases[index + 1 :])
    last = write(run.budget.left)
    wrong = [row for row in rows if row["problem"]]
    print(f"\n{len(rows)} of {len(cases)} rows in {time.perf_counter() - began:.0f} s\n\n{last}", flush=True)
    return 1 if wrong or failed else 0


def _check(run: Run, cases: Sequence[Case]) -> int:
    wrong, count = [], 0
    for case in run.budget.given(cases):
        found = checked(case, run.setting)
        count += 1
        print(f"{case.name}: error {found.error:.2f} {found.problem}".rstrip(), flush=True)
        wrong += [f"{case.name}: {found.problem}"] if found.problem else []
    left = [case.name for case in run.budget.left]
    text = f"{table.listed('Wrong', wrong, f'None of {count}.')}\n\n{table.listed('Not checked', left, 'None.')}"
    run.write(text, {"wrong": wrong, "left": left, "checked": count})
    print(f"\n{text}", flush=True)
    return 1 if wrong else 0


def _tune(run: Run, cases: Sequence[Case]) -> int:
    rows: list[dict[str, Any]] = []
    lines = [tune.HEAD, "|" + "---|" * (tune.HEAD.count("|") - 1)]
    print("\n".join(lines), flush=True)
    for case in run.budget.given(cases):
        rows.append(tune.tuned(case, run.setting))
        lines.append(tune.line(rows[-1]))
        print(lines[-1], flush=True)
        torch.cuda.empty_cache()
    left = [case.name for case in run.budget.left]
    wrong = [
        f"{row['op']} {row['rows']}x{row['width']} {name}: {why}" for row in rows for name, why in row["wrong"].items()
    ]
    found = tune.rule_losses(rows)
    last = "\n\n".join([
        table.listed("Not measured", left, "Every row was measured."),
        table.listed("Wrong", wrong, "Every result is accurate."),
        table.listed("The rule loses more than 3%", found, f"In none of {len(rows)} rows."),
    ])  # fmt: skip
    run.write("\n".join(lines) + f"\n\n{last}", {"rows": rows, "left": left, "losses": found})
    print(f"\n{last}", flush=True)
    return 1 if wrong else 0
