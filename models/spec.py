"""NormSpec: the one definition of what a norm computes, named by meaning and never by model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, assert_never, get_args

from .errors import UsageError

Scale = Literal["none", "weight", "one_plus_weight"]
Order = Literal["scale_then_cast", "cast_then_scale", "no_upcast", "cast_factor"]
Statistics = Literal["float32", "promoted", "input"]
Root = Literal["rsqrt", "sqrt", "reciprocal"]
Reduction = Literal["mean", "sum"]
Gate = Literal["none", "before", "after"]
Activation = Literal["none", "silu", "sigmoid"]

_SCALE_TEXTS: dict[Scale, str] = {"none": "no weight", "weight": "weight", "one_plus_weight": "1 + weight"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "scale": get_args(Scale),
    "order": get_args(Order),
    "statistics": get_args(Statistics),
    "root": get_args(Root),
    "reduction": get_args(Reduction),
    "gate": get_args(Gate),
    "activation": get_args(Activation),
}
_KINDS: dict[str, type | UnionType] = {
    "trailing_dims": int,
    "group_size": int | None,
    "bias": bool,
    "offset_in_float32": bool,
}


def reads_weight(scale: Scale) -> bool:
    """Whether a norm with this scale reads a weight."""
    match scale:
        case "none":
            return False
        case "weight" | "one_plus_weight":
            return True
        case _:
            assert_never(scale)


def reads_gate(gate: Gate) -> bool:
    """Whether a norm with this kind of gate reads one."""
    match gate:
        case "none":
            return False
        case "before" | "after":
            return True
        case _:
            assert_never(gate)


@dataclass(frozen=True, slots=True)
class NormSpec:
    """What one RMSNorm computes, including the order of its roundings.

    With S the statistics dtype, D the dtype of x and `factor = 1 / sqrt(reduce(x^2) + eps)` in S::

        h = x in S                       (h = h * act(gate in S) when gate == "before")
        h = h * factor                   (over the last `trailing_dims` dims, or groups of `group_size`)
        scale_then_cast:  y = cast(h * scale + bias, D)
        cast_then_scale:  y = cast(h, D) * scale + bias
        cast_factor:      y = cast(x in S, D) * cast(factor, D) * scale + bias
        no_upcast:        S is D throughout: nothing is cast at all
        y = cast(y * act(gate in S), D)  (when gate == "after"; before the cast of scale_then_cast)

    Where two dtypes meet, PyTorch's type promotion decides.

    Attributes:
        eps: added to the mean (or sum) of squares, inside the root. Always resolved, never None.
        trailing_dims: how many trailing dims of x are normalized together.
        scale: no scale, the weight, or 1 + weight.
        order: where the cast back to x's dtype happens, see above.
        statistics: dtype of the sum of squares: `float32` always, `promoted` (float32, or float64 for a float64 x),
            or `input` (x's own dtype, only with `no_upcast`).
        root: `rsqrt` multiplies by rsqrt(.), `sqrt` divides by sqrt(.), `reciprocal` multiplies by 1 / sqrt(.). They
            differ in the last bit only.
        reduction: `mean` of the squares (RMS norm) or their `sum` (L2 norm with eps inside the root).
        group_size: the last dim is split into groups of this many elements, each normalized separately.
        gate: a second input multiplies before the norm, after it, or not at all.
        activation: the function applied to the gate in S.
        bias: whether a bias is added after the scale.
        offset_in_float32: `one_plus_weight` adds 1 in S (True) or in the weight's own dtype (False).
    """

    eps: float
    trailing_dims: int = 1
    scale: Scale = "weight"
    order: Order = "scale_then_cast"
    statistics: Statistics = "float32"
    root: Root = "rsqrt"
    reduction: Reduction = "mean"
    group_size: int | None = None
    gate: Gate = "none"
    activation: Activation = "none"
    bias: bool = False
    offset_in_float32: bool = True

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"NormSpec.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if not (isinstance(self.eps, int | float) and self.eps >= 0):
            raise UsageError(f"NormSpec.eps is {self.eps!r}; it must be a number of at least 0.")
        for name, kind in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise UsageError(
                    f"NormSpec.{name}: expected {getattr(kind, '__name__', kind)}, got {getattr(self, name)!r}."
                )
        if self.trailing_dims < 1:
            raise UsageError(f"NormSpec.trailing_dims is {self.trailing_dims}; it must be at least 1.")
        if self.group_size is not None and (self.group_size < 1 or self.trailing_dims != 1):
            raise UsageError("NormSpec.group_size must be at least 1, and requires trailing_dims to be 1.")
        if (self.gate == "none") != (self.activation == "none"):
            raise UsageError("NormSpec.gate and NormSpec.activation must both be given, or neither.")
        if (self.order == "no_upcast") != (self.statistics == "input"):
            raise UsageError("NormSpec.order 'no_upcast' and NormSpec.statistics 'input' require each other.")

    @property
    def has_weight(self) -> bool:
        """Whether the norm reads a weight."""
        return reads_weight(self.scale)

    @property
    def scale_offset(self) -> float:
        """The number added to the weight before it multiplies."""
        match self.scale:
            case "none" | "weight":
                return 0.0
            case "one_plus_weight":
                return 1.0
            case _:
                assert_never(self.scale)

    @property
    def has_gate(self) -> bool:
        """Whether the norm reads a gate."""
        return reads_gate(self.gate)

    @property
    def has_mean(self) -> bool:
        """Whether the sum of squares is divided by their number."""
        match self.reduction:
            case "mean":
                return True
            case "sum":
                return False
            case _:
                assert_never(self.reduction)

    @property
    def sums_in_half(self) -> bool:
        """Whether the statistics of an x of a half dtype have that dtype."""
        match self.statistics:
            case "float32" | "promoted":
                return False
            case "input":
                return True
            case _:
                assert_never(self.statistics)

    @property
    def sums_in_double(self) -> bool:
        """Whether the statistics of a float64 x are float64."""
        match self.statistics:
            case "float32":
                return False
            case "promoted" | "input":
                return True
            case _:
                assert_never(self.statistics)

    @property
    def follows_weight(self) -> bool:
        """Whether a weight wider than x makes the result wider, because no cast follows the multiplication by it."""
        match self.gate:
            case "after":
                return False
            case "none" | "before":
                pass
            case _:
                assert_never(self.gate)
        match self.order:
            case "scale_then_cast":
                return False
            case "cast_then_scale" | "cast_factor" | "no_upcast":
                return True
            case _:
                assert_never(self.order)

    def replace(self, **changes: Any) -> NormSpec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NormSpec:
        """The spec written by `to_dict`.

        Raises:
            UsageError: a field is unknown or has an invalid value.
        """
        if not isinstance(values, dict) or "eps" not in values:
            raise UsageError(f"not a NormSpec: {str(values)[:80]!r}; it must be an object with at least eps.")
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise UsageError(f"unknown NormSpec fields: {', '.join(sorted(unknown))}; expected those of this version.")
        return cls(**values)

    def to_json(self) -> str:
        """One line of JSON with sorted keys: equal specs give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> NormSpec:
        """The spec written by `to_json`.

        Raises:
            UsageError: the text is not a spec.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"not a NormSpec: {text[:80]!r} ({error})") from error
        return cls.from_dict(values)

    def describe(self) -> str:
        """A short readable line, such as `weight, cast-then-scale, eps 1e-06`."""
        parts = [_SCALE_TEXTS[self.scale]]
        parts.append(self.order.replace("_", "-"))
        parts.append(f"eps {self.eps:.3g}")
        if self.trailing_dims != 1:
            parts.append(f"last {self.trailing_dims} dims")
        if self.group_size is not None:
            parts.append(f"groups of {self.group_size}")
        if self.has_gate:
            parts.append(f"{self.activation} gate {self.gate}")
        if self.bias:
            parts.append("bias")
        if not self.has_mean:
            parts.append("sum (L2)")
        return ", ".join(parts)
