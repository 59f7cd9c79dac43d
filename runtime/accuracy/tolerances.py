"""How much worse than PyTorch an output may be: `TOLERANCES`, a row with its reason per dtype, or explicit `Limits`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...models.errors import UsageError

# The name that covers every output without limits of its own.
EVERY_OUTPUT = "*"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How much worse than PyTorch an output of one dtype may be; errors in units of eps x max(|reference|, row RMS).

    A candidate passes if `max <= factor_max * PyTorch's max + floor_max` and the same holds for the root mean
    square. Both factors are larger for outputs of few elements, see `small_sample`.
    """

    dtype: str
    factor_max: float
    floor_max: float
    factor_rms: float
    floor_rms: float
    reason: str


_HALF = (
    "Two correct evaluations differ in summation order and in fused operations, so their errors are independent and of "
    "similar size: over 1000 Gaussian errors the larger maximum exceeds 1.75 times the smaller once in 10000 pairs "
    "(1.1 times for the root mean square). The rest covers correlated errors within a row. Runtimes accumulate "
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
            "Summation order dominates in float32: Llama-shaped models of 2 to 8 layers ran in ONNX Runtime on "
            "CPU with 0.8 to 1.6 times PyTorch's largest error and 1.0 to 1.3 times its root mean square. The floors "
            "are for single norms: ONNX Runtime sums squares sequentially, and one outlier among 4096 channels causes "
            "up to 20 units (0.3 rms), PyTorch's cascade summation 2 (0.1 rms). 32 units are 4e-6 of the scale.",
        ),
        Tolerance(
            "float64",
            3.0,
            1024.0,
            2.0,
            256.0,
            "The reference is computed in float64 too, so its own error, a few hundred eps in a deep model, limits "
            "what can be measured. 1024 units are 2e-13 of the scale, far below the error of any float32 step.",
        ),
    )
}


def small_sample(count: int) -> float:
    """The factor by which the allowed ratio to PyTorch's error grows if only `count` independent errors are compared.

    The logarithm of the ratio of two root mean squares over n independent errors of one size has a standard deviation
    of 1 / sqrt(n); 3.7 of them give one false alarm in 10000. It is 1.06 for 4096 errors, 2.5 for 16, 40 for one.
    """
    return math.exp(3.7 / math.sqrt(max(count, 1)))


@dataclass(frozen=True, slots=True)
class Limits:
    """Explicit limits on the errors of an output, which replace the table; None means no limit of that kind.

    Every element must have `|error| <= atol + rtol * |reference|` if atol or rtol is given (the other is 0 then), and
    an error of at most `ulp` ULPs of the candidate's dtype if that is given.

    Raises:
        UsageError: a limit is negative or NaN.
    """

    atol: float | None = None
    rtol: float | None = None
    ulp: float | None = None

    def __post_init__(self) -> None:
        for label, value in (("atol", self.atol), ("rtol", self.rtol), ("ulp", self.ulp)):
            if value is not None and not value >= 0.0:
                raise UsageError(f"{label}: expected a number of at least 0, got {value}.")

    @property
    def is_absolute(self) -> bool:
        """Whether the absolute size of errors is limited."""
        return self.atol is not None or self.rtol is not None

    @property
    def is_set(self) -> bool:
        """Whether there is any limit."""
        return self.is_absolute or self.ulp is not None

    def describe(self) -> str:
        """The limits as a formula."""
        parts = [f"|error| <= {self.atol or 0.0:g} + {self.rtol or 0.0:g} x |reference|"] if self.is_absolute else []
        parts += [f"ULP error <= {self.ulp:g}"] if self.ulp is not None else []
        return " and ".join(parts)


def parse_limits(atol: Sequence[str], rtol: Sequence[str], ulp: Sequence[str]) -> dict[str, Limits]:
    """Parse limits by output.

    Each text is a number for every output, such as `1e-3`, or one for a single output, such as `logits:1e-3`, split at
    the last colon. An output without a limit of some kind takes the limit of that kind for every output.

    Returns:
        Limits by the name of the output, those for every output under `*`; see `limits_of`. Empty without any texts.

    Raises:
        UsageError: a text is not of that form, its number is negative or NaN, or one output has two limits of a kind.
    """
    given = {label: _by_output(label, texts) for label, texts in (("atol", atol), ("rtol", rtol), ("ulp", ulp))}
    names = dict.fromkeys(name for by_output in given.values() for name in by_output)
    return {
        name: Limits(**{label: by_output.get(name, by_output.get(EVERY_OUTPUT)) for label, by_output in given.items()})
        for name in names
    }


def limits_of(limits: Mapping[str, Limits], name: str) -> Limits | None:
    """The limits of an output, or None if the tolerance table applies."""
    return limits.get(name, limits.get(EVERY_OUTPUT))


def check_limits(limits: Mapping[str, Limits], names: Iterable[str]) -> None:
    """Reject limits on outputs that do not exist.

    Raises:
        UsageError: an output named in the limits is not among `names`.
    """
    known = list(names)
    unknown = [name for name in limits if name != EVERY_OUTPUT and name not in known]
    if unknown:
        raise UsageError(
            f"limits are given for {', '.join(unknown)}, but there is no such output. The outputs are: "
            f"{', '.join(known) or 'none'}."
        )


def _by_output(label: str, texts: Sequence[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for text in texts:
        name, colon, number = text.rpartition(":")
        name = name if colon else EVERY_OUTPUT
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not value >= 0.0 or not name:
            raise UsageError(f"--{label} {text}: expected a number of at least 0, such as 1e-3 or logits:1e-3.")
        if name in values:
            whose = "every output" if name == EVERY_OUTPUT else name
            raise UsageError(f"--{label} {text}: {whose} already has a limit of this kind; give only one.")
        values[name] = value
    return values
