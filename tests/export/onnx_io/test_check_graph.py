"""Graphs that are none: each way in which names, nodes, functions, opsets and texts can be wrong."""

from __future__ import annotations

import re

import numpy as np
import pytest
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rmsnorm_deploy.export.onnx_io import check_graph as module
from rmsnorm_deploy.export.onnx_io.check_graph import DEEPEST_GRAPH, check_graph
from rmsnorm_deploy.models.errors import RmsnormDeployError, UnsupportedError, UsageError

WHERE = "model.onnx"


def node(op_type: str, inputs: str, outputs: str, **attributes: object) -> NodeProto:
    return helper.make_node(op_type, inputs.split(), outputs.split(), name=f"n_{outputs}", **attributes)


def graph(*nodes: NodeProto, outputs: str = "y", inputs: str = "x", initializers: str = "") -> GraphProto:
    return helper.make_graph(
        list(nodes), "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in inputs.split()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in outputs.split()],
        [numpy_helper.from_array(np.zeros(2, np.float32), name) for name in initializers.split()],
    )  # fmt: skip


def model(*nodes: NodeProto, functions: tuple[FunctionProto, ...] = (), opset: int = 18, **parts: str) -> ModelProto:
    return helper.make_model(
        graph(*nodes, **parts), functions=list(functions),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("f", 1)],
    )  # fmt: skip


def function(name: str, *nodes: NodeProto, opset: int = 18, inputs: str = "a", outputs: str = "b") -> FunctionProto:
    return helper.make_function(
        "f", name, inputs.split(), outputs.split(), list(nodes), [helper.make_opsetid("", opset)]
    )


def call(name: str, inputs: str, outputs: str) -> NodeProto:
    return node(name, inputs, outputs, domain="f")


def branch(then: GraphProto, outputs: str = "y") -> NodeProto:
    other = graph(node("Identity", "x", "other"), outputs="other", inputs="")
    return node("If", "c", outputs, then_branch=then, else_branch=other)


def refusal(made: ModelProto, kind: type[RmsnormDeployError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        check_graph(made, WHERE)
    text = str(caught.value)
    assert text.startswith(f"{WHERE}: ")
    return text


SOUND = {
    "one node": model(node("Neg", "x", "y")),
    "any order": model(node("Neg", "k", "y"), node("Abs", "x", "k")),
    "strange names": model(node("Neg", "x", "a/b:0"), node("Abs", "a/b:0", "y")),
    "an input with a default": model(node("Add", "x w", "y"), inputs="x w", initializers="w"),
    "optional inputs and outputs": model(helper.make_node("Clip", ["x", "", "m"], ["y"]), initializers="m"),
    "an input that goes out": model(node("Neg", "x", "k"), outputs="x"),
    "a body that reads the graph around it": model(
        branch(graph(node("Neg", "k", "t"), outputs="t", inputs="")), node("Abs", "x", "k"), inputs="x c"
    ),
    "an operator of another domain": model(helper.make_node("Any", ["x"] * 9, ["y"], domain="d", free=[1.0])),
    "a function": model(call("half", "x", "y"), functions=(function("half", node("Neg", "a", "b")),)),
    "an operator that this opset lacks": model(node("RMSNormalization", "x x", "y", axis=-1, epsilon=1e-6)),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_graphs(name: str) -> None:
    check_graph(SOUND[name], WHERE)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (model(node("Add", "x z", "y")), r"Add 'n_y' reads 'z', which the graph does not define"),
        (model(node("Neg", "x", "k")), r"'y' is an output of the graph, which does not define it"),
        (model(node("Neg", "x", "y"), node("Abs", "x", "y")), r"'y' is made twice in the graph, again by Abs 'n_y'"),
        (model(node("Neg", "x", "x"), outputs="x"), r"'x' is made twice in the graph"),
        (model(node("Neg", "x", "y"), inputs="x x"), r"'x' is defined twice as an input or initializer of the graph"),
        (model(node("Neg", "x", "y"), initializers="w w"), r"'w' is defined twice"),
        (model(node("Add", "x b", "a"), node("Neg", "a", "b"), node("Neg", "b", "y")), r"depends on its own result"),
        (model(node("Add", "x y", "y")), r"Add 'n_y' depends on its own result"),
        (model(branch(graph(node("Neg", "q", "t"), outputs="t", inputs="")), inputs="x c"),
         r"If 'n_y' reads 'q', which the graph does not define"),
        (model(branch(graph(node("Neg", "y", "t"), outputs="t", inputs="")), inputs="x c"), r"depends on its own"),
        (model(branch(graph(node("Neg", "x", "k"), outputs="t", inputs="")), inputs="x c"),
         r"'t' is an output of a subgraph of If 'n_y'"),
        (model(helper.make_node("", ["x"], ["y"], name="n")), r"node 'n' has no operator"),
        (model(node("Neg", "x x", "y")), r"2 inputs and 1 outputs, which does not match its definition in opset 18"),
        (model(node("Add", "x", "y")), r"has 1 inputs and 1 outputs"),
        (model(node("Neg", "x", "y z")), r"has 1 inputs and 2 outputs"),
        (model(node("ReduceMean", "x", "y", keepdims=0.5)), r"attribute keepdims of .* has the wrong type"),
        (model(node("RMSNormalization", "x x", "y", epsilon=1)), r"attribute epsilon of .* has the wrong type"),
        (model(node("Cast", "x", "y", to=99)), r"attribute to of .* has the wrong type"),
        (model(call("half", "x x", "y"), functions=(function("half", node("Neg", "a", "b")),)),
         r"has 2 inputs and 1 outputs, which does not match its definition in function half"),
        (model(call("loop", "x", "y"), functions=(function("loop", call("loop", "a", "b")),)),
         r"function f::loop calls itself"),
        (model(call("p", "x", "y"), functions=(function("p", call("q", "a", "b")), function("q", call("p", "a", "b")))),
         r"function f::p calls itself, directly or through others"),
        (model(node("Neg", "x", "y"), functions=(function("p", node("Neg", "a", "b")),) * 2),
         r"two functions have the same domain and name"),
        (model(node("Neg", "x", "y"), functions=(function("p", node("Neg", "z", "b")),)),
         r"reads 'z', which function p does not define"),
        (model(node("Neg", "x", "y"), opset=0), r"the model does not import an opset"),
        (model(node("Neg", "x", "y"), opset=1000), r"the model does not import an opset"),
    ],
)  # fmt: skip
def test_refusals(made: ModelProto, message: str) -> None:
    assert re.search(message, refusal(made))


def test_an_attribute_that_stands_twice() -> None:
    made = model(node("ReduceMean", "x", "y", keepdims=1))
    made.graph.node[0].attribute.append(made.graph.node[0].attribute[0])
    assert "has attribute keepdims twice" in refusal(made)


def test_an_attribute_without_a_type_is_left_to_the_reader() -> None:
    made = model(node("ReduceMean", "x", "y", keepdims=1))
    made.graph.node[0].attribute[0].type = AttributeProto.UNDEFINED
    check_graph(made, WHERE)


@pytest.mark.parametrize("second", ["", "ai.onnx"])
def test_two_opsets_of_one_domain(second: str) -> None:
    made = model(node("Neg", "x", "y"))
    made.opset_import.add(domain=second, version=17)
    assert "the model imports domain '' at opsets 17, 18; expected one opset for each domain" in refusal(made)


def test_the_same_opset_twice_is_one() -> None:
    made = model(node("Neg", "x", "y"))
    made.opset_import.add(domain="ai.onnx", version=18)
    check_graph(made, WHERE)


def test_a_text_that_is_not_utf8() -> None:
    data = model(node("Neg", "x", "y")).SerializeToString().replace(b"n_y", b"n\xff\xfe")
    made = ModelProto()
    made.ParseFromString(data)
    text = refusal(made)
    assert "of a NodeProto is not UTF-8" in text
    assert "The file is damaged" in text


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_too_many_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_NODES", 3)
    chain = [node("Neg", "x" if i == 0 else f"v{i}", f"v{i + 1}") for i in range(4)]
    check_graph(model(*chain[:3], outputs="v3"), WHERE)
    assert "more than 3 nodes" in refusal(model(*chain, outputs="v4"), UnsupportedError)


def test_functions_count_as_often_as_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level calls the one below twice: 2 + 4 + 8 nodes from three small functions."""
    levels = [function("l0", node("Neg", "a", "k"), node("Neg", "k", "b"))]
    for level in range(1, 3):
        levels.append(function(f"l{level}", call(f"l{level - 1}", "a", "k"), call(f"l{level - 1}", "k", "b")))
    made = model(call("l2", "x", "y"), functions=tuple(levels))
    monkeypatch.setattr(module, "MOST_NODES", 40)
    check_graph(made, WHERE)
    monkeypatch.setattr(module, "MOST_NODES", 14)
    assert "more than 14 nodes" in refusal(made, UnsupportedError)


def test_a_tower_of_functions_is_counted_without_being_built() -> None:
    """2^60 nodes when inlined: the count is linear in the file."""
    levels = [function("l0", node("Neg", "a", "k"), node("Neg", "k", "b"))]
    for level in range(1, 60):
        levels.append(function(f"l{level}", call(f"l{level - 1}", "a", "k"), call(f"l{level - 1}", "k", "b")))
    assert "more than 500000 nodes" in refusal(model(call("l59", "x", "y"), functions=tuple(levels)), UnsupportedError)


def nested(depth: int) -> ModelProto:
    inner = graph(node("Neg", "x", "t0"), outputs="t0", inputs="")
    for level in range(1, depth):
        inner = graph(branch(inner, f"t{level}"), outputs=f"t{level}", inputs="")
    return model(branch(inner), inputs="x c")


def test_subgraphs_too_deep_inside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEEPEST_GRAPH", 5)
    check_graph(nested(5), WHERE)
    assert "subgraphs are nested more than 5 deep" in refusal(nested(6), UnsupportedError)
    assert DEEPEST_GRAPH == 100
