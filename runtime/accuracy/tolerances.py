"""How much worse than PyTorch an output may be: `TOLERANCES`, a row with its reason per dtype, or explicit `Limits`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...models.errors import UsageError

# The name that covers every output without limits of its own.
EVERY_OUTPUT = "*"
# The names that cover all norms alone, and all segments between norms; an output's name cannot begin with @.
NORMS, SEGMENTS = PARTS = ("@norms", "@segments")


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
class FigureLimit:
    """A limit on a statistic of a whole output.

    Attributes:
        figure: the field of `Figures` that is limited.
        label: its name in reasons.
        at_least: whether the limit is the least value that passes, else the largest.
        logits_only: whether the statistic is defined for logits only.
    """

    figure: str
    label: str
    at_least: bool = False
    logits_only: bool = False


# The limits on statistics, by the field of `Limits`; the others are limits on each element.
FIGURE_LIMITS: dict[str, FigureLimit] = {
    "min_cosine": FigureLimit("cosine", "cosine", at_least=True),
    "min_top1": FigureLimit("top1_agreement", "top-1 agreement", at_least=True, logits_only=True),
    "max_kl": FigureLimit("kl", "KL divergence", logits_only=True),
    "max_rel": FigureLimit("max_rel_row", "largest error / row RMS"),
    "max_rms": FigureLimit("rms_rel_row", "RMS error / row RMS"),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Explicit limits on the errors of an output, which replace the table; None means no limit of that kind.

    Every element must have `|error| <= atol + rtol * |reference|` if atol or rtol is given (the other is 0 then), and
    an error of at most `ulp` ULPs of the candidate's dtype if that is given. The other limits are on statistics of the
    whole output against the reference, see `Figures`.

    Attributes:
        atol, rtol, ulp: limits on the error of each element.
        min_cosine: least cosine similarity, 0 to 1.
        min_top1: least share of rows whose largest logit agrees, 0 to 1; for logits only.
        max_kl: largest mean divergence of the softmax distributions, in nats; for logits only.
        max_rel: largest error of an element divided by the RMS of its row.
        max_rms: largest root mean square, over all rows, of a row's RMS error divided by the row's RMS.

    Raises:
        UsageError: a limit is negative or NaN, or a share or a cosine exceeds 1.
    """

    atol: float | None = None
    rtol: float | None = None
    ulp: float | None = None
    min_cosine: float | None = None
    min_top1: float | None = None
    max_kl: float | None = None
    max_rel: float | None = None
    max_rms: float | None = None

    def __post_init__(self) -> None:
        for label, value in self._given():
            problem = _problem(label, value)
            if problem:
                raise UsageError(f"{label}: {problem}, got {value}.")

    @property
    def is_absolute(self) -> bool:
        """Whether the absolute size of errors is limited."""
        return self.atol is not None or self.rtol is not None

    @property
    def is_set(self) -> bool:
        """Whether there is any limit."""
        return bool(self._given())

    @property
    def on_elements(self) -> bool:
        """Whether the error of each element is limited."""
        return self.is_absolute or self.ulp is not None

    @property
    def on_figures(self) -> dict[str, float]:
        """The limits on statistics, by field."""
        return {label: value for label, value in self._given() if label in FIGURE_LIMITS}

    @property
    def on_logits(self) -> list[str]:
        """The fields that limit statistics of logits."""
        return [label for label in self.on_figures if FIGURE_LIMITS[label].logits_only]

    def without_logits(self) -> Limits:
        """The limits that apply to outputs that are not logits."""
        return dataclasses.replace(self, **dict.fromkeys(self.on_logits))

    def over(self, base: Limits) -> Limits:
        """These limits, and those of `base` where there is none of that kind here."""
        return dataclasses.replace(base, **dict(self._given()))

    def describe(self) -> str:
        """The limits on elements as a formula."""
        parts = [f"|error| <= {self.atol or 0.0:g} + {self.rtol or 0.0:g} x |reference|"] if self.is_absolute else []
        parts += [f"ULP error <= {self.ulp:g}"] if self.ulp is not None else []
        return " and ".join(parts)

    def _given(self) -> list[tuple[str, float]]:
        pairs = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return [(label, value) for label, value in pairs if value is not None]


KINDS_OF_LIMITS = tuple(field.name for field in dataclasses.fields(Limits))


def parse_limits(
    atol: Sequence[str] = (), rtol: Sequence[str] = (), ulp: Sequence[str] = (), **others: Sequence[str]
) -> dict[str, Limits]:
    """Parse limits by output.

    Each text is a number for every output, such as `1e-3`, or one for a single output, such as `logits:1e-3`, split at
    the last colon. An output without a limit of some kind takes the limit of that kind for every output; `@norms` and
    `@segments` take none, and only outputs that are logits by their name take limits on logits.

    Args:
        atol: texts of that kind.
        rtol: as above.
        ulp: as above.
        others: texts of the other kinds, by the field of `Limits`.

    Returns:
        Limits by the name of the output, those for every output under `*`; see `limits_of`. Empty without any texts.

    Raises:
        UsageError: a text is not of that form, its number is out of range, or one output has two limits of a kind.
    """
    texts = {"atol": atol, "rtol": rtol, "ulp": ulp, **others}
    given = {label: _by_output(label, values) for label, values in texts.items()}
    names = dict.fromkeys(name for by_output in given.values() for name in by_output)
    return with_inherited({name: Limits(**{label: by.get(name) for label, by in given.items()}) for name in names})


def with_inherited(own: Mapping[str, Limits]) -> dict[str, Limits]:
    """Limits by output, each with those for every output (`*`) where it has none of that kind; see `parse_limits`."""
    every = own.get(EVERY_OUTPUT, Limits())
    return {name: limits.over(_inherited(every, name)) for name, limits in own.items()}


def limits_of(limits: Mapping[str, Limits], name: str) -> Limits | None:
    """The limits of an output, or None if the tolerance table applies."""
    if name in limits:
        return limits[name]
    found = _inherited(limits.get(EVERY_OUTPUT, Limits()), name)
    return found if found.is_set else None


def check_limits(limits: Mapping[str, Limits], names: Iterable[str], parts: Iterable[str] = ()) -> None:
    """Reject limits on outputs that do not exist, and limits on logits where there are none.

    Args:
        limits: by output.
        names: the outputs.
        parts: other names that may have limits, such as `PARTS`.

    Raises:
        UsageError: an output named in the limits is not among `names`, or a limit on logits is not on logits.
    """
    known, special = list(names), tuple(parts)
    unknown = [name for name in limits if name not in (EVERY_OUTPUT, *special) and name not in known]
    if unknown:
        more = f" Limits may also be on {' and '.join(special)}." if special else ""
        raise UsageError(
            f"limits are given for {', '.join(unknown)}, but there is no such output. The outputs are: "
            f"{', '.join(known) or 'none'}.{more}"
        )
    for name, given in limits.items():
        found = known if name == EVERY_OUTPUT else [name]
        if given.on_logits and not any(names_logits(output) for output in found):
            raise UsageError(
                f"{_option(given.on_logits[0])}: expected an output that holds logits, whose name ends with 'logits', "
                f"got {', '.join(found) or 'none'}. Remove this limit, or limit the cosine (--min-cosine)."
            )


def names_logits(name: str) -> bool:
    """Whether an output holds class scores by its name: without a suffix that begins with `@` it ends with `logits`."""
    return name.partition("@")[0].endswith("logits")


def _inherited(every: Limits, name: str) -> Limits:
    """The limits that `name` takes from those for every output."""
    if name in PARTS:
        return Limits()
    return every if name == EVERY_OUTPUT or names_logits(name) else every.without_logits()


def _option(label: str) -> str:
    return f"--{label.replace('_', '-')}"


def _problem(label: str, value: float) -> str:
    """What is expected of a limit, if it is out of range; else empty."""
    if label.startswith("min_"):
        return "" if 0.0 <= value <= 1.0 else "expected a number from 0 to 1"
    return "" if value >= 0.0 else "expected a number of at least 0"


def _by_output(label: str, texts: Sequence[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    example = "0.99" if label.startswith("min_") else "1e-3"
    for text in texts:
        name, colon, number = text.rpartition(":")
        name = name if colon else EVERY_OUTPUT
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        problem = _problem(label, value) if name else _problem(label, math.nan)
        if problem:
            raise UsageError(f"{_option(label)} {text}: {problem}, such as {example} or logits:{example}.")
        if name in values:
            whose = "every output" if name == EVERY_OUTPUT else name
            raise UsageError(f"{_option(label)} {text}: {whose} already has a limit of this kind; give only one.")
        values[name] = value
    return values
