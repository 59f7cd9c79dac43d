"""RMSNorms with something around them: residual adds, groups, gates, bias, control flow, functions, fused operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import helper

from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins import contract

from ..graphs.graph_text import FLOATS, Graph, numpy_type, weight
from ..spellings.norm_spellings import HALVES, WIDTH, Expected, Spelling, Way, expected, norm

PLAIN = NormSpec(eps=1e-6)
FUSED = NormSpec(eps=1e-5, root="sqrt")
WAYS = {
    "dynamo": Way(), "div": Way(root="div", square="mul"),
    "half": Way(dtype="float16", casts="cast_then_scale", eps=1e-5),
    "wide": Way(dtype="float16", casts="scale_then_cast", eps=1e-5),
}  # fmt: skip
DIMS: list[Any] = ["batch", "length", WIDTH]


# Residual adds ----------------------------------------------------------------------------------------------------


def residual(way: Way, swapped: bool, used: str) -> onnx.ModelProto:
    g = Graph(way.opset)
    a, b = g.input("a", DIMS, way.dtype), g.input("b", DIMS, way.dtype)
    total = g.op("Add", *((b, a) if swapped else (a, b)))
    y, dtype = norm(g, way, total)
    g.output(y, dtype)
    if used == "output":
        g.output(total, way.dtype)
    elif used == "elsewhere":
        g.output(g.op("Neg", total), way.dtype)
    return g.model()


def chain(way: Way, count: int) -> onnx.ModelProto:
    """A residual stream: each sum is normalized, and what comes of it is added to it."""
    g = Graph(way.opset)
    x = g.input("x", DIMS, way.dtype)
    for number in range(count):
        y, _ = norm(g, way, x, f"layers.{number}.")
        x = g.op("Add", x, g.op("Neg", y))
    y, dtype = norm(g, way, x, "last.")
    g.output(y, dtype)
    return g.model()


def broadcast(shape: list[Any] | None, constant: bool) -> onnx.ModelProto:
    """An add that is none of two values of x's shape."""
    g = Graph()
    a = g.input("a", DIMS)
    b = g.constant(np.ones(WIDTH, np.float32)) if constant else g.input("b", shape)
    y, dtype = norm(g, Way(), g.op("Add", a, b))
    g.output(y, dtype)
    return g.model()


def residuals() -> Iterable[Spelling]:
    for name, way in WAYS.items():
        found = Expected(expected(way), "residual_add")
        for swapped in (False, True):
            for used in ("nowhere", "output", "elsewhere"):
                order = "b + a" if swapped else "a + b"
                yield Spelling(
                    f"residual {name}, {order}, sum used {used}", partial(residual, way, swapped, used), (found,)
                )
        yield Spelling(f"three residuals, {name}", partial(chain, way, 3), (Expected(found.spec), *([found] * 3)))
    for name, shape in {"one row": [1, 1, WIDTH], "other names": ["b", "l", WIDTH], "vector": [WIDTH]}.items():
        yield Spelling(f"add of {name}", partial(broadcast, shape, False), (Expected(PLAIN),))
    yield Spelling("add of a constant", partial(broadcast, None, True), (Expected(PLAIN),))


# Groups, heads, gates, bias ---------------------------------------------------------------------------------------


def grouped(way: Way, back: str, gate: str, bias: bool) -> onnx.ModelProto:
    """As Mamba2 and its relatives do it: x * silu(gate), cut in groups, normalized, joined, scaled."""
    g = Graph(way.opset)
    x = g.input("x", DIMS, way.dtype)
    half = way.dtype in HALVES
    h = g.cast(x, "float32") if half else x
    if gate == "before":
        h = g.op("Mul", h, _silu(g, g.input("gate", DIMS, way.dtype), half))
    cut = g.reshape(h, [0, 0, 4, WIDTH // 4])
    inner = Way(root=way.root, square=way.square, scale="none", eps=way.eps, opset=way.opset)
    y, _ = norm(g, inner, cut)
    if back == "shape":
        y = g.op("Reshape", y, g.op("Shape", h))
    else:
        y = g.reshape(y, [0, 0, -1] if back == "minus one" else [0, 0, WIDTH])
    if half and way.casts == "cast_then_scale":
        y = g.cast(y, way.dtype)
    w = g.constant(weight(WIDTH, way.dtype if half else "float32"), None, "norm.weight")
    y = g.op("Mul", y, w) if way.casts != "scale_then_cast" else g.cast(g.op("Mul", y, g.cast(w, "float32")), way.dtype)
    if bias:
        y = g.op("Add", y, g.constant(weight(WIDTH, way.dtype, 1)))
    g.output(y, way.dtype)
    return g.model()


def _silu(g: Graph, gate: str, half: bool, activation: str = "silu") -> str:
    z = g.cast(gate, "float32") if half else gate
    sigmoid = g.op("Sigmoid", z)
    return g.op("Mul", z, sigmoid) if activation == "silu" else sigmoid


def gated(way: Way, activation: str, left: bool) -> onnx.ModelProto:
    """As Qwen3-Next does it: the finished norm times act(gate), in float32."""
    g = Graph(way.opset)
    x, z = g.input("x", DIMS, way.dtype), g.input("gate", DIMS, way.dtype)
    half = way.dtype in HALVES
    y, dtype = norm(g, way, x)
    wide = g.cast(y, "float32") if half else y
    gate = _silu(g, z, half, activation)
    y = g.op("Mul", gate, wide) if left else g.op("Mul", wide, gate)
    g.output(g.cast(y, dtype) if half else y, dtype)
    return g.model()


def per_head(way: Way, positive: bool) -> onnx.ModelProto:
    g = Graph(way.opset)
    x = g.input("x", ["batch", "length", 2 * WIDTH], way.dtype)
    heads = g.reshape(x, [0, 0, 2, WIDTH])
    h = g.op("Transpose", heads, perm=[0, 2, 1, 3]) if positive else heads
    y, dtype = norm(g, way, h)
    g.output(g.op("Transpose", y, perm=[0, 2, 1, 3]), dtype)
    return g.model()


def shapes() -> Iterable[Spelling]:
    for name, way in {"dynamo": WAYS["dynamo"], "div": WAYS["div"], "half": WAYS["half"], "wide": WAYS["wide"]}.items():
        base = expected(way)
        for back in ("minus one", "static", "shape"):
            for gate in ("none", "before"):
                spec = base.replace(group_size=WIDTH // 4)
                if gate == "before":
                    spec = spec.replace(gate="before", activation="silu")
                yield Spelling(
                    f"groups {name}, back by {back}, gate {gate}",
                    partial(grouped, way, back, gate, False),
                    (Expected(spec),),
                )
        spec = base.replace(group_size=WIDTH // 4, bias=True)
        if way.casts != "scale_then_cast":
            yield Spelling(f"groups and bias {name}", partial(grouped, way, "static", "none", True), (Expected(spec),))
        for activation in ("silu", "sigmoid"):
            for left in (False, True):
                if way.casts == "scale_then_cast":
                    continue
                spec = base.replace(gate="after", activation=activation)
                side = "left" if left else "right"
                yield Spelling(
                    f"gate after {name}, {activation} {side}", partial(gated, way, activation, left), (Expected(spec),)
                )
        for positive in (False, True):
            yield Spelling(f"heads {name}, transposed {positive}", partial(per_head, way, positive), (Expected(base),))


# Control flow and functions ---------------------------------------------------------------------------------------


def in_branches(way: Way) -> onnx.ModelProto:
    g = Graph(way.opset)
    x = g.input("x", DIMS, way.dtype)
    g.inputs.append(helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    bodies = []
    for branch in ("then", "else"):
        inner = Graph(way.opset)
        inner._count = 100 if branch == "then" else 200
        y, dtype = norm(inner, way, x, f"{branch}.")
        inner.output(y, dtype, DIMS)
        bodies.append(inner.graph(branch))
    y = g.op("If", "flag", then_branch=bodies[0], else_branch=bodies[1])
    g.output(y, way.dtype, DIMS)
    return g.model()


def in_loop(way: Way) -> onnx.ModelProto:
    g = Graph(way.opset)
    x = g.input("x", DIMS, way.dtype)
    inner = Graph(way.opset)
    inner._count = 100
    inner.inputs = [
        helper.make_tensor_value_info("step", onnx.TensorProto.INT64, []),
        helper.make_tensor_value_info("going", onnx.TensorProto.BOOL, []),
        helper.make_tensor_value_info("carried", FLOATS[way.dtype], DIMS),
    ]
    y, dtype = norm(inner, way, "carried")
    inner.outputs = [helper.make_tensor_value_info(inner.op("Identity", "going"), onnx.TensorProto.BOOL, [])]
    inner.output(y, dtype, DIMS)
    going = g.op("Constant", value=onnx.numpy_helper.from_array(np.array(True)))
    y = g.op("Loop", g.constant(np.int64(3)), going, x, body=inner.graph("body"))
    g.output(y, way.dtype, DIMS)
    return g.model()


def in_scan(way: Way) -> onnx.ModelProto:
    g = Graph(way.opset)
    x = g.input("x", [5, "length", WIDTH], way.dtype)
    inner = Graph(way.opset)
    inner._count = 100
    inner.input("row", ["length", WIDTH], way.dtype)
    y, dtype = norm(inner, way, "row")
    inner.output(y, dtype, ["length", WIDTH])
    g.output(g.op("Scan", x, body=inner.graph("body"), num_scan_inputs=1), way.dtype, [5, "length", WIDTH])
    return g.model()


def function(g: Graph, name: str, inputs: list[str], write: Callable[[Graph], str]) -> None:
    """Add a model-local function to a model; its constants are nodes."""
    inner = Graph(g.opset)
    result = write(inner)
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in inner.initializers]
    opsets = [helper.make_opsetid("", g.opset), helper.make_opsetid("test", 1)]
    g.functions.append(helper.make_function("test", name, inputs, [result], [*constants, *inner.nodes], opsets))


def in_function(way: Way, nested: bool) -> onnx.ModelProto:
    """A function that is called twice, with the weight as input; nested, a helper squares inside of it."""
    g = Graph(way.opset)
    x = g.input("x", DIMS, way.dtype)
    if nested:
        function(g, "Square", ["v"], lambda inner: inner.op("Mul", "v", "v"))

    def write(inner: Graph) -> str:
        squares = inner.op("Square", "h", domain="test") if nested else inner.op("Mul", "h", "h")
        stat = inner.op("Add", inner.reduce("ReduceMean", squares, [-1]), inner.constant(np.float32(1e-6)))
        return inner.op("Mul", "w", inner.op("Mul", "h", inner.op("Reciprocal", inner.op("Sqrt", stat))))

    function(g, "Norm", ["h", "w"], write)
    for number in range(2):
        w = g.constant(weight(WIDTH, seed=number), None, f"layers.{number}.norm.weight")
        x = g.op("Relu", g.op("Norm", x, w, domain="test"))
    g.output(x, way.dtype)
    return g.model()


def places() -> Iterable[Spelling]:
    for name, way in {"dynamo": WAYS["dynamo"], "div": WAYS["div"], "half": WAYS["half"]}.items():
        one = Expected(expected(way))
        yield Spelling(f"in both branches of If, {name}", partial(in_branches, way), (one, one))
        yield Spelling(f"in a Loop, {name}", partial(in_loop, way), (one,))
        yield Spelling(f"in a Scan, {name}", partial(in_scan, way), (one,))
    for nested in (False, True):
        yield Spelling(f"in a function, nested {nested}", partial(in_function, Way(), nested), (Expected(PLAIN),) * 2)


# Fused operators --------------------------------------------------------------------------------------------------


def fused(
    op_type: str, dtype: str, opset: int, domain: str = "", wrapped: bool = False, **attributes: Any
) -> onnx.ModelProto:
    g = Graph(opset)
    x = g.input("x", ["batch", 3, WIDTH], dtype)
    h, inner = (g.cast(x, "float32"), "float32") if wrapped else (x, dtype)
    axis = attributes.get("axis", -1)
    shape = [3, WIDTH] if axis in (-2, 1) else [WIDTH]
    w = g.constant(np.resize(weight(WIDTH), shape).astype(numpy_type(inner)), None, "norm.weight")
    y = g.op(op_type, h, w, domain=domain, **attributes)
    g.output(g.cast(y, dtype) if wrapped else y, dtype)
    return g.model()


def fused_then_scaled(op_type: str, opset: int) -> onnx.ModelProto:
    g = Graph(opset)
    x = g.input("x", DIMS)
    y = g.op(op_type, x, g.constant(np.ones(WIDTH, np.float32)), axis=-1, epsilon=1e-5)
    g.output(g.op("Mul", y, g.constant(weight(WIDTH), None, "norm.weight")))
    return g.model()


def mixed() -> onnx.ModelProto:
    """x in float16 and the scale in float32, as torch writes it at opset 23."""
    g = Graph(23)
    x = g.input("x", DIMS, "float16")
    y = g.op("RMSNormalization", x, g.constant(weight(WIDTH), None, "norm.weight"), axis=-1, epsilon=1e-5)
    g.output(g.cast(y, "float16"), "float16")
    return g.model()


def skip(dtype: str, total: bool, bias: bool = False) -> onnx.ModelProto:
    g = Graph()
    a, b = g.input("a", DIMS, dtype), g.input("b", DIMS, dtype)
    inputs = [a, b, g.constant(weight(WIDTH, dtype), None, "norm.weight")]
    if bias:
        inputs.append(g.constant(weight(WIDTH, dtype, 1)))
    y = g.op("SkipSimplifiedLayerNormalization", *inputs, domain="com.microsoft", outputs=4, epsilon=1e-5)
    if total:
        g.nodes[-1].output[1:3] = ["", ""]
        g.output(g.op("Neg", g.nodes[-1].output[3]), dtype)
    else:
        del g.nodes[-1].output[1:]
    g.output(y, dtype)
    return g.model()


def plugin(dtype: str, added: bool, scale_type: str, offset: float) -> onnx.ModelProto:
    import onnx_ir as ir

    from rmsnorm_deploy.export.lowering.plugin_functions import plugin_function

    g = Graph()
    names = [g.input(name, DIMS, dtype) for name in (("a", "b") if added else ("x",))]
    op_type = contract.ADD_RMS_NORM if added else contract.RMS_NORM
    w = g.constant(weight(WIDTH, dtype) - numpy_type(dtype).type(offset), None, "norm.weight")
    attributes = {
        "epsilon": 1e-5,
        "scale_offset": offset,
        "scale_type": FLOATS[scale_type],
        **contract.PARSER_ATTRIBUTES,
    }
    y = g.op(op_type, *names, w, domain=contract.DOMAIN, outputs=1 + added, **attributes)
    g.output(y, dtype)
    g.functions.append(ir.to_proto(plugin_function(op_type)))
    return g.model()


def fused_operators() -> Iterable[Spelling]:
    first = FUSED.replace(order="cast_then_scale")
    # The operators hold epsilon as float32.
    double = FUSED.replace(order="no_upcast", statistics="input", eps=float(np.float32(1e-5)))
    for axis in ({}, {"axis": -1}, {"axis": 2}, {"axis": -2}):
        spec = FUSED.replace(trailing_dims=2) if axis == {"axis": -2} else FUSED
        build = partial(fused, "RMSNormalization", "float32", 23, **axis)
        yield Spelling(f"RMSNormalization {axis}", build, (Expected(spec),))
        if axis:
            build = partial(fused, "SimplifiedLayerNormalization", "float32", 17, **axis)
            yield Spelling(f"SimplifiedLayerNormalization {axis}", build, (Expected(spec),), "onnxruntime")
    for dtype, specs in {"float16": (first, FUSED), "bfloat16": (first, FUSED), "float64": (double, double)}.items():
        for op_type, spec, opset in zip(
            ("RMSNormalization", "SimplifiedLayerNormalization"), specs, (23, 17), strict=True
        ):
            build = partial(
                fused, op_type, dtype, opset, axis=-1, epsilon=1e-5, stash_type=11 if dtype == "float64" else 1
            )
            yield Spelling(f"{op_type} {dtype}", build, (Expected(spec),), runs=dtype != "bfloat16")
    build = partial(fused, "RMSNormalization", "float16", 23, wrapped=True)
    yield Spelling("RMSNormalization in float32 between casts", build, (Expected(FUSED),))
    build = partial(fused, "SimplifiedLayerNormalization", "float32", 17, "com.microsoft", axis=-1)
    yield Spelling("SimplifiedLayerNormalization of com.microsoft", build, (Expected(FUSED),), runs=False)
    for op_type, opset in (("RMSNormalization", 23), ("SimplifiedLayerNormalization", 18)):
        yield Spelling(
            f"{op_type} of ones, then scaled", partial(fused_then_scaled, op_type, opset), (Expected(FUSED),)
        )
    yield Spelling("RMSNormalization of mixed dtypes", mixed, (Expected(FUSED),), "torch", runs=False)
    for dtype in ("float32", "float16"):
        for total in (False, True):
            name = f"SkipSimplifiedLayerNormalization {dtype}, sum {total}"
            yield Spelling(
                name, partial(skip, dtype, total), (Expected(FUSED, "residual_add"),), "onnxruntime-genai style"
            )
    for dtype, scale_type, offset in (
        ("float32", "float32", 0.0), ("float16", "float32", 0.0), ("float16", "float16", 0.0),
        ("float16", "float32", 1.0), ("float16", "float16", 1.0), ("float32", "float32", 1.0),
    ):  # fmt: skip
        half = scale_type in HALVES
        spec = FUSED.replace(
            order="cast_then_scale" if half else "scale_then_cast", offset_in_float32=not (half and offset == 1.0),
            scale="one_plus_weight" if offset else "weight",
        )  # fmt: skip
        for added in (False, True):
            name = f"{'AddRMSNorm' if added else 'RMSNorm'} {dtype}, {scale_type} scale + {offset:g}"
            build = partial(plugin, dtype, added, scale_type, offset)
            yield Spelling(name, build, (Expected(spec, "residual_add" if added else "plain"),), "plugin")


PLACES: dict[str, Spelling] = {
    spelling.name: spelling for group in (residuals, shapes, places, fused_operators) for spelling in group()
}
