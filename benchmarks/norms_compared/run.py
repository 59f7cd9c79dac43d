"""Compare RMSNorm with LayerNorm, each before and behind the block: training, range, room in float16, and time.

The readable decoder (`models/builtin`) learns to add numbers in four variants that differ in their norms alone: the
seeds, the first weights and the problems are the same. Each is then observed in float32 on held-out problems, trained
once more at a high rate without warm-up and clipping, exported, and timed in ONNX Runtime. A norm alone is timed in
PyTorch and in ONNX Runtime. Times are medians of rounds in rotating order, and ratios are medians of ratios in a round;
they are CPU time with one thread, and else the time that passed.

    python -m benchmarks.norms_compared                  # the tables, in about a quarter of an hour
    python -m benchmarks.norms_compared --quick          # a look at all of them in a minute; the models learn nothing
    python -m benchmarks.norms_compared --json out.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rmsnorm_deploy.models.builtin.decoder import Decoder

from .tables import high_table, ort_table, range_table, room_table, torch_table, training_table
from .times import models_in_ort, norm_in_ort, norm_in_torch
from .training import TrainingOptions, train_all
from .variants import CONFIG, VARIANTS, WIDE, Variant, build

PARTS = ("training", "norms", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(TrainingOptions):
    """What is measured.

    Attributes:
        rounds: timed rounds.
        threads: threads of PyTorch and of ONNX Runtime.
        shapes: rows and width of the norms that are timed alone.
        calls: batch and tokens of the model's steps that are timed.
        wide: time the steps of wide decoders too.
        parts: what is measured, of `PARTS`; decoders that were not trained have random weights.
    """

    rounds: int = 21
    threads: int = 1
    shapes: Sequence[tuple[int, int]] = ((1, 1024), (128, 1024), (512, 4096))
    calls: Sequence[tuple[int, int]] = ((1, 1), (1, 128))
    wide: bool = True
    parts: Sequence[str] = PARTS


QUICK = Options(
    steps=4, high_steps=4, seeds=1, problems=64, rounds=5, shapes=((1, 1024),), calls=((1, 1),), wide=False
)  # fmt: skip


def measure(options: Options) -> dict[str, Any]:
    """Measure everything, and print each table as soon as it is known."""
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    models = {variant: build(variant, CONFIG, seed=0) for variant in VARIANTS}
    if "training" in options.parts:
        trained, models = train_all(options)
        show_training(trained, options)
        found["training"] = {str(variant): rows for variant, rows in trained.items()}
    if "norms" in options.parts:
        found |= measure_norms(options)
    if "steps" in options.parts:
        found["step in ONNX Runtime"] = measure_steps(models, options)
    return found


def show_training(trained: Mapping[Variant, list[dict[str, Any]]], options: Options) -> None:
    show(
        f"Training, {options.steps} steps, {options.seeds} seeds: median (smallest to largest)",
        training_table(trained, options),
    )
    show(
        f"A learning rate of {options.high_rate:g} without warm-up and clipping, {options.high_steps} steps",
        high_table(trained),
    )
    show("Largest absolute values in float32", range_table(trained))
    show("Room in float16 after training: 65504 by the largest value", room_table(trained))


def measure_norms(options: Options) -> dict[str, Any]:
    """Times of a norm alone, by its rows and width."""
    in_torch = {f"{rows} x {width}": norm_in_torch(rows, width, options.rounds) for rows, width in options.shapes}
    show("A norm alone in PyTorch", torch_table(in_torch))
    in_ort = {
        f"{rows} x {width}": norm_in_ort(rows, width, options.rounds, options.threads) for rows, width in options.shapes
    }
    show("A norm alone in ONNX Runtime", ort_table("rows x width", in_ort))
    return {"norm in PyTorch": in_torch, "norm in ONNX Runtime": in_ort}


def measure_steps(models: Mapping[Variant, Decoder], options: Options) -> dict[str, Any]:
    """Times of whole models, by their size, their inputs and their variant."""
    decoders = {"decoders of the addition task": models}
    if options.wide:
        name = f"decoders of width {WIDE.hidden_size} and {WIDE.num_layers} layers, with random weights"
        decoders[name] = {variant: build(variant, WIDE, seed=0) for variant in VARIANTS}
    found = {}
    for name, several in decoders.items():
        steps = models_in_ort(several, options.calls, options.rounds, options.threads)
        show(f"A step in ONNX Runtime: {name}", ort_table("inputs", steps))
        found[name] = {call: {str(variant): row for variant, row in rows.items()} for call, rows in steps.items()}
    return found


def show(title: str, text: str) -> None:
    print(f"## {title}\n\n{text}\n", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.norms_compared", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Options()
    parser.add_argument("--steps", type=_positive, default=default.steps, help="of each training (%(default)s)")
    parser.add_argument(
        "--high-steps", type=_positive, default=default.high_steps, help="at the high rate (%(default)s)"
    )
    parser.add_argument("--seeds", type=_positive, default=default.seeds, help="trainings of a variant (%(default)s)")
    parser.add_argument("--problems", type=_positive, default=default.problems, help="held-out sums (%(default)s)")
    parser.add_argument("--high", type=_above_zero, default=default.high, help="high rate, in peak rates (%(default)s)")
    parser.add_argument(
        "--clip", type=_above_zero, default=default.clip, help="largest norm of a gradient (%(default)s)"
    )
    parser.add_argument(
        "--threshold", type=_above_zero, default=default.threshold, help="norm above which steps count (%(default)s)"
    )
    parser.add_argument("--rounds", type=_positive, default=default.rounds, help="timed rounds (%(default)s)")
    parser.add_argument(
        "--threads", type=_positive, default=default.threads, help="of PyTorch and of ONNX Runtime (%(default)s)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    parser.add_argument(
        "--quick", action="store_true", help="few steps, one seed, one shape, whatever is given for them"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}.")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}.")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 0."""
    given = vars(_parser().parse_args(arguments))
    path, quick = given.pop("json"), given.pop("quick")
    options = replace(QUICK, threads=given["threads"], parts=given["parts"]) if quick else Options(**given)
    results = measure(options)
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n")
    return 0
