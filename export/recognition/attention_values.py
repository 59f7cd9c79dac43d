"""The query, key and value of an attention as the graph spells them: factors, transposed keys, repeated heads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx_ir as ir

from ..graph.constants import DEFAULT_DOMAINS, axes_of, dims, same_dims, scalar

_RANK = 4
_SWAPPED = (0, 1, 3, 2)
Dims = list[ir.SymbolicDim | int]


@dataclass(frozen=True, slots=True, eq=False)
class Repeated:
    """Keys or values whose heads are repeated: Unsqueeze, Expand, Reshape.

    Attributes:
        source: `[B, Hk, T, D]`.
        count: how often each head occurs, in a row.
        targets: the target shapes of Expand and Reshape.
    """

    source: ir.Value
    count: int
    targets: tuple[ir.Value, ir.Value]


@dataclass(frozen=True, slots=True, eq=False)
class KeySide:
    """The key of a product of query and transposed key.

    Attributes:
        source: the key, or what a transposition by `perm` makes the key.
        perm: None where `source` is the key `[B, Hk, T, D]`.
        factor: the constant factors of the key.
        shape: dims of the key.
    """

    source: ir.Value
    perm: tuple[int, ...] | None
    factor: float
    shape: Dims

    def at(self, heads: Repeated) -> KeySide:
        """The key before its heads are repeated."""
        return dataclasses.replace(self, source=heads.source, shape=dims(heads.source) or self.shape)


def scaled(value: ir.Value) -> tuple[ir.Value, float]:
    """A value before one multiplication by, or division by, a constant number; itself and 1 without one."""
    node = value.producer()
    if node is None or node.domain not in DEFAULT_DOMAINS or node.op_type not in ("Mul", "Div"):
        return value, 1.0
    for index in (1, 0) if node.op_type == "Mul" else (1,):
        number, other = scalar(node.inputs[index]), node.inputs[1 - index]
        rank = len(dims(node.inputs[index]) or ())
        if number and other is not None and len(dims(other) or [0] * rank) >= rank:
            return other, number if node.op_type == "Mul" else 1.0 / number
    return value, 1.0


def key_side(value: ir.Value) -> KeySide | None:
    """The key of which a value `[B, H, D, T]` is the transposition, or None."""
    current, factor = scaled(value)
    node = current.producer()
    if node is None or node.domain not in DEFAULT_DOMAINS:
        return None
    if node.op_type == "Transpose" and node.inputs[0] is not None:
        given = node.attributes.get_ints("perm", ())
        shape = dims(node.inputs[0])
        if sorted(given) != list(range(_RANK)) or shape is None or len(shape) != _RANK:
            return None
        perm = tuple(given[axis] for axis in _SWAPPED)
        own = [shape[axis] for axis in perm]
        if perm != tuple(range(_RANK)):
            return KeySide(node.inputs[0], perm, factor, own)
        source, before = scaled(node.inputs[0])
        return KeySide(source, None, factor * before, own)
    joined = _by_three_dims(node)
    if joined is None:
        return None
    whole, before = scaled(joined)
    return KeySide(whole, None, factor * before, list(dims(joined) or ()))


def _by_three_dims(last: ir.Node) -> ir.Value | None:
    """The key that torch's exporter transposes as three dims: Reshape, Transpose, Reshape by its own sizes."""
    turned = last.inputs[0].producer() if last.op_type == "Reshape" and last.inputs[0] is not None else None
    if turned is None or turned.op_type != "Transpose" or tuple(turned.attributes.get_ints("perm", ())) != (0, 2, 1):
        return None
    first = turned.inputs[0].producer() if turned.inputs[0] is not None else None
    source = first.inputs[0] if first is not None and first.op_type == "Reshape" else None
    if source is None or len(dims(source) or ()) != _RANK:
        return None
    return source


def repeated(value: ir.Value) -> Repeated | None:
    """The keys or values before each of their heads was repeated, or None."""
    shape, joined = dims(value), value.producer()
    if joined is None or joined.op_type != "Reshape" or joined.inputs[0] is None or shape is None:
        return None
    widened = joined.inputs[0].producer()
    if widened is None or widened.op_type != "Expand" or widened.inputs[0] is None:
        return None
    single, more = widened.inputs[0].producer(), dims(widened.outputs[0])
    if single is None or single.op_type != "Unsqueeze" or single.inputs[0] is None or more is None:
        return None
    source = single.inputs[0]
    own = dims(source)
    targets = joined.inputs[1], widened.inputs[1]
    if targets[0] is None or targets[1] is None or own is None or (len(own), len(more), len(shape)) != (4, 5, 4):
        return None
    if axes_of(single) not in ([2], [-3]):
        return None
    count, heads = more[2], own[1]
    same = same_dims([*own[:2], *own[2:]], [*more[:2], *more[3:]]) and same_dims(
        [own[0], *own[2:]], [shape[0], *shape[2:]]
    )
    if not same or not isinstance(count, int) or not isinstance(heads, int) or shape[1] != count * heads:
        return None
    return Repeated(source, count, (targets[1], targets[0]))
