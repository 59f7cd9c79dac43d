"""Ways to spell an RMSNorm in ONNX: a builder over what spellings differ in, and what is expected of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from rmsnorm_deploy.models.spec import NormSpec

from ..graphs.graph_text import FLOATS, Graph, numpy_type, weight

WIDTH = 32
HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Expected:
    """A norm that must be found."""

    spec: NormSpec
    form: str = "plain"


@dataclass(frozen=True)
class Spelling:
    """A model and the norms in it, in graph order; `source` is whose way of writing it is."""

    name: str
    build: Callable[[], onnx.ModelProto]
    expected: tuple[Expected, ...]
    source: str = "by hand"
    runs: bool = True


@dataclass(frozen=True)
class Way:
    """What spellings differ in. The defaults are torch's dynamo exporter."""

    square: str = "pow"
    reduction: str = "mean"
    axes: str = "last"
    keepdims: str = "kept"
    epsilon: str = "right"
    eps: float = 1e-6
    root: str = "reciprocal"
    factor: str = "right"
    scale: str = "left"
    weight: str = "initializer"
    casts: str = "none"
    dtype: str = "float32"
    identity: bool = False
    opset: int = 18


# An epsilon that float32 holds exactly: others cannot be kept by operators that hold it as float32.
EXACT = 2.0**-20
SQUARES = ("pow", "mul", "pow_int", "sum_square", "l2")
REDUCTIONS = ("mean", "sum_div", "sum_mul", "sum_div_eps_first")
AXES = ("last", "positive", "two", "two_unsorted")
KEEPDIMS = ("kept", "unsqueeze", "unsqueeze_positive", "reshape")
EPSILONS = ("right", "left", "constant", "constant_float", "one_element", "none")
ROOTS = ("reciprocal", "div", "one_over", "pow", "root_of_reciprocal", "root_of_one_over", "pow_half", "pow_half_div")
FACTORS = ("right", "left")
SCALES = ("left", "right", "none", "factor_first", "x_first")
WEIGHTS = (
    "initializer", "constant", "cast", "one_plus", "plus_one", "one_plus_cast", "leading_one", "leading_ones", "scalar",
    "one_element", "reshape", "unsqueeze", "squeeze", "input", "dequantized", "sum_of_computed",
)  # fmt: skip
CASTS = (
    "none", "cast_then_scale", "scale_then_cast", "statistics", "castlike", "never_back", "wide_weight", "half_mean",
)  # fmt: skip
OPSETS = (11, 12, 13, 14, 16, 17, 18, 20, 22, 23)


def legal(way: Way) -> bool:
    """Whether the choices go together."""
    two = way.axes.startswith("two")
    half = way.dtype in HALVES
    checks = (
        two <= (way.keepdims == "kept"),
        (way.reduction != "mean") >= (way.square in ("sum_square", "l2")),
        (way.square == "l2") <= (way.reduction != "sum_div_eps_first"),
        (way.casts == "none") or half,
        not two or way.weight in ("initializer", "constant", "one_plus", "input", "leading_one"),
        way.scale in ("left", "right") or way.weight in ("initializer", "constant", "input", "leading_one"),
        not half or way.scale in ("left", "right", "none"),
        way.weight != "one_plus_cast" or half,
        way.weight not in ("cast", "dequantized") or way.dtype == "float32",
        way.weight not in ("one_plus", "plus_one") or way.casts in ("none", "scale_then_cast", "never_back"),
        way.weight != "one_plus_cast" or way.casts == "scale_then_cast",
        way.casts != "wide_weight" or way.weight == "initializer",
        way.casts != "statistics" or way.root != "div",
        way.casts != "castlike" or way.opset >= 15,
        way.dtype != "bfloat16" or way.opset >= 13,
        way.weight != "dequantized" or way.opset >= 13,
        way.opset >= 13 or way.weight != "squeeze",
        not (half and way.casts in ("none", "half_mean")) or way.eps >= 1e-5,  # smaller ones are subnormal there
        way.epsilon != "constant_float" or way.casts not in ("none", "half_mean") or way.dtype == "float32",
        way.epsilon not in ("constant", "constant_float") or way.opset >= 12,
        not (way.reduction == "sum_div_eps_first" and way.epsilon == "none"),
        not half or way.square not in ("pow_int",),
        way.factor == "right" or way.root not in ("div", "pow_half_div"),
        (way.dtype == "float64") == (way.eps == EXACT),
        way.square != "pow_int" or way.opset >= 12,
    )
    return all(checks)


def tail(way: Way) -> list[int]:
    return [4, WIDTH // 4] if way.axes.startswith("two") else [WIDTH]


def expected(way: Way) -> NormSpec:
    """What the graph says, in the form that recognition gives it."""
    half = way.dtype in HALVES
    stays_half = half and way.casts in ("none", "half_mean")
    if way.dtype == "float64" or stays_half:
        order, statistics = "no_upcast", "input"
    else:
        order, statistics = "scale_then_cast", "float32"
        if way.casts in ("cast_then_scale", "castlike", "wide_weight") and way.scale != "none":
            order = "cast_then_scale"
        if way.casts == "statistics":
            order = "cast_factor"
    eps = 0.0 if way.epsilon == "none" else way.eps
    if stays_half and eps:  # as it is added: times n where the sum is divided after it, in float32 before the cast
        count = math.prod(tail(way)) if way.reduction == "sum_div_eps_first" else 1
        wide = way.casts == "half_mean" and count > 1
        eps = float(np.asarray(eps * count, np.float32 if wide else numpy_type(way.dtype))) / count
    plus = way.weight in ("one_plus", "plus_one", "one_plus_cast")
    divided = way.root in ("div", "pow_half_div") and way.casts != "statistics" and way.scale != "factor_first"
    return NormSpec(
        eps=eps,
        trailing_dims=len(tail(way)),
        scale="none" if way.scale == "none" else "one_plus_weight" if plus else "weight",
        order=order,
        statistics=statistics,
        root="sqrt" if divided else "rsqrt",
        offset_in_float32=not (plus and (stays_half or way.weight == "one_plus_cast")),
    )


def build(way: Way) -> onnx.ModelProto:
    """The model of one spelling: x `[batch, length, *tail]` in, y out."""
    g = Graph(way.opset)
    x = g.input("x", ["batch", "length", *tail(way)], way.dtype)
    _y, dtype = norm(g, way, x)
    g.nodes[-1].output[0] = "y"
    g.output("y", dtype)
    return g.model()


def norm(g: Graph, way: Way, x: str, prefix: str = "") -> tuple[str, str]:
    """Write the norm of x into a graph; the name of the result and its dtype."""
    half = way.dtype in HALVES
    wide = "float32" if half and way.casts != "none" else way.dtype
    h = g.cast(x, wide) if wide != way.dtype else x
    if way.identity:
        h = g.op("Identity", h)
    stat = _statistic(g, way, h, wide)
    if way.casts == "half_mean":
        stat, wide, h = g.cast(stat, way.dtype), way.dtype, x
    if way.epsilon != "none" and way.reduction != "sum_div_eps_first":
        stat = _add_epsilon(g, way, stat, wide, way.eps)
    w = None if way.scale == "none" else _weight(g, way, wide, prefix)
    y = _scaled(g, way, h, x, stat, w, wide)
    current = way.dtype if way.casts in ("statistics", "half_mean") else wide
    if w is None or way.scale in ("factor_first", "x_first"):
        return (g.cast(y, way.dtype), way.dtype) if current != way.dtype and way.casts != "never_back" else (y, current)
    if way.casts in ("cast_then_scale", "wide_weight"):
        y, current = g.cast(y, way.dtype), way.dtype
    elif way.casts == "castlike":
        y, current = g.op("CastLike", y, x), way.dtype
    if way.casts == "wide_weight":
        y, current = g.cast(y, "float32"), "float32"
    y = g.op("Mul", w, y) if way.scale == "left" else g.op("Mul", y, w)
    return (g.cast(y, way.dtype), way.dtype) if way.casts == "scale_then_cast" else (y, current)


def _statistic(g: Graph, way: Way, h: str, dtype: str) -> str:
    rank = 2 + len(tail(way))
    axes = {"last": [-1], "positive": [rank - 1], "two": [-2, -1], "two_unsorted": [-1, -2]}[way.axes]
    keep = int(way.keepdims == "kept")
    count = math.prod(tail(way))
    if way.square in ("sum_square", "l2"):
        op = {"sum_square": "ReduceSumSquare", "l2": "ReduceL2"}[way.square]
        stat = g.reduce(op, h, axes, keep)
        if way.square == "l2":
            stat = g.op("Mul", stat, stat)
    else:
        exponent = g.constant(np.int64(2)) if way.square == "pow_int" else None
        squares = g.op("Mul", h, h) if way.square == "mul" else g.op("Pow", h, exponent or g.constant(2.0, dtype))
        stat = g.reduce("ReduceMean" if way.reduction == "mean" else "ReduceSum", squares, axes, keep)
    if way.keepdims == "unsqueeze":
        stat = g.unsqueeze(stat, [-1])
    elif way.keepdims == "unsqueeze_positive":
        stat = g.unsqueeze(stat, [rank - 1])
    elif way.keepdims == "reshape":
        stat = g.reshape(stat, [0, 0, 1])
    if way.reduction == "sum_div_eps_first":
        stat = _add_epsilon(g, way, stat, dtype, way.eps * count)
    if way.reduction in ("sum_div", "sum_div_eps_first"):
        stat = g.op("Div", stat, g.constant(float(count), dtype))
    elif way.reduction == "sum_mul":
        stat = g.op("Mul", g.constant(1.0 / count, dtype), stat)
    return stat


def _add_epsilon(g: Graph, way: Way, stat: str, dtype: str, eps: float) -> str:
    if way.epsilon == "constant":
        value = g.constant_node(eps, dtype)
    elif way.epsilon == "constant_float":
        value = g.constant_node(eps, "float32", "value_float")
    else:
        value = g.constant([eps] if way.epsilon == "one_element" else eps, dtype)
    return g.op("Add", value, stat) if way.epsilon == "left" else g.op("Add", stat, value)


def _scaled(g: Graph, way: Way, h: str, x: str, stat: str, w: str | None, dtype: str) -> str:
    divisor, factor = None, None
    one = g.constant(1.0, dtype)
    if way.root in ("div", "pow_half_div"):
        divisor = g.op("Sqrt", stat) if way.root == "div" else g.op("Pow", stat, g.constant(0.5, dtype))
    elif way.root == "reciprocal":
        factor = g.op("Reciprocal", g.op("Sqrt", stat))
    elif way.root == "one_over":
        factor = g.op("Div", one, g.op("Sqrt", stat))
    elif way.root == "pow":
        factor = g.op("Pow", stat, g.constant(-0.5, dtype))
    elif way.root == "root_of_reciprocal":
        factor = g.op("Sqrt", g.op("Reciprocal", stat))
    elif way.root == "root_of_one_over":
        factor = g.op("Sqrt", g.op("Div", one, stat))
    else:
        factor = g.op("Reciprocal", g.op("Pow", stat, g.constant(0.5, dtype)))
    if way.casts == "statistics":
        h = x
        if factor is not None:
            factor = g.cast(factor, way.dtype)
        elif divisor is not None:
            divisor = g.cast(divisor, way.dtype)
    if way.scale == "x_first" and w is not None:
        h = g.op("Mul", h, w)
    if divisor is not None:
        if way.scale == "factor_first" and w is not None:
            return g.op("Mul", h, g.op("Div", w, divisor))
        return g.op("Div", h, divisor)
    if way.scale == "factor_first" and w is not None and factor is not None:
        factor = g.op("Mul", factor, w)
    assert factor is not None
    return g.op("Mul", h, factor) if way.factor == "right" else g.op("Mul", factor, h)


def _weight(g: Graph, way: Way, wide: str, prefix: str) -> str:
    shape = tail(way)
    half = way.dtype in HALVES
    in_half = half and way.casts not in ("scale_then_cast", "never_back", "wide_weight")
    dtype = way.dtype if in_half else "float32" if half else way.dtype
    plus = way.weight in ("one_plus", "plus_one", "one_plus_cast")
    values = weight(WIDTH, "float64").reshape(shape) - float(plus)
    name = f"{prefix}norm.weight"
    kind = way.weight
    if kind == "input":
        return g.input(name, shape, dtype)
    if kind == "constant":
        return g.constant_node(values, dtype)
    if kind == "cast":
        return g.cast(g.constant(values, "float64", name), dtype)
    if kind == "dequantized":
        scale, zero = g.constant(np.float32(0.02)), g.constant(np.int8(0))
        return g.op("DequantizeLinear", g.constant(np.round(values / 0.02).astype(np.int8), None, name), scale, zero)
    if kind in ("one_plus", "plus_one", "one_plus_cast"):
        stored = way.dtype if half else dtype
        w = g.constant(values, stored, name)
        if kind == "one_plus_cast":
            return g.cast(g.op("Add", g.constant(1.0, stored), w), wide)
        if stored != dtype:
            w = g.cast(w, dtype)
        one = g.constant(1.0, dtype)
        return g.op("Add", one, w) if kind == "one_plus" else g.op("Add", w, one)
    if kind == "sum_of_computed":  # a weight that nodes compute
        return g.op("Add", g.constant(values, dtype, name), g.input("shift", shape, dtype))
    if kind in ("scalar", "one_element"):
        return g.constant(1.25 if kind == "scalar" else [1.25], dtype, name)
    lead = {"leading_one": [1], "leading_ones": [1, 1]}.get(kind, [])
    if kind == "reshape":
        return g.reshape(g.constant(values.reshape(-1, 4), dtype, name), shape)
    if kind == "unsqueeze":
        return g.unsqueeze(g.constant(values, dtype, name), [0])
    if kind == "squeeze":
        return g.op("Squeeze", g.constant(values.reshape(1, *shape), dtype, name), g.constant(np.array([0])))
    return g.constant(values.reshape(*lead, *shape), dtype, name)


def ways() -> dict[str, Way]:
    """Spellings in which each choice of each field is met, from several starting points."""
    found: dict[str, Way] = {}
    fields: dict[str, tuple[Any, ...]] = {
        "square": SQUARES, "reduction": REDUCTIONS, "axes": AXES, "keepdims": KEEPDIMS, "epsilon": EPSILONS,
        "root": ROOTS, "factor": FACTORS, "scale": SCALES, "weight": WEIGHTS, "casts": CASTS, "identity": (True,),
        "opset": OPSETS, "eps": (1e-5, 1e-12, 1e-3),
    }  # fmt: skip
    starts = {
        "dynamo": Way(),
        "torchscript": Way(root="one_over", opset=13, epsilon="constant", eps=1e-5),
        "ort": Way(root="div", scale="right", eps=1e-5),
        "jax": Way(square="mul", reduction="sum_div", keepdims="reshape", root="reciprocal", scale="factor_first"),
        "half": Way(dtype="float16", casts="cast_then_scale", eps=1e-5),
        "wide": Way(dtype="float16", casts="scale_then_cast", root="pow", square="mul", eps=1e-5),
        "all half": Way(dtype="float16", eps=1e-3, root="div"),
        "double": Way(dtype="float64", root="one_over", eps=EXACT),
        "brain": Way(dtype="bfloat16", casts="cast_then_scale", eps=1e-5, opset=20),
    }
    for start, base in starts.items():
        found[start] = base
        for field, choices in fields.items():
            for choice in choices:
                way = replace(base, **{field: choice})
                if field == "square" and choice in ("sum_square", "l2") and way.reduction == "mean":
                    way = replace(way, reduction="sum_mul")
                if way not in found.values() and legal(way):
                    found[f"{start}, {field} {choice}"] = way
    return found


WAYS = ways()
SPELLINGS: dict[str, Spelling] = {
    name: Spelling(name, lambda way=way: build(way), (Expected(expected(way)),), runs=way.dtype != "bfloat16")
    for name, way in WAYS.items()
}
OUTPUT_DTYPES = {value: key for key, value in FLOATS.items()}
