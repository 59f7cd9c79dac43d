"""RMSNorms that are spelled as the table of choices does not: constants behind nodes, odd ranks, gates, functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, helper

from rmsnorm_deploy.models.spec import NormSpec

from ..graphs.graph_text import Graph, weight
from ..spellings.norm_places import DIMS, PLAIN, function
from ..spellings.norm_spellings import WIDTH, Expected, Spelling

Write = Callable[[Graph, str], str]
WEIGHTLESS = PLAIN.replace(scale="none")


def model(write: Write, dims: list[Any] | None = None, opset: int = 18, dtype: str = "float32") -> onnx.ModelProto:
    g = Graph(opset)
    g.output(write(g, g.input("x", dims or DIMS, dtype)), dtype)
    return g.model()


def gate_model(write: Callable[[Graph, str, str], str], opset: int = 18, width: int = WIDTH) -> onnx.ModelProto:
    g = Graph(opset)
    g.output(write(g, g.input("x", DIMS), g.input("gate", [*DIMS[:2], width])))
    made = g.model()
    made.ir_version = max(made.ir_version, 10)
    return made


def vector(g: Graph, name: str = "norm.weight", dtype: str = "float32", seed: int = 0) -> str:
    return g.constant(weight(WIDTH, dtype, seed), None, name)


def factor(g: Graph, x: str, two: str = "", epsilon: str = "", axes: str = "") -> str:
    """1 / sqrt(mean(x^2) + eps), with the constants given or plain ones."""
    squares = g.op("Pow", x, two or g.constant(np.float32(2)))
    mean = g.op("ReduceMean", squares, axes or g.constant(np.array([-1])), keepdims=1)
    return g.op("Reciprocal", g.op("Sqrt", g.op("Add", mean, epsilon or g.constant(np.float32(1e-6)))))


def normed(g: Graph, x: str) -> str:
    return g.op("Mul", x, factor(g, x))


def widened(g: Graph, x: str) -> str:
    h = g.cast(x, "float32")
    return g.op("Mul", h, factor(g, h))


# Constants that nodes hand on -------------------------------------------------------------------------------------

CONSTANTS: dict[str, Callable[[Graph, str], dict[str, str]]] = {
    "exponent cast": lambda g, x: {"two": g.cast(g.constant(np.int64(2)), "float32")},
    "exponent value_int": lambda g, x: {"two": g.op("Constant", value_int=2)},
    "exponent value_floats": lambda g, x: {"two": g.op("Constant", value_floats=[2.0])},
    "exponent by Identity": lambda g, x: {"two": g.op("Identity", g.constant(np.float32(2)))},
    "exponent reshaped": lambda g, x: {"two": g.reshape(g.constant(np.float32([2])), [1])},
    "epsilon cast": lambda g, x: {"epsilon": g.cast(g.constant(np.float64(1e-6)), "float32")},
    "epsilon CastLike": lambda g, x: {"epsilon": g.op("CastLike", g.constant(np.float64(1e-6)), x)},
    "axes value_ints": lambda g, x: {"axes": g.op("Constant", value_ints=[-1])},
    "axes reshaped": lambda g, x: {"axes": g.reshape(g.constant(np.int64(-1)), [1])},
    "axes unsqueezed": lambda g, x: {"axes": g.unsqueeze(g.constant(np.int64(-1)), [0])},
}  # fmt: skip


def with_constants(g: Graph, x: str, kind: str) -> str:
    return g.op("Mul", vector(g), g.op("Mul", x, factor(g, x, **CONSTANTS[kind](g, x))))


WEIGHTS: dict[str, Callable[[Graph], str]] = {
    "by Identity": lambda g: g.op("Identity", vector(g)),
    "by two Identities": lambda g: g.op("Identity", g.op("Identity", vector(g))),
    "reshaped to [1, 1, n]": lambda g: g.reshape(vector(g), [1, 1, WIDTH]),
    "reshaped to [1, 1, -1]": lambda g: g.reshape(vector(g), [1, 1, -1]),
}


COUNTS: dict[str, Callable[[Graph, str], str]] = {
    "Gather": lambda g, x: g.cast(g.op("Gather", g.op("Shape", x), g.constant(np.int64(-1))), "float32"),
    "Gather of [2]": lambda g, x: g.cast(g.op("Gather", g.op("Shape", x), g.constant(np.int64([2]))), "float32"),
    "Gather, reshaped": lambda g, x: g.cast(
        g.reshape(g.op("Gather", g.op("Shape", x), g.constant(np.int64([-1]))), [1]), "float32"
    ),
}


def counted(g: Graph, x: str, count: str) -> str:
    """The mean as a sum over the width that the shape of x tells."""
    mean = g.op("Div", g.reduce("ReduceSum", g.op("Mul", x, x), [-1]), COUNTS[count](g, x))
    root = g.op("Sqrt", g.op("Add", mean, g.constant(np.float32(1e-6))))
    return g.op("Mul", vector(g), g.op("Div", x, root))


# One graph each ---------------------------------------------------------------------------------------------------


def shared_weight(g: Graph, x: str) -> str:
    w = vector(g)
    return g.op("Mul", w, normed(g, g.op("Relu", g.op("Mul", w, normed(g, x)))))


def norm_of_norm(g: Graph, x: str) -> str:
    return g.op("Mul", vector(g, "last.weight"), normed(g, g.op("Mul", vector(g), normed(g, x))))


def two_weights(g: Graph, x: str) -> str:
    """One normalized value that two weights scale: the norm itself has none."""
    h = normed(g, x)
    return g.op("Concat", g.op("Mul", h, vector(g)), g.op("Mul", h, vector(g, "other.weight", seed=3)), axis=-1)


def factor_used(g: Graph, x: str) -> str:
    f = factor(g, x)
    return g.op("Add", g.op("Mul", g.op("Mul", x, f), vector(g)), f)


def expanded_factor(g: Graph, x: str) -> str:
    return g.op("Mul", g.op("Mul", x, g.op("Expand", factor(g, x), g.op("Shape", x))), vector(g))


def two_casts(g: Graph, x: str) -> str:
    """As T5 is exported: one cast for the statistic, one for the product."""
    scaled = g.op("Mul", g.cast(x, "float32"), factor(g, g.cast(x, "float32")))
    return g.op("Mul", vector(g, dtype="float16"), g.cast(scaled, "float16"))


def exact_half(g: Graph, x: str, offset: int) -> str:
    """A float32 weight that float16 holds, or to which 1 was added before."""
    w = g.constant(weight(WIDTH, "float16").astype(np.float32) + np.float32(offset), None, "norm.weight")
    return g.cast(g.op("Mul", widened(g, x), w), "float16")


def transposed_groups(g: Graph, x: str) -> str:
    """Joined with their dims swapped, so they are not groups of x: the norm is that of the transposed value."""
    t = g.op("Transpose", g.reshape(x, [0, 0, 4, 8]), perm=[0, 1, 3, 2])
    return g.op("Mul", g.reshape(normed(g, t), [0, 0, WIDTH]), vector(g))


def across_rows(g: Graph, x: str, cut: int, back: list[int]) -> str:
    """Rows of another width than x's, cut across x's own: the norm is that of the reshaped value."""
    return g.op("Mul", g.reshape(normed(g, g.reshape(x, [-1, cut])), back), vector(g))


def biased(g: Graph, x: str, left: bool) -> str:
    y, bias = g.op("Mul", vector(g), normed(g, x)), vector(g, "norm.bias", seed=1)
    return g.op("Add", bias, y) if left else g.op("Add", y, bias)


def half_biased(g: Graph, x: str, order: str) -> str:
    if order == "cast_then_scale":
        y = g.op("Mul", vector(g, dtype="float16"), g.cast(widened(g, x), "float16"))
        return g.op("Add", y, vector(g, "norm.bias", "float16", 1))
    return g.cast(g.op("Add", g.op("Mul", vector(g), widened(g, x)), vector(g, "norm.bias", seed=1)), "float16")


# Functions and domains --------------------------------------------------------------------------------------------


def helpers_are_functions(g: Graph, x: str) -> str:
    function(g, "Rsqrt", ["v"], lambda inner: inner.op("Reciprocal", inner.op("Sqrt", "v")))
    function(g, "Mean", ["v"], lambda inner: inner.reduce("ReduceMean", "v", [-1]))
    mean = g.op("Add", g.op("Mean", g.op("Mul", x, x), domain="test"), g.constant(np.float32(1e-6)))
    return g.op("Mul", vector(g), g.op("Mul", x, g.op("Rsqrt", mean, domain="test")))


def epsilon_is_attribute(g: Graph, x: str) -> str:
    """A function with epsilon as attribute, called with two."""
    function(
        g, "Norm", ["h", "w"], lambda inner: inner.op("Mul", inner.op("Mul", "h", factor(inner, "h", "", "e")), "w")
    )
    body = g.functions[-1]
    body.attribute.append("eps")
    body.node.insert(0, helper.make_node("Constant", [], ["e"]))
    body.node[0].attribute.add(name="value_float", ref_attr_name="eps", type=AttributeProto.FLOAT)
    y = g.op("Norm", x, vector(g), domain="test", eps=1e-5)
    return g.op("Norm", y, vector(g, "last.weight"), domain="test", eps=1e-6)


def named_domain() -> onnx.ModelProto:
    """The default domain by its other name."""
    made = model(lambda g, x: g.op("Mul", vector(g), normed(g, x)))
    for part in (*made.graph.node, *made.opset_import):
        part.domain = "ai.onnx"
    return made


# The table --------------------------------------------------------------------------------------------------------


def rows() -> Iterable[tuple[str, Callable[[], onnx.ModelProto], list[NormSpec]]]:
    for kind in CONSTANTS:
        yield f"constant, {kind}", partial(model, partial(with_constants, kind=kind)), [PLAIN]
    for count in COUNTS:
        way = partial(model, partial(counted, count=count))
        yield f"sum over n, {count}", way, [PLAIN.replace(root="sqrt")]
    for kind, make in WEIGHTS.items():
        yield f"weight {kind}", partial(model, lambda g, x, m=make: g.op("Mul", normed(g, x), m(g))), [PLAIN]
    ranks: dict[str, list[Any]] = {
        "1": [WIDTH],
        "2": ["n", WIDTH],
        "5": ["n", 2, 3, "m", WIDTH],
        "static": [2, 3, WIDTH],
    }
    for rank, dims in ranks.items():
        yield f"x of rank {rank}", partial(model, lambda g, x: g.op("Mul", vector(g), normed(g, x)), dims), [PLAIN]
    for write, specs in (
        (shared_weight, [PLAIN] * 2), (norm_of_norm, [PLAIN] * 2), (two_weights, [WEIGHTLESS]), (factor_used, [PLAIN]),
        (expanded_factor, [PLAIN]), (helpers_are_functions, [PLAIN]), (transposed_groups, [WEIGHTLESS]),
        (epsilon_is_attribute, [PLAIN.replace(eps=1e-5), PLAIN]),
    ):  # fmt: skip
        yield write.__name__.replace("_", " "), partial(model, write), specs
    yield "domain ai.onnx", named_domain, [PLAIN]
    first = PLAIN.replace(order="cast_then_scale")
    yield "two casts of x", partial(model, two_casts, dtype="float16"), [first]
    for offset, scale in enumerate(("weight", "one_plus_weight")):
        build = partial(model, partial(exact_half, offset=offset), dtype="float16")
        yield f"float32 constant that is {scale}", build, [PLAIN.replace(scale=scale)]
    for cut, back in ((2 * WIDTH, [2, 4, WIDTH]), (24, [3, 4, WIDTH])):
        build = partial(model, partial(across_rows, cut=cut, back=back), list(back))
        yield f"cut across rows by {cut}", build, [WEIGHTLESS]
    for left in (False, True):
        yield f"bias, left {left}", partial(model, partial(biased, left=left)), [PLAIN.replace(bias=True)]
    for spec in (first, PLAIN):
        build = partial(model, partial(half_biased, order=spec.order), dtype="float16")
        yield f"bias, float16, {spec.order}", build, [spec.replace(bias=True)]
    yield (
        "bias alone",
        partial(model, lambda g, x: g.op("Add", normed(g, x), vector(g))),
        [WEIGHTLESS.replace(bias=True)],
    )
    beside: dict[str, Write] = {
        "times a full tensor": lambda g, x: g.op("Mul", normed(g, x), g.input("m", DIMS)),
        "times a number for each row": lambda g, x: g.op("Mul", normed(g, x), g.input("m", [*DIMS[:2], 1])),
        "times what adds dims": lambda g, x: g.op(
            "Mul", normed(g, x), g.constant(weight(WIDTH).reshape(1, 1, 1, WIDTH))
        ),
        "minus a vector": lambda g, x: g.op("Sub", normed(g, x), vector(g)),
        "over a vector": lambda g, x: g.op("Div", normed(g, x), vector(g)),
    }
    for name, write in beside.items():
        yield f"norm {name}", partial(model, write), [WEIGHTLESS]
    yield from gates()


def gates() -> Iterable[tuple[str, Callable[[], onnx.ModelProto], list[NormSpec]]]:
    def after(g: Graph, x: str, gate: str) -> str:
        return g.op("Mul", g.op("Mul", vector(g), normed(g, x)), gate)

    def before(g: Graph, x: str, gate: str) -> str:
        return g.op("Mul", vector(g), normed(g, g.op("Mul", gate, x)))

    def silu(g: Graph, z: str) -> str:
        return g.op("Mul", g.op("Sigmoid", z), z)

    silu_after, silu_before = (PLAIN.replace(gate=gate, activation="silu") for gate in ("after", "before"))
    yield "gate, sigmoid first", partial(gate_model, lambda g, x, z: after(g, x, silu(g, z))), [silu_after]
    yield "gate, Swish", partial(gate_model, lambda g, x, z: after(g, x, g.op("Swish", z)), 24), [silu_after]
    yield "gate before, no groups", partial(gate_model, lambda g, x, z: before(g, x, silu(g, z))), [silu_before]
    sigmoid = silu_before.replace(activation="sigmoid")
    yield "gate before, sigmoid", partial(gate_model, lambda g, x, z: before(g, x, g.op("Sigmoid", z))), [sigmoid]
    one = partial(gate_model, lambda g, x, z: after(g, x, g.op("Sigmoid", z)), width=1)
    yield "gate of one column is none", one, [PLAIN]


ODDITIES: dict[str, Spelling] = {
    name: Spelling(name, build, tuple(Expected(spec) for spec in specs)) for name, build, specs in rows()
}
