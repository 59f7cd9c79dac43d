"""The lowering table: what each target emits for each form of a norm, what that requires, and how exact it is.

Export, `rmsnorm targets`, the table in the README and the tests are generated from it. "Exact" refers to the order of
roundings: an exact cell rounds where the module rounds. Sums in another order still differ in the last bits.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never, get_args

from ...models.dtypes import HALF_DTYPES
from ...models.errors import UnsupportedError, UsageError
from ...models.spec import NormSpec, Order
from ..graph.metadata import Form

Target = Literal["primitives", "standard", "ort", "plugin"]
TARGETS: tuple[Target, ...] = get_args(Target)
# It runs in every runtime from opset 7 on, and ONNX Runtime fuses it.
DEFAULT_TARGET: Target = "primitives"
FORMS: tuple[Form, ...] = get_args(Form)

LOWEST_OPSET = 18
HIGHEST_OPSET = 23
DEFAULT_OPSET = 20


@dataclass(frozen=True, slots=True)
class Deviation:
    """A case in which a cell does not round where the module rounds.

    Attributes:
        order: the order of casts it applies to, or `any`.
        dtypes: the dtypes it applies to.
        runtime: the runtime in which it occurs, or `any`.
        ulp: largest difference from the module's own result, in ULP of the output dtype; None if it has no bound
            because the module itself is inaccurate.
        reason: why the result differs.
    """

    order: Order | Literal["any"]
    dtypes: tuple[str, ...]
    runtime: str
    ulp: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Cell:
    """How one target writes one form.

    Attributes:
        target: the target.
        form: `plain`, or `residual_add` for a residual add in front of the norm whose sum is used elsewhere too.
        emits: the operators, in order.
        opset: lowest opset import of the finished file.
        dtypes: supported dtypes of x.
        runtimes: lowest version of each runtime that runs it.
        deviations: the cases in which it is not exact.
        note: a remark for the reader.
    """

    target: Target
    form: Form
    emits: str
    opset: int
    dtypes: tuple[str, ...]
    runtimes: tuple[tuple[str, str], ...]
    deviations: tuple[Deviation, ...]
    note: str


_HALF_STATISTICS = Deviation(
    "no_upcast",
    HALF_DTYPES,
    "any",
    None,
    "statistics are float32 where the module's are half: more accurate than the module",
)
_ORT_SCALES_FIRST = Deviation(
    "cast_then_scale",
    HALF_DTYPES,
    "onnxruntime",
    1.5,
    "ONNX Runtime multiplies by the weight in float32 and casts once",
)
_FACTOR_NOT_CAST = Deviation("cast_factor", HALF_DTYPES, "any", 1.5, "the factor is not rounded before it multiplies x")
_ORT_FACTOR_NOT_CAST = Deviation(
    "cast_factor", HALF_DTYPES, "onnxruntime", 1.5, "ONNX Runtime may fuse the norm and then does not round the factor"
)
_ROUNDED_EPS = Deviation("any", ("float64",), "any", None, "the operator stores epsilon as float32")
_ALL = ("float32", "float16", "bfloat16", "float64")

# The version with which the tests build engines. Its parser also supports SimplifiedLayerNormalization.
_RTX = ("tensorrt-rtx", "1.7")

# fmt: off
TABLE: tuple[Cell, ...] = (
    Cell("primitives", "plain", "Cast, Pow, ReduceMean, Add, Sqrt, Div, Mul, Cast", 7, _ALL,
         (("onnxruntime", "1.23"), ("tensorrt", "10.7"), _RTX),
         (_ORT_SCALES_FIRST, _ORT_FACTOR_NOT_CAST, _HALF_STATISTICS),
         "the form that ONNX Runtime fuses into one kernel when it loads the file"),
    Cell("primitives", "residual_add", "Add, then as plain", 7, _ALL,
         (("onnxruntime", "1.23"), ("tensorrt", "10.7"), _RTX),
         (_ORT_SCALES_FIRST, _ORT_FACTOR_NOT_CAST, _HALF_STATISTICS),
         "the Add remains: its sum is the second output"),
    Cell("standard", "plain", "RMSNormalization", 23, _ALL,
         (("onnxruntime", "1.23"), ("tensorrt", "10.15"), _RTX),
         (_ORT_SCALES_FIRST, _FACTOR_NOT_CAST, _HALF_STATISTICS, _ROUNDED_EPS),
         "Cast to float32 and back around it where the module scales before it casts"),
    Cell("standard", "residual_add", "Add, RMSNormalization", 23, _ALL,
         (("onnxruntime", "1.23"), ("tensorrt", "10.15"), _RTX),
         (_ORT_SCALES_FIRST, _FACTOR_NOT_CAST, _HALF_STATISTICS, _ROUNDED_EPS),
         "the Add remains: its sum is the second output"),
    Cell("ort", "plain", "SimplifiedLayerNormalization", 7, _ALL,
         (("onnxruntime", "1.23"), _RTX),
         (_ORT_SCALES_FIRST, _FACTOR_NOT_CAST, _HALF_STATISTICS, _ROUNDED_EPS),
         "ONNX Runtime's own fused operator"),
    Cell("ort", "residual_add", "Add, SimplifiedLayerNormalization", 7, _ALL,
         (("onnxruntime", "1.23"), _RTX),
         (_ORT_SCALES_FIRST, _FACTOR_NOT_CAST, _HALF_STATISTICS, _ROUNDED_EPS),
         "SkipSimplifiedLayerNormalization is several times less accurate on the CPU, so it is not written"),
    Cell("plugin", "plain", "rmsnorm_deploy::RMSNorm", 18, ("float32", "float16", "bfloat16"),
         (("tensorrt", "10.7"), _RTX, ("onnxruntime", "1.23")),
         (_ORT_SCALES_FIRST, _FACTOR_NOT_CAST, _HALF_STATISTICS),
         "a local function of the same name contains the primitives, so the file also runs without the plugin"),
    Cell("plugin", "residual_add", "rmsnorm_deploy::AddRMSNorm", 18, ("float32", "float16", "bfloat16"),
         (("tensorrt", "10.7"), _RTX, ("onnxruntime", "1.23")),
         (_ORT_SCALES_FIRST, _FACTOR_NOT_CAST, _HALF_STATISTICS),
         "two outputs: normalized, sum"),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Environment:
    """What the file is written for.

    Attributes:
        opset: the requested opset import, or None for the lowest that the target supports.
        dtype: dtype of x, such as `float16`.
        runtime: `onnxruntime`, `tensorrt`, or None when unknown.
        runtime_version: its version, such as `1.24.1`, or None when unknown.
        top_level: whether the norm is in the main graph, not in a subgraph of a control-flow node.
    """

    opset: int | None = None
    dtype: str = "float32"
    runtime: str | None = None
    runtime_version: str | None = None
    top_level: bool = True


@dataclass(frozen=True, slots=True)
class LoweringRefusal:
    """Why a cell cannot be used, and which target can.

    Attributes:
        target: the requested target.
        reasons: why it cannot be used; never empty.
        nearest: the nearest target that can be used, or None.
    """

    target: str
    reasons: tuple[str, ...]
    nearest: str | None

    def to_error(self) -> UnsupportedError:
        """The refusal as an error, exit code 3."""
        advice = f" Use --target {self.nearest} instead." if self.nearest else ""
        return UnsupportedError(f"target {self.target!r} cannot be used: {'; '.join(self.reasons)}.{advice}")


# Names of runtimes that users give as targets, and which target fits.
_NOT_TARGETS = {
    "tensorrt": "For TensorRT: standard (from 10.15, which fuses these norms by itself), plugin (the kernel of this "
    "package, from 10.7), or primitives (operators that every version has).",
    "onnxruntime": "For ONNX Runtime: ort (its own fused operator), or standard (the operator of ONNX opset 23).",
    "onnx": "For the operator of the ONNX standard, opset 23: standard; for operators of any opset: primitives.",
    "cuda": "A target is the form of the norms, not a device. For ONNX Runtime on CUDA: ort; for TensorRT: standard or "
    "plugin. The device is chosen when the file runs (--provider cuda).",
}
_SAME_NAMES = {
    "trt": "tensorrt", "tensorrt-rtx": "tensorrt", "tensorrt_rtx": "tensorrt", "rtx": "tensorrt",
    "onnx-runtime": "onnxruntime", "onnx_runtime": "onnxruntime", "gpu": "cuda",
}  # fmt: skip


def parse_targets(given: str | Sequence[str]) -> list[Target]:
    """The targets that a user named, each once, in the order given.

    Args:
        given: names in any case; each text may have several, separated by commas.

    Raises:
        UsageError: there is none, or one is unknown; if it is the name of a runtime, the message says which fits.
    """
    texts = [given] if isinstance(given, str) else given
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"target is empty; expected one or several of {', '.join(TARGETS)}.")
    known: dict[str, Target] = {target: target for target in TARGETS}
    for name in names:
        if name.lower() not in known:
            raise _unknown(name)
    return list(dict.fromkeys(known[name.lower()] for name in names))


def parse_target(given: str) -> Target:
    """The one target that a user named, in any case.

    Raises:
        UsageError: as in `parse_targets`; or there are several.
    """
    targets = parse_targets(given)
    if len(targets) > 1:
        raise UsageError(f"target: expected one of {', '.join(TARGETS)}, got {len(targets)}: {', '.join(targets)}.")
    return targets[0]


def _unknown(name: str) -> UsageError:
    runtime = _SAME_NAMES.get(name.lower(), name.lower())
    hint = f" {_NOT_TARGETS[runtime]} See: rmsnorm targets" if runtime in _NOT_TARGETS else ""
    return UsageError(f"target: expected one of {', '.join(TARGETS)}, got {name!r}.{hint}")


def cell(target: str, form: Form) -> Cell:
    """The table's cell for a target and a form.

    Raises:
        UsageError: the target is unknown.
    """
    for row in TABLE:
        if row.target == target and row.form == form:
            return row
    raise _unknown(target)


def resolve(spec: NormSpec, form: Form, target: str, environment: Environment) -> Cell | LoweringRefusal:
    """The cell to use, or why there is none.

    Args:
        spec: the norm.
        form: whether a residual add precedes it.
        target: one of `TARGETS`.
        environment: what the file is written for.

    Raises:
        UsageError: the target is unknown.
    """
    chosen = cell(target, form)
    reasons = _obstacles(chosen, spec, environment)
    if not reasons:
        return chosen
    others = [row for row in TABLE if row.form == form and row.target != target]
    nearest = next((row.target for row in others if not _obstacles(row, spec, environment)), None)
    return LoweringRefusal(target, tuple(reasons), nearest)


def deviations(chosen: Cell, spec: NormSpec, dtype: str, runtime: str | None = None) -> list[Deviation]:
    """The cases in which `chosen` is not exact for this norm; with a runtime, only those that occur there."""
    return [
        dataclasses.replace(d, ulp=_bound(d.ulp, spec))
        for d in chosen.deviations
        if dtype in d.dtypes and _concerns(d, spec) and (runtime is None or d.runtime in ("any", runtime))
    ]


def refuse_other_epsilon(spec: NormSpec, form: Form, dtype: str, target: str) -> None:
    """Refuse a target whose operator would round a float64 epsilon to float32: a norm of a graph must not change.

    Raises:
        UnsupportedError: the operator's epsilon is a float32, and this one is not.
    """
    inexact = [d for d in deviations(cell(target, form), spec, dtype) if d.order == "any"]
    if inexact:
        raise UnsupportedError(
            f"{inexact[0].reason}, which cannot represent {spec.eps!r} exactly. Use --target primitives."
        )


def _concerns(deviation: Deviation, spec: NormSpec) -> bool:
    if deviation.order == "any":  # float32 cannot represent the epsilon, and the statistics are wider
        return spec.sums_in_double and not _is_float32(spec.eps)
    match spec.order:
        case "scale_then_cast":
            return False  # every cell rounds where the module rounds
        case "cast_then_scale":
            return deviation.order == spec.order and spec.has_weight
        case "cast_factor" | "no_upcast":
            return deviation.order == spec.order
        case _:
            assert_never(spec.order)


def _is_float32(value: float) -> bool:
    try:
        return bool(struct.unpack("f", struct.pack("f", value))[0] == value)
    except OverflowError:
        return False


def _bound(ulp: float | None, spec: NormSpec) -> float | None:
    """The table's bound holds for one omitted rounding with at most one rounding behind it.

    A bias may cancel the value that the error is relative to. Each further rounding (of a gate, or of a weight behind
    a rounded factor) passes on the error of the previous one, which a change of binade can double.
    """
    if ulp is None or spec.bias:
        return None
    return 2 * ulp if _gate_rounds(spec) or (_factor_is_rounded(spec) and spec.has_weight) else ulp


def _gate_rounds(spec: NormSpec) -> bool:
    """Whether the multiplication by a gate rounds the result once more."""
    match spec.gate:
        case "none" | "before":
            return False
        case "after":
            return True
        case _:
            assert_never(spec.gate)


def _factor_is_rounded(spec: NormSpec) -> bool:
    match spec.order:
        case "scale_then_cast" | "cast_then_scale" | "no_upcast":
            return False
        case "cast_factor":
            return True
        case _:
            assert_never(spec.order)


def opset_for(target: str, opset: int | None) -> int:
    """The opset import of a finished file.

    Raises:
        UsageError: the target is unknown.
        UnsupportedError: the requested opset is out of range, or too low for the target.
    """
    lowest = cell(target, "plain").opset
    if opset is None:
        return max(lowest, DEFAULT_OPSET)
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise UnsupportedError(f"opset: expected {LOWEST_OPSET} to {HIGHEST_OPSET}, got {opset}.")
    if opset < lowest:
        raise UnsupportedError(
            f"target {target!r} requires opset {lowest}, got opset {opset}. Omit --opset, or use --target primitives, "
            f"which requires opset {LOWEST_OPSET}."
        )
    return opset


def _obstacles(row: Cell, spec: NormSpec, environment: Environment) -> list[str]:
    reasons = []
    if environment.dtype not in row.dtypes:
        reasons.append(f"{row.emits} does not support {environment.dtype} (it supports {', '.join(row.dtypes)})")
    if environment.opset is not None and environment.opset < row.opset:
        reasons.append(f"{row.emits} requires opset {row.opset}, and the file has opset {environment.opset}")
    if row.target == "plugin" and not environment.top_level:
        reasons.append("TensorRT finds plugins in the main graph only, and this norm is in a control-flow subgraph")
    if row.target == "plugin" and spec.sums_in_double and environment.dtype == "float64":
        reasons.append("the plugin's statistics are float32")
    lowest = dict(row.runtimes)
    if environment.runtime is not None and environment.runtime not in lowest:
        reasons.append(f"{environment.runtime} does not support {row.emits}")
    elif environment.runtime is not None and environment.runtime_version is not None:
        needed = lowest[environment.runtime]
        older = _version(environment.runtime_version) < _version(needed)
        reasons += [
            f"{row.emits} requires {environment.runtime} {needed}, and this is {environment.runtime_version}"
        ] * older
    return reasons


def _version(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
