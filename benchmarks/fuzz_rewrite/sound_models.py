"""Small valid models that contain norms, to be damaged (`sound_models`)."""

from __future__ import annotations

import onnx
from onnx import ModelProto, TensorProto, helper, parser

NORM = """
  two = Constant <value = float {{2.0}}> ()
  square = Pow (x, two)
  mean = ReduceMean <axes = [-1]> (square)
  eps = Constant <value = float {{0.00001}}> ()
  shifted = Add (mean, eps)
  root = Sqrt (shifted)
  {spelling}
  y = Mul (normed, w)
"""
DIV = "normed = Div (x, root)"
RECIPROCAL = "factor = Reciprocal (root)\n  normed = Mul (x, factor)"
WEIGHT = "float[8] w = {0.5, 1.0, 1.5, 2.0, -0.5, 0.25, 3.0, 1.0}"


def sound_models() -> list[ModelProto]:
    """Valid models that contain norms, in several spellings, opsets and places."""
    texts = [
        _text(17, "float[n, 8] x", "float[n, 8] y", WEIGHT, NORM.format(spelling=DIV)),
        _text(13, "float[2, 3, 8] x", "float[2, 3, 8] y", WEIGHT, NORM.format(spelling=RECIPROCAL)),
        _text(
            20, "float[n, 8] a, float[n, 8] b", "float[n, 8] y, float[n, 8] x", WEIGHT + ", int64[1] axes = {-1}",
            "x = Add (a, b)" + NORM.format(spelling=DIV).replace("<axes = [-1]> (square)", "(square, axes)"),
        ),
        _text(
            17, "float16[n, 8] h", "float16[n, 8] z", WEIGHT,
            "x = Cast <to = 1> (h)" + NORM.format(spelling=DIV) + "z = Cast <to = 10> (y)",
        ),
        _text(23, "float[n, 8] x", "float[n, 8] y", WEIGHT, "y = RMSNormalization <epsilon = 0.00001> (x, w)"),
        _text(18, "float[n, 8] x", "float[n, 8] y", WEIGHT, "y = SimplifiedLayerNormalization <axis = -1> (x, w)"),
        _text(
            11, "float[2, 1, 8] q", "float[2, 8] z, float[2, 8] y", WEIGHT,
            "x = Squeeze <axes = [1]> (q)" + NORM.format(spelling=DIV) + "z = Softmax <axis = 1> (y)",
        ),
    ]  # fmt: skip
    models = [parser.parse_model(text) for text in texts]
    return [*models, _with_branch(models[0]), _with_function(models[0])]


def _text(opset: int, inputs: str, outputs: str, initializers: str, body: str) -> str:
    return (
        f'<ir_version: 8, opset_import: ["" : {opset}]>\nmain ({inputs}) => ({outputs}) <{initializers}> {{\n{body}\n}}'
    )


def _with_branch(model: ModelProto) -> ModelProto:
    """The norm in one branch of an If."""
    inner = helper.make_graph(list(model.graph.node), "then", [], list(model.graph.output))
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["n"])], "else", [], [onnx.ValueInfoProto(name="n")])
    other.output[0].CopyFrom(model.graph.output[0])
    other.output[0].name = "n"
    node = helper.make_node("If", ["flag"], ["z"], then_branch=inner, else_branch=other)
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    graph = helper.make_graph([node], "main", [*model.graph.input, flag], [], list(model.graph.initializer))
    graph.output.add().CopyFrom(model.graph.output[0])
    graph.output[0].name = "z"
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=8)


def _with_function(model: ModelProto) -> ModelProto:
    """The norm in a local function."""
    body = helper.make_function("own", "Norm", ["x", "w"], ["y"], list(model.graph.node), list(model.opset_import))
    call = helper.make_node("Norm", ["x", "w"], ["y"], domain="own")
    graph = helper.make_graph(
        [call], "main", list(model.graph.input), list(model.graph.output), list(model.graph.initializer)
    )
    imports = [*model.opset_import, helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[body], ir_version=8)
