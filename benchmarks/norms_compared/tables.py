"""The tables of `python -m benchmarks.norms_compared`, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .training import TrainingOptions
from .variants import Variant

FLOAT16_MAX = 65504.0


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the smallest and the largest in parentheses where they differ."""
    low, middle, high = (format(value, form) for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def training_table(rows: Mapping[Variant, list[dict[str, Any]]], options: TrainingOptions) -> str:
    marks = [f"loss at {mark}" for mark in options.marks]
    above = f"steps with a gradient above {options.threshold:g}"
    head = ["variant", "held-out sums solved", *marks, "largest gradient", above]
    return table(
        head,
        (
            [
                str(variant),
                spread([row["accuracy"] for row in each], ".1%"),
                *(spread([row["losses"][index] for row in each], ".3f") for index in range(len(marks))),
                spread([row["largest gradient"] for row in each], ".1f"),
                spread([row["steps above"] for row in each], ".0f"),
            ]
            for variant, each in rows.items()
        ),
    )


def high_table(rows: Mapping[Variant, list[dict[str, Any]]]) -> str:
    figures = {"high loss": ".2f", "high largest loss": ".1f", "high largest gradient": ".1f"}
    return table(
        ["variant", "runs with a loss that is not finite", "last loss", "largest loss", "largest gradient"],
        (
            [
                str(variant),
                f"{sum(not row['high finite'] for row in each)} of {len(each)}",
                *(spread([row[key] for row in each], form) for key, form in figures.items()),
            ]
            for variant, each in rows.items()
        ),
    )


def range_table(rows: Mapping[Variant, list[dict[str, Any]]]) -> str:
    """The largest values before and after training, in float32."""
    columns = [
        (f"{key}, {name}", key, when)
        for key in ("residual stream", "norm input")
        for name, when in (("untrained", "untrained"), ("trained", "observed"))
    ]
    return table(
        ["variant", *(name for name, _, _ in columns)],
        (
            [str(variant), *(spread([row[when][key] for row in each], ".1f") for _, key, when in columns)]
            for variant, each in rows.items()
        ),
    )


def room_table(rows: Mapping[Variant, list[dict[str, Any]]]) -> str:
    """How many times the largest number of float16 is the largest value of the trained model."""
    keys = ("residual stream", "norm input", "square", "sum of squares", "mean of squares", "sum")

    def room(observed: Sequence[Mapping[str, float]], key: str) -> str:
        if any(key not in values for values in observed):  # RMSNorm computes no sum of x
            return "-"
        return spread([FLOAT16_MAX / values[key] for values in observed], ".0f")

    return table(
        ["variant", *keys],
        (
            [str(variant), *(room([row["observed"] for row in each], key) for key in keys)]
            for variant, each in rows.items()
        ),
    )


def torch_table(shapes: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]) -> str:
    return table(
        ["rows x width", "module", "forward us", "ratio", "backward us", "ratio"],
        (
            [
                shape,
                name,
                *(
                    text
                    for way in ("forward", "backward")
                    for text in (f"{found[way][name][0] * 1e6:.1f}", f"{found[way][name][1]:.2f}")
                ),
            ]
            for shape, found in shapes.items()
            for name in found["forward"]
        ),
    )


def ort_table(kind: str, shapes: Mapping[str, Mapping[Any, Mapping[str, Any]]]) -> str:
    """Times in ONNX Runtime; with the errors of the logits for models."""
    with_error = any("off" in row for rows in shapes.values() for row in rows.values())
    return table(
        [kind, "file", "us", "ratio", "operators of norms", *(["logits off by"] if with_error else [])],
        (
            [
                shape,
                str(way),
                f"{row['seconds'] * 1e6:.1f}",
                f"{row['ratio']:.3f}",
                row["kernels"],
                *([f"{row['off']:.1e}"] if with_error else []),
            ]
            for shape, rows in shapes.items()
            for way, row in rows.items()
        ),
    )
