"""Run the rewriter on damaged ONNX files: it must write a file with the same outputs, or refuse with a clear error.

    python -m benchmarks.fuzz_rewrite --seconds 600 --seed 0 --out fuzz

Small valid models are damaged (bytes, lengths, nodes, edges, names, attributes, tensors, types), read, checked,
rewritten for every target in turn, and written. If both the damaged and the rewritten file run in ONNX Runtime, their
outputs must be equal up to rounding. Any other exception, a changed input file, different outputs, or a case that takes
more than ten seconds is a crash: its file and the traceback are written to the output folder, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort

from rmsnorm_deploy.export.lowering.table import TARGETS

from .damage import damaged
from .judging import judged
from .sound_models import sound_models

MEMORY = 6 << 30  # bytes of address space: a case that allocates more fails and does not exhaust the machine


@dataclass
class Outcomes:
    """The number of cases by outcome, and the files of crashes."""

    counts: Counter[str] = field(default_factory=Counter)
    crashes: dict[str, Path] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{count:8} {name}" for name, count in self.counts.most_common()]
        return "\n".join([*lines, *(f"CRASH {what}\n      {path}" for what, path in self.crashes.items())])


def fuzz(seed: int, out: Path, more: Callable[[int], bool]) -> Outcomes:
    """Run cases while `more(number of cases)` is true; crashes are written to `out`, one file for each kind."""
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)
    ort.set_default_logger_severity(4)
    outcomes, sound = Outcomes(), sound_models()
    number = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while more(number):
            chance = random.Random(f"{seed}/{number}")
            data = damaged(chance, sound[number % len(sound)])
            target = TARGETS[number // len(sound) % len(TARGETS)]
            number += 1
            try:
                outcomes.counts[judged(data, target, Path(folder), seed)] += 1
            except Exception as error:
                outcomes.counts["crash"] += 1
                what = _kind(error, target)
                if what not in outcomes.crashes:
                    out.mkdir(parents=True, exist_ok=True)
                    outcomes.crashes[what] = out / f"crash-{seed}-{number - 1}-{target}.onnx"
                    outcomes.crashes[what].write_bytes(data)
                    outcomes.crashes[what].with_suffix(".txt").write_text(traceback.format_exc())
    return outcomes


def _kind(error: Exception, target: str) -> str:
    """The kind of a crash: cases that fail at the same place are of one kind."""
    place = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/export/" in f.filename), None)
    where = f" at {Path(place.filename).name}:{place.lineno}" if place is not None else ""
    text = str(error).splitlines()[0][:160] if str(error) else ""
    return (
        f"{type(error).__name__}{where} ({target}): {text}" if not where else f"{type(error).__name__}{where}: {text}"
    )


def main() -> int:
    arguments = argparse.ArgumentParser(
        "python -m benchmarks.fuzz_rewrite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, default=Path("fuzz"), help="folder for files that crash")
    given = arguments.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    end = time.monotonic() + given.seconds
    outcomes = fuzz(given.seed, given.out, lambda _: time.monotonic() < end)
    print(outcomes)
    return 1 if outcomes.crashes else 0
