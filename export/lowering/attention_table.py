"""The table of attention: what each target writes for each kind of attention, and what that requires.

Export, `rmsnorm targets`, the table in the README and the tests are generated from it. The mask is always one tensor of
floats that is added to the scores, whose lowest value is the dtype's, never infinity: ONNX Runtime 1.23 returns NaN for
a row that attends to nothing and a bool mask, 1.27 for an infinite one. Keys and values come with the cache in front of
them; ONNX Runtime runs the operator equally fast with inputs for a cache. TensorRT builds the operator only where it
has a kernel for its dtype and width, so the files that it reads have the primitives, which it fuses where it can.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from ...models.attention.spec import AttentionSpec
from ...models.errors import UsageError
from ...models.versions import older
from .table import TARGETS, Environment, Target

# What an attention computes beyond softmax(scale q k^T + bias) v.
AttentionKind = Literal["plain", "softcap", "sink"]
KINDS: tuple[AttentionKind, ...] = get_args(AttentionKind)
OPERATOR = "Attention"
OPERATOR_OPSET = 23


# `in-place` is `node`, and where it can be, a node that writes keys and values into the buffer of the cache.
AttentionMode = Literal["node", "decomposed", "in-place"]


def parse_attention(given: str) -> AttentionMode:
    """How attention is written, in any case.

    Raises:
        UsageError: it is another word.
    """
    modes: dict[str, AttentionMode] = {mode: mode for mode in get_args(AttentionMode)}
    if given.lower() not in modes:
        raise UsageError(f"attention: expected one of {', '.join(modes)}, got {given!r}.")
    return modes[given.lower()]


def check_attention(mode: AttentionMode, targets: Iterable[str], *, with_past: bool) -> None:
    """Refuse a mode that the export cannot have.

    Raises:
        UsageError: `in-place` without a cache, or for another target than `ort`.
    """
    if mode != "in-place":
        return
    others = [target for target in targets if target != "ort"]
    if others:
        raise UsageError(
            f"attention: in-place is for target ort, whose runtime has the operator, got target {', '.join(others)}. "
            "Use --attention node there."
        )
    if not with_past:
        raise UsageError("attention: in-place writes the KV cache in place, and the export has none; add --with-past.")


@dataclass(frozen=True, slots=True)
class AttentionCell:
    """How one target writes one kind of attention.

    Attributes:
        target: the target.
        kind: what the attention computes beyond the plain one.
        emits: the operators, in order.
        opset: lowest opset import of the finished file.
        dtypes: dtypes of the query that are supported; others are written as target `primitives` does.
        runtimes: lowest version of each runtime that runs it right.
        note: a remark for the reader.
        mode: `node`, or `in-place` for attentions that write the cache in place.
    """

    target: Target
    kind: AttentionKind
    emits: str
    opset: int
    dtypes: tuple[str, ...]
    runtimes: tuple[tuple[str, str], ...]
    note: str
    mode: AttentionMode = "node"

    @property
    def is_operator(self) -> bool:
        """Whether the attention is one node."""
        return self.emits.startswith(OPERATOR)


_GROUPED = "com.microsoft::GroupQueryAttention"
_BUFFER = "keys and values are written into the cache's own buffer"
_NEWEST = (("onnxruntime", "1.32"),)
_ALL = ("float32", "float16", "bfloat16", "float64")
_THREE = ("float32", "float16", "bfloat16")
_RTX = ("tensorrt-rtx", "1.7")
_EVERYWHERE = (("onnxruntime", "1.23"), ("tensorrt", "10.7"), _RTX)
_PLAIN = "Mul, MatMul, Add, Softmax, MatMul"
_CAPPED = "Mul, MatMul, Div, Tanh, Mul, Add, Softmax, MatMul"
_SINKS = "Mul, MatMul, Add, ReduceMax, Max, Sub, Exp, Sub, Exp, ReduceSum, Add, Div, MatMul"
_SHARED = "the heads of one key are rows of one product, so that keys and values are not repeated"
_REFUSED = "TensorRT-RTX 1.7 builds no engine with the operator in float32, and refuses softcaps"
_NO_SINKS = "the operator has no input for sinks"

# fmt: off
ATTENTION_TABLE: tuple[AttentionCell, ...] = (
    AttentionCell("primitives", "plain", _PLAIN, 7, _ALL, _EVERYWHERE, _SHARED),
    AttentionCell("primitives", "softcap", _CAPPED, 7, _ALL, _EVERYWHERE, _SHARED),
    AttentionCell("primitives", "sink", _SINKS, 7, _ALL, _EVERYWHERE, "the sink is a term of the sum, not a column"),
    AttentionCell("standard", "plain", _PLAIN, 7, _ALL, _EVERYWHERE, _REFUSED),
    AttentionCell("standard", "softcap", _CAPPED, 7, _ALL, _EVERYWHERE, _REFUSED),
    AttentionCell("standard", "sink", _SINKS, 7, _ALL, _EVERYWHERE, _NO_SINKS),
    AttentionCell("ort", "plain", "Attention, Transpose", OPERATOR_OPSET, _THREE,
                  (("onnxruntime", "1.27"),), "the operator of ONNX opset 23, which ONNX Runtime runs as one kernel"),
    AttentionCell("ort", "softcap", "Attention, Transpose", OPERATOR_OPSET, _THREE,
                  (("onnxruntime", "1.27"),), "ONNX Runtime 1.23 computes another softcap"),
    AttentionCell("ort", "sink", _SINKS, 7, _ALL, _EVERYWHERE, _NO_SINKS),
    AttentionCell("ort", "plain", _GROUPED, 18, ("float32", "float16"), _NEWEST, _BUFFER, "in-place"),
    AttentionCell("ort", "softcap", _GROUPED, 18, ("float32", "float16"), _NEWEST, _BUFFER, "in-place"),
    AttentionCell("ort", "sink", _GROUPED, 18, ("float32", "float16"), _NEWEST,
                  "the operator has an input for sinks", "in-place"),
    AttentionCell("plugin", "plain", _PLAIN, 7, _ALL, _EVERYWHERE, "for TensorRT versions without the operator too"),
    AttentionCell("plugin", "softcap", _CAPPED, 7, _ALL, _EVERYWHERE, _SHARED),
    AttentionCell("plugin", "sink", _SINKS, 7, _ALL, _EVERYWHERE, "the sink is a term of the sum, not a column"),
)
# fmt: on


def kind_of(spec: AttentionSpec) -> AttentionKind:
    """The table's kind of an attention; sinks with a softcap are written as sinks are."""
    if spec.sink:
        return "sink"
    return "softcap" if spec.softcap is not None else "plain"


def required_versions(cells: Iterable[AttentionCell]) -> dict[str, str]:
    """The lowest version of each runtime that these cells require, where the primitives do not run everywhere."""
    usual, found = dict(_EVERYWHERE), dict[str, str]()
    for runtime, version in (row for cell in cells for row in cell.runtimes):
        if version != usual[runtime] and older(found.get(runtime, usual[runtime]), version):
            found[runtime] = version
    return found


def attention_cell(target: str, kind: AttentionKind, mode: AttentionMode = "node") -> AttentionCell:
    """The table's cell.

    Raises:
        UsageError: the target is unknown.
    """
    for row in ATTENTION_TABLE:
        if (row.target, row.kind, row.mode) == (target, kind, mode):
            return row
    if mode == "in-place" and target in TARGETS:
        raise UsageError(f"attention: {mode} is for target ort, got target {target}.")
    raise UsageError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}.")


def attention_form(
    spec: AttentionSpec, target: str, environment: Environment, mode: AttentionMode = "node"
) -> tuple[AttentionCell, str | None]:
    """The cell to use, and why it is not the target's own, or None.

    Args:
        spec: the attention.
        target: one of `TARGETS`.
        environment: opset and dtype of the file.
        mode: `node` or `in-place`.
    """
    kind = kind_of(spec)
    own, usual = attention_cell(target, kind, mode), attention_cell("primitives", kind)
    if environment.dtype not in own.dtypes:
        return usual, f"{own.emits.split(',')[0]} does not support {environment.dtype} everywhere"
    if environment.opset is not None and environment.opset < own.opset:
        return usual, f"{OPERATOR} requires opset {own.opset}, and the file has opset {environment.opset}"
    return own, None
