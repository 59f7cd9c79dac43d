"""Check that `validate` detects faults without false alarms: plant every fault alone, and validate honest exports.

    python -m benchmarks.mutations                  # all parts, about an hour on two cores
    python -m benchmarks.mutations --faults-only
    python -m benchmarks.mutations --honest-only --runs 40

Each fault must change bits (otherwise it is an error of this suite), `validate` with its default settings must fail,
and `bisect` must name the place of the fault. The exit code is 1 unless all faults are detected and located and every
honest run passes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .catalog import FAMILIES
from .faults import Fault
from .honest import HonestResult, honest_runs, run_honest
from .judging import FaultResult, judge_fault
from .runner_faults import RunnerFault
from .subjects import Exports

QUICK_FAULTS, QUICK_RUNS = 2, 30


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.mutations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--faults-only", action="store_true", help="skip the honest runs")
    only.add_argument("--honest-only", action="store_true", help="skip the faults")
    parser.add_argument(
        "--families", metavar="NAMES", help=f"only these families of faults, by comma: {', '.join(FAMILIES)}"
    )
    parser.add_argument("--quick", action="store_true", help="the first two faults of each family, 30 honest runs")
    parser.add_argument("--runs", type=int, default=400, help="number of honest runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result to this file")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep the exports there, and reuse them")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.families.split(",")] if arguments.families else list(FAMILIES)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        parser.error(f"--families: expected names among {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    chosen = [fault for name in names for fault in FAMILIES[name][: QUICK_FAULTS if arguments.quick else None]]
    torch.set_num_threads(1)  # small models are slower on more
    with _work(arguments.work) as folder:
        exports = Exports(folder)
        faults = [] if arguments.honest_only else judge_all(exports, chosen)
        honest = [] if arguments.faults_only else run_all(exports, QUICK_RUNS if arguments.quick else arguments.runs)
    if arguments.json:
        content = {"faults": [r.to_dict() for r in faults], "honest": [r.to_dict() for r in honest]}
        partial = arguments.json.with_name(f".{arguments.json.name}.partial")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(arguments.json)
    for line in (*_missed(faults), *_alarms(honest), *family_table(faults), *totals(faults, honest)):
        print(line)
    return 0 if all(r.good for r in faults) and all(r.passed for r in honest) else 1


def judge_all(exports: Exports, faults: Sequence[Fault | RunnerFault]) -> list[FaultResult]:
    """Judge every fault; each is a row of a table."""
    print("| family | fault | model | target | dtype | alive | validate | bisect named | innocents | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    results = []
    for fault in faults:
        result = judge_fault(fault, exports)
        results.append(result)
        place = "" if result.kind == "norm" else f" ({result.kind})"
        named = ("yes" if result.named else "NO") + place if result.wanted else "-"
        cells = (
            result.family,
            result.fault,
            result.model,
            result.target,
            result.dtype,
            result.alive,
            result.verdict,
            named,
        )
        print(f"| {' | '.join(cells)} | {len(result.innocents)} | {result.seconds} |", flush=True)
    return results


def run_all(exports: Exports, runs: int) -> list[HonestResult]:
    """Run honest exports; prints how many passed, by model and dtype."""
    results = []
    for number, run in enumerate(honest_runs(runs), start=1):
        results.append(run_honest(run, exports))
        last = results[-1]
        alarm = "" if last.passed else f": FALSE ALARM {last.summary} {'; '.join(last.reasons)}"
        name = f"{last.model} {last.dtype} {last.target} seed {last.seed}"
        print(f"honest run {number} of {runs}: {name}{alarm}", flush=True)
    total = Counter((r.model, r.dtype) for r in results)
    passed = Counter((r.model, r.dtype) for r in results if r.passed)
    print("\n| model | dtype | runs | passed |\n|---|---|---|---|")
    for (model, dtype), count in total.items():
        print(f"| {model} | {dtype} | {count} | {passed[model, dtype]} |", flush=True)
    return results


def family_table(faults: Sequence[FaultResult]) -> list[str]:
    """For each family: how many faults were detected, of how many that are alive, and which were missed."""
    lines = ["", "| family | detected | alive | missed |", "|---|---|---|---|"] if faults else []
    for family in dict.fromkeys(result.family for result in faults):
        alive = [r for r in faults if r.family == family and r.alive != "dead"]
        missed = ", ".join(f"{r.fault} ({r.model}, {r.target})" for r in alive if not r.caught)
        lines.append(f"| {family} | {sum(r.caught for r in alive)} | {len(alive)} | {missed or '-'} |")
    return lines


def _missed(faults: Sequence[FaultResult]) -> list[str]:
    return [
        f"missed: {r.fault} ({r.model}, {r.target}, {r.dtype}): {r.alive}, {r.verdict}: {r.summary} "
        f"expected {', '.join(r.wanted) or 'no culprit'}, got {', '.join(r.culprits) or 'no culprit'}"
        for r in faults if not r.good
    ]  # fmt: skip


def _alarms(honest: Sequence[HonestResult]) -> list[str]:
    return [
        f"false alarm: {r.model} {r.dtype} {r.target} seed {r.seed}: {r.summary} {'; '.join(r.reasons)}"
        for r in honest if not r.passed
    ]  # fmt: skip


def totals(faults: Sequence[FaultResult], honest: Sequence[HonestResult]) -> list[str]:
    norms = [r for r in faults if r.wanted and r.kind != "segment"]
    lines = []
    if faults:
        caught, named = sum(r.caught for r in faults), sum(r.named for r in norms)
        lines.append(
            f"caught {caught} of {len(faults)} faults; bisect named the norm or attention in {named} of {len(norms)}"
        )
    if honest:
        lines.append(f"false alarms: {sum(not r.passed for r in honest)} of {len(honest)} honest runs")
    return lines


@contextlib.contextmanager
def _work(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
