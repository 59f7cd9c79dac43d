"""How much worse than PyTorch an output may be: one row for each dtype, with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How much worse than PyTorch an output of one dtype may be; errors in units of eps x max(|truth|, row RMS).

    A candidate passes when `max <= factor_max * PyTorch's max + floor_max` and the same holds for the root mean
    square. Both factors are widened for outputs of few elements, see `small_sample`.
    """

    dtype: str
    factor_max: float
    floor_max: float
    factor_rms: float
    floor_rms: float
    reason: str


_HALF = (
    "Two correct evaluations differ in the order of their sums and in where they fuse, so their errors are independent "
    "and of one size: over 1000 Gaussian errors the larger maximum exceeds 1.75 times the smaller once in 10000 pairs "
    "(1.1 times for the root mean square). The rest covers errors that go together within a row. Runtimes accumulate "
    "in float32 as PyTorch does, or wider: Llama-shaped models of 2 to 8 layers ran in ONNX Runtime on CPU with 0.2 "
    "to 0.7 of PyTorch's float16 error. The floors are four roundings of the output at worst, and two on average."
)

TOLERANCES: dict[str, Tolerance] = {
    row.dtype: row
    for row in (
        Tolerance("float16", 2.0, 2.0, 1.5, 0.5, _HALF),
        Tolerance("bfloat16", 2.0, 2.0, 1.5, 0.5, "As float16: the same accumulation, and errors are counted in eps."),
        Tolerance(
            "float32",
            3.0,
            32.0,
            2.0,
            2.0,
            "Here the summation itself is what differs: Llama-shaped models of 2 to 8 layers ran in ONNX Runtime on "
            "CPU with 0.8 to 1.6 times PyTorch's largest error and 1.0 to 1.3 times its root mean square. The floors "
            "are for single norms: ONNX Runtime sums squares in plain order, and one outlier among 4096 channels costs "
            "it up to 20 units (0.3 rms) where PyTorch's cascade loses 2 (0.1 rms). 32 units are 4e-6 of the scale.",
        ),
        Tolerance(
            "float64",
            3.0,
            1024.0,
            2.0,
            256.0,
            "The truth is computed in float64 too, so its own error, a few hundred eps in a deep model, is the limit "
            "of what can be told. 1024 units are 2e-13 of the scale, far below anything that a float32 step leaves.",
        ),
    )
}


def small_sample(count: int) -> float:
    """By how much the allowed ratio to PyTorch's error grows when only `count` independent errors are compared.

    The logarithm of the ratio of two root mean squares over n independent errors of one size has a standard deviation
    of 1 / sqrt(n); 3.7 of them leave one false alarm in 10000. It is 1.06 for 4096 errors, 2.5 for 16, 40 for one.
    """
    return math.exp(3.7 / math.sqrt(max(count, 1)))
