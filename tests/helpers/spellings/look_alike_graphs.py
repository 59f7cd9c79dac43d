"""Graphs that look like an RMSNorm and are none: nothing in them may be recognized."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx

from rmsnorm_deploy.plugins import contract

from ..graphs.graph_text import Graph, weight
from ..spellings.norm_spellings import WIDTH

DIMS: list[Any] = ["batch", "length", WIDTH]
Write = Callable[[Graph, str], str]


def model(write: Write, dims: list[Any] | None = None, opset: int = 18, dtype: str = "float32") -> onnx.ModelProto:
    """A model from x to what `write` makes of it."""
    g = Graph(opset)
    g.output(write(g, g.input("x", dims or DIMS, dtype)), dtype)
    return g.model()


def eps(g: Graph, value: str, amount: float = 1e-6) -> str:
    return g.op("Add", value, g.constant(np.float32(amount)))


def mean(g: Graph, value: str, axes: list[int] | None = None) -> str:
    return g.reduce("ReduceMean", value, axes or [-1])


def square(g: Graph, value: str) -> str:
    return g.op("Pow", value, g.constant(np.float32(2)))


def scaled(g: Graph, value: str) -> str:
    return g.op("Mul", value, g.constant(weight(WIDTH), None, "norm.weight"))


def rsqrt(g: Graph, value: str) -> str:
    return g.op("Reciprocal", g.op("Sqrt", value))


def over_root(g: Graph, x: str, stat: str) -> str:
    return scaled(g, g.op("Div", x, g.op("Sqrt", stat)))


# LayerNorm and its relatives --------------------------------------------------------------------------------------


def layer_norm(g: Graph, x: str, center: str, spelling: str) -> str:
    m = mean(g, x)
    if center == "sum":
        m = g.op("Div", g.reduce("ReduceSum", x, [-1]), g.constant(np.float32(WIDTH)))
    if center == "neg":
        d = g.op("Add", x, g.op("Neg", m))
    elif center == "neg left":
        d = g.op("Add", g.op("Neg", m), x)
    elif center == "cast":
        d = g.cast(g.cast(g.op("Sub", x, m), "float64"), "float32")
    elif center == "squeezed":
        flat = g.reduce("ReduceMean", x, [-1], 0)
        d = g.op("Sub", x, g.unsqueeze(flat, [-1]))
    else:
        d = g.op("Sub", x, m)
    if spelling == "reciprocal":
        return scaled(g, g.op("Mul", d, rsqrt(g, eps(g, mean(g, g.op("Mul", d, d))))))
    if spelling == "pow":
        return scaled(g, g.op("Mul", d, g.op("Pow", eps(g, mean(g, square(g, d))), g.constant(np.float32(-0.5)))))
    return over_root(g, d, eps(g, mean(g, square(g, d))))


def second_moment(g: Graph, x: str) -> str:
    """var = mean(x^2) - mean(x)^2."""
    m = mean(g, x)
    variance = g.op("Sub", mean(g, square(g, x)), g.op("Mul", m, m))
    return over_root(g, g.op("Sub", x, m), eps(g, variance))


def standard_deviation(g: Graph, x: str) -> str:
    d = g.op("Sub", x, mean(g, x))
    return over_root(g, x, eps(g, mean(g, square(g, d))))


# L2 and similarity ------------------------------------------------------------------------------------------------


def l2(g: Graph, x: str, spelling: str) -> str:
    total = g.reduce("ReduceSum", square(g, x), [-1])
    if spelling == "inside":
        return scaled(g, g.op("Mul", x, rsqrt(g, eps(g, total))))
    if spelling == "plain":
        return over_root(g, x, total)
    root = g.reduce("ReduceL2", x, [-1])
    if spelling == "clip":
        root = g.op("Clip", root, g.constant(np.float32(1e-12)))
    elif spelling == "max":
        root = g.op("Max", root, g.constant(np.float32(1e-12)))
    elif spelling == "max inside":
        root = g.op("Sqrt", g.op("Max", total, g.constant(np.float32(1e-12))))
    elif spelling == "outside":
        root = eps(g, root)
    elif spelling == "expanded":
        root = g.op("Expand", g.op("Clip", root, g.constant(np.float32(1e-12))), g.op("Shape", x))
    return scaled(g, g.op("Div", x, root))


def clipped_rms(g: Graph, x: str) -> str:
    """F.normalize(x) * sqrt(n) * w: equal to an RMSNorm but where the bound acts."""
    root = g.op("Clip", g.reduce("ReduceL2", x, [-1]), g.constant(np.float32(1e-12)))
    return scaled(g, g.op("Mul", g.op("Div", x, root), g.constant(np.float32(WIDTH**0.5))))


def cosine(g: Graph, x: str) -> str:
    other = g.op("Tanh", x)
    dot = g.reduce("ReduceSum", g.op("Mul", x, other), [-1])
    roots = g.op("Mul", g.reduce("ReduceL2", x, [-1]), g.reduce("ReduceL2", other, [-1]))
    return g.op("Div", dot, eps(g, roots))


def normalized_dot(g: Graph, x: str) -> str:
    """q k / (|q| |k|), one division after the other."""
    roots = [g.op("Sqrt", eps(g, g.reduce("ReduceSum", square(g, v), [-1]))) for v in (x, g.op("Tanh", x))]
    dot = g.op("Mul", x, g.op("Tanh", x))
    return g.op("Div", g.op("Div", dot, roots[0]), roots[1])


# Nearly right -----------------------------------------------------------------------------------------------------


def wrong(g: Graph, x: str, what: str) -> str:
    """An RMSNorm with one thing in it changed."""
    h = x
    if what == "cubed":
        squares = g.op("Pow", x, g.constant(np.float32(3)))
    elif what == "fourth":
        squares = square(g, square(g, x))
    elif what == "absolute":
        squares = g.op("Abs", x)
    elif what == "product":
        squares = g.op("Mul", x, g.op("Relu", x))
    elif what == "clamped":
        squares = g.op("Min", square(g, x), g.constant(np.float32(100)))
    elif what == "rounded":
        squares = g.op("Round", square(g, x))
    elif what == "weighted squares":
        squares = scaled(g, square(g, x))
    else:
        squares = square(g, x)
    if what in ("axis 0", "axis 1", "axes 0 and 2", "positive axis"):
        stat = mean(g, squares, {"axis 0": [0], "axis 1": [-2], "axes 0 and 2": [0, 2], "positive axis": [1]}[what])
    elif what == "max":
        stat = g.reduce("ReduceMax", squares, [-1])
    elif what == "sum / 2n":
        stat = g.op("Div", g.reduce("ReduceSum", squares, [-1]), g.constant(np.float32(2 * WIDTH)))
    elif what == "sum / (n - 1)":
        stat = g.op("Div", g.reduce("ReduceSum", squares, [-1]), g.constant(np.float32(WIDTH - 1)))
    elif what == "sum * n":
        stat = g.op("Mul", g.reduce("ReduceSum", squares, [-1]), g.constant(np.float32(WIDTH)))
    elif what == "double mean":
        stat = mean(g, mean(g, squares), [-2])
    elif what == "running":
        stat = g.op("Add", mean(g, squares), g.input("state", [1, 1, 1]))
    elif what == "window":
        stat = mean(g, g.op("Slice", squares, *(g.constant(np.array([v])) for v in (0, WIDTH // 2, -1))))
    else:
        stat = mean(g, squares)
    if what == "negative eps":
        stat = g.op("Sub", stat, g.constant(np.float32(1e-3)))
    elif what == "computed eps":
        stat = g.op("Add", stat, g.op("Abs", g.input("amount", [1])))
    elif what == "eps per channel":
        stat = g.op("Add", stat, g.constant(np.full(WIDTH, 1e-6, np.float32)))
    elif what == "bounded":
        stat = g.op("Max", stat, g.constant(np.float32(1e-6)))
    elif what != "eps outside":
        stat = eps(g, stat)
    if what == "quantized":
        q = [g.constant(np.float32(0.01)), g.constant(np.int8(0))]
        stat = g.op("DequantizeLinear", g.op("QuantizeLinear", stat, *q), *q)
    elif what == "noise":
        stat = g.op("Mul", stat, g.op("RandomUniformLike", stat))
    elif what == "stat of relu":
        h = g.op("Relu", x)
    elif what == "sum scaled":
        h = g.op("Add", x, g.op("Tanh", x))
    elif what == "sliced":
        part = g.op("Slice", x, *(g.constant(np.array([v])) for v in (0, WIDTH // 4, -1)))
        h = g.op("Concat", part, part, part, part, axis=-1)
    if what == "power -1":
        return scaled(g, g.op("Div", h, stat))
    if what == "power -1/4":
        return scaled(g, g.op("Mul", h, g.op("Pow", stat, g.constant(np.float32(-0.25)))))
    root = g.op("Sqrt", stat)
    if what == "eps outside":
        root = eps(g, root)
    elif what == "root + 1":
        root = g.op("Add", root, g.constant(np.float32(1)))
    elif what == "times root":
        return scaled(g, g.op("Mul", h, root))
    elif what == "root over x":
        return g.op("Div", root, h)
    elif what == "log":
        return scaled(g, g.op("Div", h, g.op("Log", root)))
    elif what == "subtracted":
        return scaled(g, g.op("Sub", h, root))
    return scaled(g, g.op("Div", h, root))


WRONG = (
    "cubed", "fourth", "absolute", "product", "clamped", "rounded", "weighted squares", "axis 0", "axis 1",
    "axes 0 and 2", "positive axis", "max", "sum / 2n", "sum / (n - 1)", "sum * n", "double mean", "running", "window",
    "negative eps", "computed eps", "eps per channel", "bounded", "quantized", "noise", "stat of relu", "sum scaled",
    "sliced", "power -1", "power -1/4", "eps outside", "root + 1", "times root", "root over x", "log",
    "subtracted",
)  # fmt: skip


# Other normalizations ---------------------------------------------------------------------------------------------


def softmax_scaling(g: Graph, x: str) -> str:
    scores = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))
    return g.op("MatMul", g.op("Softmax", g.op("Div", scores, g.op("Sqrt", g.constant(np.float32(64)))), axis=-1), x)


def softmax_by_hand(g: Graph, x: str) -> str:
    e = g.op("Exp", g.op("Sub", x, g.reduce("ReduceMax", x, [-1])))
    return g.op("Div", e, g.reduce("ReduceSum", e, [-1]))


def squared_softmax(g: Graph, x: str) -> str:
    squares = square(g, x)
    return g.op("Div", squares, eps(g, g.reduce("ReduceSum", squares, [-1])))


def rms_loss(g: Graph, x: str) -> str:
    return g.op("Sqrt", eps(g, mean(g, square(g, g.op("Sub", x, g.op("Tanh", x))))))


def rms_output(g: Graph, x: str) -> str:
    return g.op("Sqrt", eps(g, mean(g, square(g, x))))


def response(g: Graph, x: str) -> str:
    """ConvNeXt V2's global response normalization."""
    norm = g.reduce("ReduceL2", x, [1])
    return scaled(g, g.op("Mul", x, g.op("Div", norm, eps(g, mean(g, norm)))))


def energy(g: Graph, x: str) -> str:
    """Power of the signal in decibels."""
    return g.op("Log", eps(g, mean(g, square(g, x))))


def variance_gate(g: Graph, x: str) -> str:
    return g.op("Mul", x, g.op("Sigmoid", mean(g, square(g, x))))


def adam(g: Graph, x: str) -> str:
    """m / (sqrt(v) + eps) with v = x^2, no reduction at all."""
    return g.op("Div", x, eps(g, g.op("Sqrt", square(g, x))))


def squeezed(g: Graph, x: str) -> str:
    """The reduced dims are gone, and the factors meet the wrong dim of a square matrix."""
    return g.op("Div", x, g.op("Sqrt", eps(g, g.reduce("ReduceMean", square(g, x), [-1], 0))))


def straddling(g: Graph, x: str) -> str:
    """Statistics over groups of two rows, which no reshape puts back."""
    cut = g.reshape(x, [-1, 2 * WIDTH])
    factor = rsqrt(g, eps(g, mean(g, square(g, cut))))
    return g.op("Mul", g.reshape(cut, [-1, WIDTH]), g.op("Concat", factor, factor, axis=0))


def other_rows(g: Graph, x: str) -> str:
    """Factors of one row scale another."""
    factor = rsqrt(g, eps(g, mean(g, square(g, x))))
    return g.op("Mul", x, g.op("Transpose", factor, perm=[1, 0, 2]))


def batch_norm_by_hand(g: Graph, x: str) -> str:
    m = mean(g, x, [0])
    return over_root(g, g.op("Sub", x, m), eps(g, mean(g, square(g, g.op("Sub", x, m)), [0])))


def instance_norm_by_hand(g: Graph, x: str) -> str:
    d = g.op("Sub", x, mean(g, x, [-2, -1]))
    return g.op("Div", d, g.op("Sqrt", eps(g, mean(g, square(g, d), [-2, -1]))))


def operator(op_type: str, *extra: Any, **attributes: Any) -> Write:
    def write(g: Graph, x: str) -> str:
        return g.op(op_type, x, *(g.constant(value) for value in extra), **attributes)

    return write


def everywhere(g: Graph, x: str) -> str:
    """One statistic for the whole tensor, batch and all."""
    return over_root(g, x, eps(g, g.op("ReduceMean", square(g, x), keepdims=1)))


def overridable(g: Graph, x: str) -> str:
    """An epsilon that is a graph input with a default."""
    name = g.constant(np.float32(1e-6), None, "epsilon")
    g.input(name, [])
    return over_root(g, x, g.op("Add", mean(g, square(g, x)), name))


def stretched(g: Graph, x: str, which: str) -> str:
    """A constant of one element that has more dims than x: the result has them too, and is not a norm of x."""

    def number(value: float, name: str) -> str:
        return g.constant(np.full([1] * 4 if name == which else [], value, np.float32))

    total = g.reduce("ReduceSum", g.op("Pow", x, number(2, "exponent")), [-1], 0)
    if which == "flat sum":
        total = g.op("Mul", total, g.constant(np.ones([1, 1, 1], np.float32)))
    stat = g.op("Add", g.op("Div", g.unsqueeze(total, [-1]), number(WIDTH, "n")), number(1e-6, "epsilon"))
    return scaled(g, g.op("Mul", x, g.op("Div", number(1, "one"), g.op("Sqrt", stat))))


def rounded(g: Graph, x: str, what: str, dtype: int) -> str:
    """x, its squares or their mean pass a dtype that no statistics have."""

    def there_and_back(value: str, name: str) -> str:
        return g.cast(g.op("Cast", value, to=dtype), "float32") if name == what else value

    h = there_and_back(x, "x")
    return over_root(g, x, eps(g, there_and_back(mean(g, there_and_back(g.op("Mul", h, h), "squares")), "mean")))


def rounded_double(g: Graph, x: str) -> str:
    stat = g.cast(g.cast(mean(g, g.op("Mul", x, x)), "float32"), "float64")
    return g.op("Div", x, g.op("Sqrt", g.op("Add", stat, g.constant(np.float64(2.0**-20)))))


def not_reduced(g: Graph, x: str) -> str:
    return over_root(g, x, eps(g, g.op("ReduceMean", square(g, x), keepdims=1, noop_with_empty_axes=1)))


def live_axes(g: Graph, x: str) -> str:
    axes = g.input("axes", [1], "int64")
    return over_root(g, x, eps(g, g.op("ReduceMean", square(g, x), axes, keepdims=1)))


def dropped(g: Graph, x: str) -> str:
    """Dropout in training mode inside of the statistics."""
    return over_root(
        g, x, eps(g, mean(g, g.op("Dropout", square(g, x), g.constant(np.float32(0.5)), g.constant(True))))
    )


def selected(g: Graph, x: str) -> str:
    """The factor never exceeds 1."""
    factor, one = rsqrt(g, eps(g, mean(g, square(g, x)))), g.constant(np.float32(1))
    return scaled(g, g.op("Mul", x, g.op("Where", g.op("Greater", factor, one), one, factor)))


def other_operand(g: Graph, x: str, what: str) -> str:
    """What is squared and what is scaled differ by a sign, a factor or a place."""
    three = g.constant(np.float32(3))
    if what == "negative":
        return g.op("Mul", g.op("Neg", x), rsqrt(g, eps(g, mean(g, square(g, x)))))
    if what == "three times":
        return scaled(g, g.op("Mul", x, rsqrt(g, eps(g, mean(g, square(g, g.op("Mul", x, three)))))))
    factor = g.op("Transpose", rsqrt(g, eps(g, mean(g, square(g, x)))), perm=[0, 2, 1])
    return g.op("Mul", g.op("Transpose", x, perm=[0, 2, 1]), factor)


def odd_scale(op_type: str, domain: str, shape: list[int], inputs: int) -> onnx.ModelProto:
    """An operator whose scale has another shape than the last dim."""
    g = Graph()
    names = [g.input(name, DIMS) for name in ("x", "residual")[: inputs - 1]]
    g.output(g.op(op_type, *names, g.constant(np.resize(weight(WIDTH), shape)), domain=domain, epsilon=1e-5))
    return g.model()


def odd_operators() -> Iterable[tuple[str, onnx.ModelProto]]:
    microsoft, ours = "com.microsoft", contract.DOMAIN
    skip = "SkipSimplifiedLayerNormalization"
    for shape in ([1], [1, WIDTH], [WIDTH, 1], [3, WIDTH]):
        yield f"{skip} with a scale of {shape}", odd_scale(skip, microsoft, shape, 3)
        yield f"AddRMSNorm with a scale of {shape}", odd_scale(contract.ADD_RMS_NORM, ours, shape, 3)
    for shape in ([WIDTH, 1], [3, WIDTH], [1, 1, 1, WIDTH]):
        yield f"RMSNorm with a scale of {shape}", odd_scale(contract.RMS_NORM, ours, shape, 2)


def look_alikes() -> Iterable[tuple[str, onnx.ModelProto]]:
    for center in ("sub", "neg", "neg left", "sum", "cast", "squeezed"):
        for spelling in ("div", "reciprocal", "pow"):
            yield f"LayerNorm, {center}, {spelling}", model(lambda g, x, c=center, s=spelling: layer_norm(g, x, c, s))
    for spelling in ("inside", "plain", "l2", "clip", "max", "max inside", "outside", "expanded"):
        yield f"L2 norm, {spelling}", model(lambda g, x, s=spelling: l2(g, x, s))
    for what in WRONG:
        yield f"RMSNorm but {what}", model(lambda g, x, w=what: wrong(g, x, w))
    writers: tuple[Write, ...] = (
        second_moment, standard_deviation, clipped_rms, cosine, normalized_dot, softmax_scaling, softmax_by_hand,
        squared_softmax, rms_loss, rms_output, response, energy, variance_gate, adam, other_rows, batch_norm_by_hand,
        instance_norm_by_hand, everywhere, overridable, not_reduced, live_axes, dropped, selected,
    )  # fmt: skip
    for write in writers:
        yield write.__name__, model(write)
    for which in ("exponent", "n", "epsilon", "one", "flat sum"):
        yield f"stretched by {which}", model(lambda g, x, w=which: stretched(g, x, w))
    for dtype in (onnx.TensorProto.INT32, onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT8E4M3FN):
        for what in ("x", "squares", "mean"):
            name = f"{what} rounded to {onnx.TensorProto.DataType.Name(dtype).lower()}"
            yield name, model(lambda g, x, w=what, d=dtype: rounded(g, x, w, d), opset=19)
    yield "rounded_double", model(rounded_double, dtype="float64")
    yield "not_reduced, rank 1", model(not_reduced, [WIDTH])
    for what in ("negative", "three times", "transposed"):
        yield f"scaled is not squared, {what}", model(lambda g, x, w=what: other_operand(g, x, w))
    yield from odd_operators()
    yield "squeezed", model(squeezed, [WIDTH, WIDTH])
    yield "straddling", model(straddling, [WIDTH, WIDTH])
    ones, zeros = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    yield "LayerNormalization", model(operator("LayerNormalization", ones, zeros, axis=-1))
    yield "MeanVarianceNormalization", model(operator("MeanVarianceNormalization", axes=[-1]))
    yield "LpNormalization", model(operator("LpNormalization", axis=-1, p=2))
    image = ["batch", WIDTH, 8, 8]
    yield "InstanceNormalization", model(operator("InstanceNormalization", ones, zeros), image)
    yield "BatchNormalization", model(operator("BatchNormalization", ones, zeros, zeros, ones), image)
    yield "GroupNormalization", model(operator("GroupNormalization", ones, zeros, num_groups=4), image, 21)
    yield "channels", model(lambda g, x: g.op("Div", x, g.op("Sqrt", eps(g, mean(g, square(g, x), [1])))), image)


LOOK_ALIKES: dict[str, onnx.ModelProto] = dict(look_alikes())
