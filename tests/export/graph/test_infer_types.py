"""Dtypes and shapes that a file leaves out: what is filled in, what stays, and what is given back."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph.infer_types import fill_types
from tests.helpers.graphs.onnx_text import parsed, values


def types(model: ir.Model) -> dict[str, tuple[str | None, list[int | str | None] | None]]:
    """dtype and shape of each value that a node makes."""
    return {
        str(output.name): (
            None if output.dtype is None else output.dtype.name,
            None if output.shape is None else [dim if isinstance(dim, int) else dim.value for dim in output.shape],
        )
        for node in model.graph
        for output in node.outputs
    }


def test_values_get_the_dtype_and_shape_that_onnx_infers() -> None:
    model = parsed("""g (float[batch, 8] x) => (float16[batch, 1] y) <int64[1] axes = {-1}>
    { m = ReduceMean (x, axes)  y = Cast <to = 10> (m) }""")
    filled = fill_types(model)
    assert types(model) == {"m": ("FLOAT", ["batch", 1]), "y": ("FLOAT16", ["batch", 1])}
    assert [(row.value.name, row.type, row.shape) for row in filled] == [("m", None, None)]


def test_shapes_that_nodes_compute_are_followed() -> None:
    model = parsed("""g (float[4, 6] x, float[2, 12] like) => (float[2, 12] o)
    { s = Shape (like)  y = Reshape (x, s)  o = Neg (y) }""")
    fill_types(model)
    assert types(model)["y"] == ("FLOAT", [2, 12])


def test_an_old_shape_in_the_file_gives_way_and_is_returned() -> None:
    model = parsed("g (float[3, 8] x) => (float[3, 8] o) { y = Neg (x)  o = Neg (y) }")
    value = values(model)["y"]
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([5, 8])
    filled = fill_types(model)
    assert types(model)["y"] == ("FLOAT", [3, 8])
    (row,) = filled
    assert (row.value, row.shape) == (value, ir.Shape([5, 8]))


@pytest.mark.parametrize("shape", [["n", 8], [3, "m"], [3, 8]])
def test_a_shape_that_does_not_contradict_stays(shape: list[int | str]) -> None:
    model = parsed("g (float[3, 8] x) => (float[3, 8] o) { y = Neg (x)  o = Neg (y) }")
    value = values(model)["y"]
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shape)
    assert fill_types(model) == []
    assert types(model)["y"] == ("FLOAT", shape)


@pytest.mark.parametrize(
    ("operator", "outputs"),
    [
        ("com.microsoft.SkipSimplifiedLayerNormalization", ("y", "", "", "t")),
        ("com.microsoft.SimplifiedLayerNormalization", ("y",)),
        ("com.microsoft.SkipLayerNormalization", ("y", "", "", "t")),
        ("com.microsoft.RotaryEmbedding", ("y",)),
        ("rmsnorm_deploy.AddRMSNorm", ("y", "t")),
        ("rmsnorm_deploy.RMSNorm", ("y",)),
        ("com.microsoft.QuickGelu", ("y",)),
    ],
)
def test_operators_that_onnx_does_not_know_hand_their_inputs_type_on(operator: str, outputs: tuple[str, ...]) -> None:
    domain, _, op_type = operator.rpartition(".")
    made = [name or f"unused{index}" for index, name in enumerate(outputs)]
    model = parsed(f"g (float16[n, 8] x, float16[n, 8] z) => (float16[n, 8] o) {{ {', '.join(made)} = {domain}."
                   f"{op_type} (x, z)  o = Neg (y) }}", 18, domain)  # fmt: skip
    fill_types(model)
    known = {name: kind for name, kind in types(model).items() if name != "o"}
    assert known == {n: ("FLOAT16", ["n", 8]) if n in ("y", "t") else (None, None) for n in made}


def test_another_operator_that_onnx_does_not_know_gives_nothing() -> None:
    model = parsed("g (float[8] x) => (float[8] o) { y = elsewhere.Op (x)  o = Neg (y) }", 18, "elsewhere")
    fill_types(model)
    assert types(model)["y"] == (None, None)


def test_what_the_file_says_of_an_unknown_operators_output_is_handed_on() -> None:
    model = parsed(
        "g (float[8] x) => (float[2, 4] o) { y = elsewhere.Op (x)  z = Neg (y)  o = Neg (z) }", 18, "elsewhere"
    )
    value = values(model)["y"]
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([2, 4])
    fill_types(model)
    assert types(model)["z"] == ("FLOAT", [2, 4])


def test_bodies_of_control_flow_are_filled_in() -> None:
    model = parsed("""g (float[n, 8] x, bool c) => (float[n, 8] o) { k = Neg (x)
    o = If (c) <then_branch = t () => (float[n, 8] p) { u = Cast <to = 11> (k)  p = Cast <to = 1> (u) },
    else_branch = e () => (float[n, 8] q) { v = Exp (x)  q = Neg (v) }> }""")
    filled = fill_types(model)
    inner = {str(o.name): (o.dtype, o.shape) for node in model.graph.all_nodes() for o in node.outputs}
    shape = ir.Shape(["n", 8])
    assert inner["u"] == (ir.DataType.DOUBLE, shape)
    assert inner["v"] == (ir.DataType.FLOAT, shape)
    assert {row.value.name for row in filled} >= {"k", "u", "v"}


def test_functions_of_the_model_are_followed() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
    g (float[3, 8] x) => (float[3, 8] o) { y = local.half (x)  o = Cast <to = 1> (y) }
    <domain: "local", opset_import: ["" : 18]> half (a) => (b) { b = Cast <to = 10> (a) }""")
    fill_types(model)
    assert types(model)["y"] == ("FLOAT16", [3, 8])


def test_a_graph_that_contradicts_itself_is_left_as_it_is() -> None:
    model = parsed("g (float[3, 8] x, float[5, 7] z) => (float[3, 8] o) { y = MatMul (x, z)  o = Neg (y) }")
    assert fill_types(model) == []
    assert types(model)["y"] == (None, None)


def test_large_weights_are_not_read() -> None:
    """More than 1024 elements: a weight whose data cannot be read does no harm."""
    model = parsed("g (float[3, 64] x, float[64, 64] w) => (float[3, 64] o) { y = MatMul (x, w)  o = Neg (y) }")
    weight = model.graph.inputs.pop()
    weight.const_value = ir.LazyTensor(lambda: 1 / 0, dtype=ir.DataType.FLOAT, shape=ir.Shape([64, 64]), name="w")
    model.graph.register_initializer(weight)
    fill_types(model)
    assert types(model)["y"] == ("FLOAT", [3, 64])


def test_an_absurdly_long_vector_does_not_fill_the_memory() -> None:
    model = parsed(f"""g (float[{1 << 40}] x) => (float[8] o) <int64[1] t = {{8}}>
    {{ k = Neg (x)  s = Shape (k)  m = Mul (s, t)  y = Expand (k, m)  o = Neg (y) }}""")
    fill_types(model)
    assert types(model)["k"] == ("FLOAT", [1 << 40])
