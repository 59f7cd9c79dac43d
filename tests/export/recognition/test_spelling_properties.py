"""Random compositions of spellings: a norm is recognized as what it is, and one broken thing makes it none.

More of them: `pytest tests/export/recognition/test_spelling_properties.py --hypothesis-profile many`.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import assume, given
from hypothesis import strategies as st

from rmsnorm_deploy.export.from_onnx.rewrite import rewrite
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from rmsnorm_deploy.models.dtypes import numpy_dtype
from rmsnorm_deploy.runtime.accuracy.compare_output import judge
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.graphs.graph_text import Graph
from tests.helpers.spellings import norm_spellings as spellings
from tests.helpers.spellings.norm_spellings import EXACT, Way, build, expected, legal, norm, tail

CHOICES = {
    "square": spellings.SQUARES, "reduction": spellings.REDUCTIONS, "axes": spellings.AXES,
    "keepdims": spellings.KEEPDIMS, "epsilon": spellings.EPSILONS, "root": spellings.ROOTS,
    "factor": spellings.FACTORS, "scale": spellings.SCALES, "weight": spellings.WEIGHTS, "casts": spellings.CASTS,
    "opset": spellings.OPSETS, "identity": (False, True),
    "dtype": ("float32", "float32", "float16", "float16", "float64"), "eps": (1e-5, 1e-6, 1e-3, EXACT),
}  # fmt: skip
assert set(CHOICES) == {field.name for field in fields(Way)}
WAYS = st.builds(Way, **{name: st.sampled_from(choices) for name, choices in CHOICES.items()})


def found_in(model: onnx.ModelProto) -> list[object]:
    return [site.spec for site in find_graph_norms(ir.from_proto(model)).sites]


@given(WAYS, st.sampled_from(("primitives", "standard", "ort", "plugin")))
def test_a_composition_is_recognized_and_keeps_its_numbers(way: Way, target: str) -> None:
    assume(legal(way))
    model = build(way)
    assert found_in(model) == [expected(way)]
    if way.dtype == "float64" and target == "plugin":
        return
    result = rewrite(ir.from_proto(model), target)
    rng = np.random.default_rng(1)
    with OrtRunner(model.SerializeToString()) as runner:
        sizes = [(i, [dim if isinstance(dim, int) else 3 for dim in i.shape or ()]) for i in runner.inputs()]
        feeds = {i.name: rng.standard_normal(shape).astype(numpy_dtype(i.dtype)) for i, shape in sizes}
        (before,) = runner.run(feeds).values()
    with OrtRunner(ir.to_proto(result.model).SerializeToString()) as runner:
        (after,) = runner.run(feeds).values()
    verdict = judge("y", after, before.astype(np.float64), before)
    assert verdict.passed, verdict.reason


def broken(way: Way, fault: str) -> onnx.ModelProto:
    """The model of a spelling, with one node of it changed."""
    g = Graph(way.opset)
    x = g.input("x", ["batch", "length", *tail(way)], way.dtype)
    other = g.op("Tanh", x)
    y, dtype = norm(g, way, x)
    g.output(y, dtype)
    nodes = {node.op_type: node for node in g.nodes}
    reduce = next(node for node in g.nodes if node.op_type.startswith("Reduce"))
    if fault == "axis":
        axes = [-2] if len(tail(way)) == 1 else [-3, -2]
        if len(reduce.input) > 1:
            reduce.input[1] = g.constant(np.array(axes, np.int64))
        else:
            next(a for a in reduce.attribute if a.name == "axes").ints[:] = axes
    elif fault == "another tensor":
        squares = next(node for node in g.nodes if x in node.input and node.op_type in ("Pow", "Mul", *REDUCES))
        squares.input[:] = [other if name == x else name for name in squares.input]
    elif fault == "power":
        nodes["Pow"].input[1] = g.constant(3.0, way.dtype)
    elif fault == "mean subtracted":
        # Everything that read x reads x - mean(x).
        mean = g.reduce("ReduceMean", x, [-1])
        centered = g.op("Sub", x, mean)
        for node in g.nodes:
            if node.op_type != "Sub" and mean not in node.output and other not in node.output:
                node.input[:] = [centered if name == x else name for name in node.input]
    elif fault == "bounded":
        name = g.op("Max", reduce.output[0], g.constant(1e-6, way.dtype))
        for node in g.nodes:
            if node.op_type != "Max":
                node.input[:] = [name if i == reduce.output[0] else i for i in node.input]
    return g.model()


REDUCES = ("ReduceSumSquare", "ReduceL2")
FAULTS = ("axis", "another tensor", "power", "mean subtracted", "bounded")


@given(WAYS, st.sampled_from(FAULTS))
def test_a_composition_with_one_fault_is_none(way: Way, fault: str) -> None:
    assume(legal(way) and way.dtype == "float32" and not way.identity)
    assume(fault != "power" or (way.square == "pow" and way.root not in ("pow", "pow_half", "pow_half_div")))
    assume(fault != "axis" or way.keepdims == "kept")
    model = _sorted(broken(way, fault))
    assert found_in(model) == []


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(model)
    graph.graph.sort()
    return ir.to_proto(graph)
