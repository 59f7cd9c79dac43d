"""Attentions in every target's form compute what `attend` does, in ONNX Runtime; generated from the table."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from rmsnorm_deploy.export.from_torch.lower import lower_graph
from rmsnorm_deploy.export.graph.captured_nodes import ATTENTION_OP, CAPTURE_DOMAIN
from rmsnorm_deploy.export.graph.metadata import ATTENTION_KEY, VALUES_KEY
from rmsnorm_deploy.export.lowering.attention_table import (
    ATTENTION_TABLE,
    KINDS,
    attention_cell,
    attention_form,
    kind_of,
    parse_attention,
    required_versions,
)
from rmsnorm_deploy.export.lowering.attention_writer import decompose_operators, has_operators
from rmsnorm_deploy.export.lowering.table import TARGETS, Environment
from rmsnorm_deploy.models.attention.attend import attend
from rmsnorm_deploy.models.attention.spec import AttentionSpec
from rmsnorm_deploy.models.errors import UsageError
from tests.helpers.graphs.capture_graph import DATA_TYPES, GraphMaker

PATH = "layers.0.attention"
SPECS = {
    "plain": AttentionSpec(0.35),
    "softcap": AttentionSpec(0.35, softcap=2.0),
    "sink": AttentionSpec(0.35, sink=True),
}
# Those that write the cache in place have tests of their own.
NODES = [row for row in ATTENTION_TABLE if row.mode == "node"]
ROUNDINGS = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 4e-3}


def captured(spec, dtype, heads=4, groups=2, biased=True, width=8):
    """A captured graph of one attention whose batch and lengths are dynamic."""
    maker = GraphMaker(DATA_TYPES[dtype])
    q = maker.input("q", ["b", heads, "s", width])
    k, v = maker.input("k", ["b", groups, "t", width]), maker.input("v", ["b", groups, "t", 5])
    bias = maker.input("bias", ["b", 1, "s", "t"]) if biased else None
    sink = maker.input("sink", [heads]) if spec.sink else None
    attributes = {"spec": spec.to_json(), "path": PATH, "heads": heads, "groups": groups}
    y = maker.node(ATTENTION_OP, [q, k, v, bias, sink], "y", ["b", "s", heads, 5], attributes, domain=CAPTURE_DOMAIN)
    graph = maker.graph([y])
    graph.opset_imports[CAPTURE_DOMAIN] = 1
    return ir.Model(graph, ir_version=10)


def feeds_for(spec, dtype, heads=4, groups=2, biased=True, batch=3, queries=5, keys=9):
    """Random tensors; the last row of the batch attends to nothing."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    feeds = {"q": random(batch, heads, queries, 8), "k": random(batch, groups, keys, 8)}
    feeds["v"] = random(batch, groups, keys, 5)
    if biased:
        lowest = torch.finfo(dtype).min
        mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
        mask[1, :, :, :3] = False
        mask[batch - 1] = False
        feeds["bias"] = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)
    if spec.sink:
        feeds["sink"] = random(heads)
    return feeds


def run(model, feeds):
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {name: value.numpy() for name, value in feeds.items()})[0]


def wanted_for(spec, feeds):
    tensors = [feeds.get(name) for name in ("q", "k", "v", "bias", "sink")]
    return attend(spec, *tensors, wide=torch.float64).numpy()


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("row", NODES, ids=lambda row: f"{row.target}-{row.kind}")
def test_each_cell_computes_the_attention(row, dtype):
    spec = SPECS[row.kind]
    for biased, groups in itertools.product((True, False), (4, 2, 1)):
        lowered = lower_graph(captured(spec, dtype, groups=groups, biased=biased), row.target)
        feeds = feeds_for(spec, dtype, groups=groups, biased=biased)
        got = run(lowered.model, feeds)
        off = np.abs(got - wanted_for(spec, feeds))
        off = off[:-1] if biased else off  # what a row without keys returns has no meaning, but it is finite
        assert np.isfinite(got).all()
        assert off.max() <= ROUNDINGS[dtype] * (1 + np.abs(feeds["v"].double().numpy()).max())


@pytest.mark.parametrize("row", NODES, ids=lambda row: f"{row.target}-{row.kind}")
def test_each_cell_writes_what_it_names(row):
    lowered = lower_graph(captured(SPECS[row.kind], torch.float32, groups=4), row.target)
    ops = [node.op_type for node in lowered.model.graph if node.op_type not in ("Reshape", "Transpose")]
    named = [op for op in row.emits.split(", ") if op != "Transpose"]
    assert ops == named
    assert lowered.model.graph.opset_imports[""] >= row.opset
    assert CAPTURE_DOMAIN not in lowered.model.graph.opset_imports
    (attention,) = lowered.attentions
    main = next(node for node in lowered.model.graph if node.name == attention.node)
    record = json.loads(main.metadata_props[ATTENTION_KEY])
    assert record == {"path": PATH, "spec": SPECS[row.kind].to_dict(), "heads": [4, 4]}
    ends = {"query": "q", "key": "k", "value": "v", "bias": "bias", "y": "y"}
    assert json.loads(main.metadata_props[VALUES_KEY]) == ends
    assert attention.to_dict()["emits"] == row.emits
    assert "reason" not in attention.to_dict()
    assert lowered.model.graph.outputs[0].name == "y"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_causal_attention_without_a_mask(target, softcap):
    spec = AttentionSpec(0.35, softcap, causal=True)
    lowered = lower_graph(captured(spec, torch.float32, biased=False), target)
    feeds = feeds_for(spec, torch.float32, biased=False, queries=7, keys=7)
    np.testing.assert_allclose(run(lowered.model, feeds), wanted_for(spec, feeds), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "causal"), [("plain", False), ("plain", True), ("softcap", False)])
def test_operators_are_decomposed_for_a_runtime_without_them(kind, causal, dtype):
    spec = replace(SPECS[kind], causal=causal)
    lowered = lower_graph(captured(spec, dtype, biased=not causal), "ort").model
    proto = ir.to_proto(lowered)
    assert has_operators(proto)
    again = ir.from_proto(proto)
    assert decompose_operators(again) == 1
    assert "Attention" not in {node.op_type for node in again.graph}
    assert not has_operators(ir.to_proto(again))
    feeds = feeds_for(spec, dtype, biased=not causal, keys=5 if causal else 9)
    off = np.abs(run(again, feeds) - wanted_for(spec, feeds))
    assert (off if causal else off[:-1]).max() <= 3 * ROUNDINGS[dtype]


def test_other_attention_operators_are_left_alone():
    lowered = lower_graph(captured(SPECS["plain"], torch.float32), "ort").model
    for node in lowered.graph:
        node.metadata_props.clear()
    assert decompose_operators(lowered) == 0
    assert "Attention" in {node.op_type for node in lowered.graph}


def test_the_table_has_each_target_and_kind_once():
    assert [(row.target, row.kind) for row in NODES] == list(itertools.product(TARGETS, KINDS))
    others = [(row.target, row.kind, row.mode) for row in ATTENTION_TABLE if row not in NODES]
    assert others == [("ort", kind, "in-place") for kind in KINDS]


def test_kinds():
    assert {name: kind_of(spec) for name, spec in SPECS.items()} == {kind: kind for kind in KINDS}
    assert kind_of(AttentionSpec(1.0, 2.0, False, True)) == "sink"


def test_a_lower_opset_gets_the_primitives_and_says_why():
    lowered = lower_graph(captured(SPECS["plain"], torch.float32), "ort", opset=20)
    (attention,) = lowered.attentions
    assert attention.cell == attention_cell("primitives", "plain")
    assert attention.reason == "Attention requires opset 23, and the file has opset 20"
    assert lowered.model.graph.opset_imports[""] == 20
    assert lowered.requires == {}


def test_float64_gets_the_primitives_and_says_why():
    cell, reason = attention_form(SPECS["plain"], "ort", Environment(opset=23, dtype="float64"))
    assert cell == attention_cell("primitives", "plain")
    assert reason == "Attention does not support float64 everywhere"
    assert lower_graph(captured(SPECS["plain"], torch.float64), "ort").model.graph.opset_imports[""] == 20


def test_versions_that_a_file_requires():
    assert required_versions([]) == {}
    assert required_versions([attention_cell("primitives", kind) for kind in KINDS]) == {}
    assert required_versions([attention_cell("ort", "softcap")]) == {"onnxruntime": "1.27"}
    assert required_versions([attention_cell("standard", "plain")]) == {}
    assert lower_graph(captured(SPECS["plain"], torch.float32), "ort").requires == {"onnxruntime": "1.27"}


def test_unknown_words_are_refused():
    assert parse_attention("Node") == "node"
    with pytest.raises(UsageError, match=r"attention: expected one of node, decomposed, in-place, got 'fused'\."):
        parse_attention("fused")
    with pytest.raises(UsageError, match=r"target: expected one of primitives, standard, ort, plugin, got 'trt'\."):
        attention_cell("trt", "plain")
