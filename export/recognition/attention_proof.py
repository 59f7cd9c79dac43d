"""Prove that the nodes of an attention compute its spec, by running them in float64 (`difference`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..graph.constants import constant, dims
from .find_attentions import FoundAttention, MaskPart

Values = NDArray[np.float64]
# Batch, queries and keys, where the graph leaves them open; and the width of heads that is unknown.
CASES = ((2, 3, 5), (1, 1, 7), (3, 4, 2))
_WIDTH = 6
# Both sides compute in float64, and differ by roundings.
_CLOSE = 1e-9
_MASKED = float(np.finfo(np.float32).min)
_LOWEST_OPSET, _HIGHEST_IR = 7, 10


def difference(site: FoundAttention, model: ir.Model) -> str | None:
    """Why the nodes of an attention do not compute its spec, or None.

    The nodes between its inputs and its result run in float64, on random inputs of several sizes, in which every query
    attends to a key.

    Args:
        site: the attention.
        model: the model that it is in.
    """
    from onnx import reference

    graph = _Cut(site)
    if graph.missing:
        return f"it also reads {', '.join(sorted(graph.missing))}"
    cases = [feeds_of(site, case, np.random.default_rng(number)) for number, case in enumerate(CASES)]
    proto = graph.proto(model)
    try:
        evaluator = reference.ReferenceEvaluator(proto)
        given = [{str(value.name): array for value, array in feeds.items() if value in graph.inputs} for feeds in cases]
        results = [np.asarray(next(iter(evaluator.run(None, one)))) for one in given]
    except Exception as error:  # of operators that the evaluator does not know, or shapes that do not fit
        return f"it could not be computed: {' '.join(str(error).split())[:120]}"
    for got, feeds in zip(results, cases, strict=True):
        wanted = attend(site, feeds)
        if got.shape != wanted.shape:
            return f"expected a result of the shape {list(wanted.shape)}, got {list(got.shape)}"
        off = float(np.max(np.abs(got - wanted)))
        if not off <= _CLOSE * max(1.0, float(np.max(np.abs(wanted)))):
            return f"its result differs by {off:.3g} from that of {site.spec.describe()}"
    return None


class _Cut:
    """The nodes between the inputs of an attention and its result."""

    def __init__(self, site: FoundAttention) -> None:
        self.inputs = set(site.inputs) | set(site.targets)
        self.missing: set[str] = set()
        self._y = site.y
        self._constants: dict[ir.Value, NDArray[Any]] = {}
        self._nodes: dict[ir.Node, None] = {}
        done: set[ir.Value] = set()
        pending: list[tuple[ir.Value, bool]] = [(site.y, False)]
        while pending:
            value, ready = pending.pop()
            node = value.producer()
            if ready and node is not None:
                self._nodes[node] = None
            if ready or value in done or value in self.inputs:
                continue
            done.add(value)
            array = constant(value)
            if array is not None:
                self._constants[value] = array
            elif node is None:
                self.missing.add(str(value.name))
            else:
                pending.append((value, True))
                pending += [(one, False) for one in node.inputs if one is not None]

    def proto(self, model: ir.Model) -> Any:
        """The nodes as a model in float64."""
        import onnx
        from onnx import helper, numpy_helper

        def wide(kind: ir.DataType | None) -> int:
            return int(ir.DataType.DOUBLE if kind is None or kind.is_floating_point() else kind)

        nodes = [ir.to_proto(node) for node in self._nodes]
        for node in nodes:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to":
                    attribute.i = wide(ir.DataType(attribute.i))
        inputs = [helper.make_tensor_value_info(str(v.name), wide(v.dtype), None) for v in self.inputs]
        constants = []
        for value, array in self._constants.items():
            floating = value.dtype is not None and value.dtype.is_floating_point()
            constants.append(numpy_helper.from_array(array.astype(np.float64) if floating else array, str(value.name)))
        y = [helper.make_tensor_value_info(str(self._y.name), onnx.TensorProto.DOUBLE, None)]
        opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", _LOWEST_OPSET))
        whole = helper.make_graph(nodes, "attention", inputs, y, constants)
        return helper.make_model(whole, opset_imports=[helper.make_opsetid("", opset)], ir_version=_HIGHEST_IR)


def feeds_of(
    site: FoundAttention, case: tuple[int, int, int], rng: np.random.Generator, *, silent: bool = False
) -> dict[ir.Value, NDArray[Any]]:
    """Random inputs of an attention in float64, with the sizes that the graph fixes.

    Args:
        site: the attention.
        case: batch, number of queries and number of keys, where the graph leaves them open.
        rng: the random numbers.
        silent: the first query attends to nothing; without that, every query attends to the first key.
    """
    named: dict[str, int] = {}

    def size(dim: ir.SymbolicDim | int, usual: int) -> int:
        if isinstance(dim, int):
            return dim
        return named.setdefault(dim.value, usual) if dim.value is not None else usual

    heads, groups = site.heads
    query, value = dims(site.query) or [], dims(site.value) or []
    batch, length = size(query[0], case[0]), size(query[2], case[1])
    keys = size(site.key.shape[2], case[2])
    width, other = size(query[3], _WIDTH), size(value[3], _WIDTH - 1)
    key: NDArray[Any] = rng.standard_normal((batch, groups, keys, width))
    feeds: dict[ir.Value, NDArray[Any]] = {site.query: rng.standard_normal((batch, heads, length, width))}
    feeds.setdefault(site.key.source, key if site.key.perm is None else key.transpose(np.argsort(site.key.perm)))
    feeds.setdefault(site.value, rng.standard_normal((batch, groups, keys, other)))
    for part in site.parts:
        whole = (batch, heads, length, keys)
        shape = dims(part.value) or []
        sizes = [1 if dim == 1 else usual for dim, usual in zip(shape, whole[4 - len(shape) :], strict=True)]
        feeds.setdefault(part.value, _mask(part, sizes, rng, silent))
    for row, last in zip(site.repeats, (width, other), strict=False):
        feeds[row.targets[0]] = np.array([batch, groups, row.count, keys, last])
        feeds[row.targets[1]] = np.array([batch, heads, keys, last])
    return feeds


def _mask(part: MaskPart, sizes: list[int], rng: np.random.Generator, silent: bool) -> NDArray[Any]:
    """A mask that shows each query the first key, or the first query nothing."""
    hidden: NDArray[Any] = rng.random(sizes) < 0.4
    if sizes:
        hidden[..., 0] = False
    if len(sizes) > 1 and silent:
        hidden[..., 0, :] = True
    if part.kind == "add":
        return np.where(hidden, _MASKED, rng.standard_normal(sizes))
    return hidden if part.kind == "hide" else np.logical_not(hidden)


def attend(site: FoundAttention, feeds: dict[ir.Value, NDArray[Any]]) -> Values:
    """The formula of an attention in float64, `[B, H, S, Dv]`, of the inputs that `feeds_of` makes."""
    count = site.heads[0] // site.heads[1]
    key = feeds[site.key.source]
    key = np.repeat(key if site.key.perm is None else key.transpose(site.key.perm), count, axis=1)
    spec = site.spec
    scores = spec.scale * (feeds[site.query] @ key.swapaxes(2, 3))
    if spec.softcap is not None:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    scores = _masked(scores, ((part, feeds[part.value]) for part in site.parts))
    parts = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = parts / parts.sum(axis=-1, keepdims=True)
    return np.asarray(weights @ np.repeat(feeds[site.value], count, axis=1))


def _masked(scores: Values, parts: Iterable[tuple[MaskPart, NDArray[Any]]]) -> Values:
    for part, array in parts:
        if part.kind == "add":
            scores = scores + array
        else:
            scores = np.where(array if part.kind == "hide" else np.logical_not(array), _MASKED, scores)
    return scores
