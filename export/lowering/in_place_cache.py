"""Attentions that write keys and values into the buffer of the cache (`InPlaceCache`): GroupQueryAttention.

The operator of ONNX Runtime takes the cache before and after the step as one buffer with room for more tokens, if both
are bound to the same memory; where they are not, it returns a longer cache, as other files do. It hides later keys by
itself, so it is used only where the mask was found to hide them for several lengths and paddings, and depends on
nothing but lengths, padding and positions. A mask that hides nothing but them and padding is written anew without them,
in a few nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..graph.cache_names import is_past
from ..graph.constants import dims
from .builder import Builder, lowest
from .head_layout import rows_of

DOMAIN = "com.microsoft"
GROUPED = "GroupQueryAttention"
_VERSION = 1
_MASK, _TOKENS = "attention_mask", ("input_ids", "inputs_embeds")
# The inputs on which a mask may depend, and those of which it may read the size alone.
_VALUES = (_MASK, "position_ids")
# Batch, length and past for which a mask is computed, without and with padding on the left.
_CASES = ((2, 3, 0), (2, 1, 7), (2, 4, 5), (1, 19, 0), (1, 2, 40))
_LONGEST = max(length + past for _, length, past in _CASES)
# A number in the computation of a mask may be the width of a window, so the mask is computed for lengths beyond it; up
# to the first of these it takes a moment, and from the second on it is none.
_WIDEST, _NO_WIDTH = 1 << 16, 1 << 31
# A constant with more elements than this may be a mask itself.
_FEW = 64
# Scores to which this or less is added are those of hidden keys.
_HIDDEN = -1e4
_LENGTH = 2  # the axis of a cache
# Inputs that are not given: cos, sin and positions of a rotary embedding, and weights and scales of other forms.
_NO_ROTARY, _NO_SCALES = [None] * 3, [None] * 4
_NUMBERS = (ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_WIDTH = 8  # the operator requires widths of heads that this divides


@dataclass(frozen=True, slots=True)
class CachePlace:
    """Where an attention reads the cache: the inputs of the graph, and the new keys and values; and its mask.

    Attributes:
        bias: the mask, which need not hide later keys.
    """

    past_key: ir.Value
    past_value: ir.Value
    key: ir.Value
    value: ir.Value
    bias: ir.Value


@dataclass(frozen=True, slots=True)
class _Mask:
    """What was found of a mask: why it cannot be used, or None; and whether it hides later keys and padding alone."""

    problem: str | None
    is_plain: bool = False


@dataclass(slots=True)
class _Read:
    """What a mask is computed from.

    Attributes:
        inputs: of the graph.
        widths: numbers that may be the width of a window.
        is_closed: whether the mask depends on nothing but padding, sizes and these numbers.
    """

    inputs: dict[ir.Value, None] = field(default_factory=dict)
    widths: set[int] = field(default_factory=set)
    is_closed: bool = True

    def note(self, numbers: object) -> None:
        """Take the numbers of an attribute or a constant."""
        array = np.asarray(numbers)
        if array.dtype.kind not in "iufb":
            return
        if array.size > _FEW:
            self.is_closed = False
            return
        found = np.abs(array.astype(np.float64)).ravel().tolist()
        self.widths |= {int(one) for one in found if _LONGEST < one < _NO_WIDTH}
        self.is_closed = self.is_closed and all(width <= _WIDEST for width in self.widths)


class InPlaceCache:
    """The caches of a graph that attentions can write in place.

    Args:
        root: the main graph.
    """

    def __init__(self, root: ir.Graph) -> None:
        self._root = root
        self._inputs = {str(value.name): value for value in root.inputs}
        self._masks: dict[ir.Value, _Mask] = {}
        self._padding: dict[ir.DataType, ir.Value] = {}
        self.names: list[str] = []

    def place(self, query: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value | None) -> CachePlace | str:
        """Where an attention reads the cache, or why it cannot write it in place."""
        if self._mask() is None:
            return f"the model does not read {_MASK} and {' or '.join(_TOKENS)}, which tell the length of the cache"
        if bias is None or bias.shape is None or len(bias.shape) != 4:
            return "it has no mask of four dimensions"
        widths = [
            value.shape[3] if value.shape is not None and len(value.shape) == 4 else None for value in (query, value)
        ]
        if widths[0] != widths[1] or not isinstance(widths[0], int) or widths[0] % _WIDTH:
            return f"expected heads of one width that {_WIDTH} divides, got {widths[0]} and {widths[1]}"
        joined = [self._joined(one) for one in (key, value)]
        if joined[0] is None or joined[1] is None:
            return "its keys and values are not those of the cache with the new ones behind them"
        if bias not in self._masks:
            self._masks[bias] = self._judged(bias)
        mask = self._masks[bias]
        if mask.problem is not None:
            return mask.problem
        used = self._padding_alone(query) if mask.is_plain else bias
        return CachePlace(joined[0][0], joined[1][0], joined[0][1], joined[1][1], used)

    def _mask(self) -> tuple[ir.Value, ir.Value] | None:
        """The inputs whose sizes tell the number of all tokens, and of the new ones."""
        tokens = next((self._inputs[name] for name in _TOKENS if name in self._inputs), None)
        mask = self._inputs.get(_MASK)
        if tokens is None or mask is None or mask.shape is None or len(mask.shape) != 2:
            return None
        return mask, tokens

    def _joined(self, value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """The cache and the new keys or values, of which this value is the concatenation that nothing else reads."""
        node = value.producer()
        if node is None or node.op_type != "Concat" or node.domain != "" or len(node.inputs) != 2:
            return None
        past, new = node.inputs
        axis = node.attributes.get_int("axis", 0)
        if past is None or new is None or axis not in (_LENGTH, _LENGTH - 4) or not value.is_graph_output():
            return None
        if len(value.uses()) != 1 or not past.is_graph_input() or not is_past(str(past.name)):
            return None
        others = [use.node for use in past.uses() if use.node is not node]
        return (past, new) if all(_is_size(other) for other in others) else None

    def _padding_alone(self, query: ir.Value) -> ir.Value:
        """A mask `[B, 1, S, T]` in the dtype of the query that hides padding alone."""
        dtype, sizes = query.dtype, self._mask()
        assert dtype is not None
        assert sizes is not None
        if dtype not in self._padding:
            mask, tokens = sizes
            of_mask, of_tokens = dims(mask), dims(tokens)
            assert of_mask is not None
            shape = None if of_tokens is None else ir.Shape([of_mask[0], 1, of_tokens[1], of_mask[1]])
            builder = Builder(self._root, self._root, {}, {}, self._root.opset_imports[""])

            def op(name: str, *values: ir.Value, dtype: ir.DataType = ir.DataType.INT64, **attributes: int) -> ir.Value:
                return builder.op(name, values, attributes, dtype=dtype, shape=None)

            def number(value: object, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
                return builder.constant(np.array(value), dtype, "mask")

            shown = op("Cast", op("Unsqueeze", mask, number([1, 2])), dtype=ir.DataType.BOOL, to=int(ir.DataType.BOOL))
            row = op("Where", shown, number(0, dtype), number(lowest(dtype), dtype), dtype=dtype)
            length = op("Shape", tokens, start=1, end=2)
            size = op("Concat", number([1, 1]), length, number([1]), axis=0)
            self._padding[dtype] = builder.op("Expand", [row, size], dtype=dtype, shape=shape)
            builder.insert_before(self._root[0])
        return self._padding[dtype]

    def _judged(self, bias: ir.Value) -> _Mask:
        """Whether a mask is known to hide later keys, and nothing but them and padding."""
        from onnx import reference

        read = self._read_by(bias)
        if isinstance(read, str):
            return _Mask(read)
        inputs, is_plain = list(read.inputs), read.is_closed
        cases = [*_CASES, *((1, 2, width + 2) for width in sorted(read.widths) if is_plain)]
        graph = ir.convenience.extract(self._root, inputs, [bias])
        model = ir.Model(graph, ir_version=10)
        graph.opset_imports.update(self._root.opset_imports)
        try:
            evaluator = reference.ReferenceEvaluator(ir.to_proto(model))
            for batch, length, past in cases:
                for padding in (0, 2):
                    feeds = {str(v.name): _example(v, batch, length, past, padding) for v in inputs}
                    got = np.asarray(next(iter(evaluator.run(None, feeds))))
                    later = np.triu(np.ones((length, past + length), bool), past + 1)
                    if np.any(np.broadcast_to(got, (*got.shape[:2], *later.shape))[..., later] > _HIDDEN):
                        return _Mask("its mask shows later keys")
                    hidden = later | (_padded_left(batch, past + length, padding) == 0)[:, None, None]
                    is_plain = is_plain and _hides_only(got, hidden)
        except Exception as error:  # of operators that the evaluator does not know, or shapes that do not fit
            return _Mask(f"its mask could not be computed: {' '.join(str(error).split())[:120]}")
        return _Mask(None, is_plain)

    def _read_by(self, bias: ir.Value) -> _Read | str:
        """What a mask is computed from, or why it may be another one for other tokens."""
        found = _Read()
        seen: set[ir.Node] = set()
        pending = [bias]
        while pending:
            value = pending.pop()
            node = value.producer()
            if node is None:
                if value.is_graph_input() and not value.is_initializer():
                    found.inputs[value] = None
                elif value.const_value is not None:
                    found.note(value.const_value.numpy())
            elif node not in seen:
                seen.add(node)
                for attribute in node.attributes.values():
                    if attribute.type in _NUMBERS:
                        found.note(attribute.value)
                    elif attribute.type == ir.AttributeType.TENSOR:
                        found.note(attribute.value.numpy())
                    elif attribute.type in _GRAPHS:
                        found.is_closed = False
                pending += [one for one in node.inputs if one is not None]
        for value in found.inputs:
            readers = {use.node.op_type for use in value.uses() if use.node in seen}
            if readers != {"Shape"}:
                if value.name not in _VALUES:
                    return f"its mask depends on {value.name}"
                found.is_closed = found.is_closed and value.name == _MASK
        return found

    def use(self, place: CachePlace) -> None:
        """Note that an attention writes these caches."""
        self.names += [str(place.past_key.name), str(place.past_value.name)]

    def finish(self) -> None:
        """Take the length of the cache from the mask, where the graph takes it from a cache that is a buffer now."""
        sizes = self._mask()
        if not self.names or sizes is None:
            return
        self._root.opset_imports[DOMAIN] = _VERSION
        length: ir.Value | None = None
        for name in self.names:
            for use in list(self._inputs[name].uses()):
                if use.node.op_type != "Shape" or _range(use.node) != (_LENGTH, _LENGTH + 1):
                    continue
                if length is None:
                    length = self._length(*sizes)
                (old,) = use.node.outputs
                old.replace_all_uses_with(length, replace_graph_outputs=True)
                self._root.remove(use.node, safe=True)

    def _length(self, mask: ir.Value, tokens: ir.Value) -> ir.Value:
        """The number of tokens in the cache, `[1]`, at the start of the graph."""
        builder = Builder(self._root, self._root, {}, {}, self._root.opset_imports[""])
        kind = ir.DataType.INT64
        sizes = [
            builder.op("Shape", [value], {"start": 1, "end": 2}, dtype=kind, shape=ir.Shape([1]))
            for value in (mask, tokens)
        ]
        length = builder.op("Sub", sizes, dtype=kind, shape=ir.Shape([1]))
        builder.insert_before(self._root[0])
        return length


def grouped(
    builder: Builder,
    place: CachePlace,
    inputs: tuple[ir.Value, ir.Value | None],
    attributes: dict[str, Any],
    sizes: dict[ir.Value, tuple[ir.Value, ...]],
) -> tuple[ir.Node, ir.Value]:
    """Write the operator; its node, which reads and returns `[B, S, H D]`, and its result `[B, S, H, D]`.

    Args:
        builder: receives the nodes.
        place: where it reads the cache.
        inputs: query `[B, H, S, D]`, and sinks `[H]` or None.
        attributes: of the operator.
        sizes: the lengths that the operator reads, by the bias that tells them; shared by the attentions of a graph.
    """
    (query, sink), bias = inputs, place.bias
    dtype = query.dtype
    assert dtype is not None
    if bias not in sizes:
        sizes[bias] = _sizes(builder, query, bias)
    last, total, length = sizes[bias]
    given: list[ir.Value | None] = [rows_of(value, builder) for value in (query, place.key, place.value)]
    given += [place.past_key, place.past_value, last, total]
    given += [*_NO_ROTARY, bias, sink, *_NO_SCALES, length]
    node = ir.node(GROUPED, given, attributes, domain=DOMAIN, num_outputs=3)
    for output in node.outputs:
        output.dtype = dtype
    builder.nodes.append(node)
    heads = builder.constant(np.array([0, 0, attributes["num_heads"], -1]), ir.DataType.INT64, "heads")
    return node, builder.op("Reshape", [node.outputs[0], heads], dtype=dtype, shape=None)


def _sizes(builder: Builder, query: ir.Value, bias: ir.Value) -> tuple[ir.Value, ...]:
    """The last position of each row, the number of all tokens, and the number of new ones of each row, int32."""

    def op(name: str, values: list[ir.Value], dtype: ir.DataType, **attributes: int) -> ir.Value:
        return builder.op(name, values, attributes, dtype=dtype, shape=None)

    wide, narrow = ir.DataType.INT64, ir.DataType.INT32
    # The mask has the batch, so that what belongs to an attention follows from its inputs.
    same = bias.shape is not None and query.shape is not None and bias.shape[0] == query.shape[0]
    batch = op("Shape", [bias if same else query], wide, start=0, end=1)
    size = [op("Shape", [bias], wide, start=axis, end=axis + 1) for axis in (2, 3)]
    length, total = (op("Cast", [value], narrow, to=int(narrow)) for value in size)
    last = op("Sub", [total, builder.constant(np.array([1]), narrow, "one")], narrow)
    scalar = op("Squeeze", [total], narrow)
    return op("Expand", [last, batch], narrow), scalar, op("Expand", [length, batch], narrow)


def _range(node: ir.Node) -> tuple[int, int]:
    """The axes of a cache that a Shape reads, from the first to before the last."""
    first, last = node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)
    return first % 4 if first < 0 else first, last % 4 if last < 0 else last


def _is_size(node: ir.Node) -> bool:
    """Whether a node reads sizes of a cache that can be replaced: its length alone, or those that a buffer has too."""
    if node.op_type != "Shape" or node.domain != "":
        return False
    first, last = _range(node)
    return (first, last) == (_LENGTH, _LENGTH + 1) or not first <= _LENGTH < last


def _padded_left(batch: int, total: int, padding: int) -> NDArray[Any]:
    """The mask of a batch whose last row begins with padding."""
    mask: NDArray[Any] = np.ones((batch, total), np.int64)
    mask[-1, : min(padding, total - 1)] = 0
    return mask


def _hides_only(bias: NDArray[Any], hidden: NDArray[Any]) -> bool:
    """Whether what is added to scores is zero for shown keys, and hides the others, `[B, 1, S, T]`."""
    wide, hidden = np.broadcast_arrays(bias, hidden)
    return bool(np.all(np.where(hidden, wide <= _HIDDEN, wide == 0)))


def _example(value: ir.Value, batch: int, length: int, past: int, padding: int) -> NDArray[Any]:
    """An input of the graph for a batch whose last row begins with padding."""
    total = past + length
    mask = _padded_left(batch, total, padding)
    if value.name == _MASK:
        array = mask
    elif value.name == "position_ids":
        array = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
    else:
        shape = value.shape
        assert shape is not None
        sizes = [batch, length, 1, 1] if not is_past(str(value.name)) else [batch, 1, past, 1]
        array = np.zeros([dim if isinstance(dim, int) else sizes[axis] for axis, dim in enumerate(shape)])
    assert value.dtype is not None
    return array.astype(value.dtype.numpy())
