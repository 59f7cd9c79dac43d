"""The exporters make the same graph in less time."""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import nullcontext
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript
import pytest
import torch
from torch import nn

from rmsnorm_deploy import export_model
from rmsnorm_deploy.export.capture import capture as capturing
from rmsnorm_deploy.export.capture import quick_exporters as quick
from tests.helpers.extent import EVERY
from tests.helpers.models.families import build
from tests.helpers.runtime.feeds import feeds_of


class _Several(nn.Module):
    """Operators with decompositions, some with several results."""

    def __init__(self, norm=None):
        super().__init__()
        self.norm = norm or nn.RMSNorm(16)

    def forward(self, x):
        y = self.norm(x)
        a, b = y[:, :8], y[:, 8:]
        values, _ = torch.topk(nn.functional.softplus(a) * torch.logaddexp(a, b), 3)
        return values, torch.addcmul(b, a, a).contiguous().reshape(x.shape[0], -1), nn.functional.hardswish(x)


class _InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)

    def forward(self, x):
        y = self.norm(x).clone()
        y[:, :2] += 1.0
        return y.clamp_(max=2.0)


# What computes sizes, some of them twice, and what only renames or reshapes.
_SIZES = ("Concat", "Identity", "Reshape", "Shape")
_MODELS = {
    "llama with a cache": (functools.partial(build, "llama"), {"with_past": True}),
    "several results": (_Several, {"inputs": (torch.randn(3, 16),)}),
    "in place": (_InPlace, {"inputs": (torch.randn(3, 8),)}),
}
if EVERY:
    _MODELS["gpt_oss"] = (functools.partial(build, "gpt_oss"), {})


@pytest.mark.parametrize("name", _MODELS)
def test_the_graph_and_its_results_are_those_of_the_plain_exporters(name, tmp_path):
    make, options = _MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    export_model(model, tmp_path / "quick", **options)
    with mock.patch.object(capturing, "quick_exporters", nullcontext):
        export_model(model, tmp_path / "plain", **options)
    graphs = [onnx.load(tmp_path / folder / "model.onnx", load_external_data=False) for folder in ("quick", "plain")]
    counts = [Counter(node.op_type for node in graph.graph.node if node.op_type not in _SIZES) for graph in graphs]
    assert counts[0] == counts[1]
    sessions = [onnxruntime.InferenceSession(tmp_path / folder / "model.onnx") for folder in ("quick", "plain")]
    feeds = feeds_of(sessions[0])
    for got, wanted in zip(*(session.run(None, feeds) for session in sessions), strict=True):
        np.testing.assert_array_equal(got, wanted)


def _decomposed(module, *inputs):
    program = torch.export.export(module, inputs)
    table = dict(torch.export.default_decompositions().items())
    before = [str(node.target) for node in program.graph.nodes]
    done = quick.decomposed(program, table, lambda operator: operator in table)
    return done, before, program


def test_a_node_is_decomposed_alone():
    x = torch.randn(3, 16)
    module = _Several(nn.Identity()).eval()
    done, before, program = _decomposed(module, x)
    assert done
    targets = [str(node.target) for node in program.graph.nodes]
    assert "aten.hardswish.default" in before
    assert "aten.hardswish.default" not in targets
    assert "aten.topk.default" in targets
    for got, wanted in zip(program.module()(x), module(x), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_program_that_changes_its_values_in_place_is_left_to_torch():
    done, before, program = _decomposed(_InPlace().eval(), torch.randn(3, 8))
    assert not done
    assert [str(node.target) for node in program.graph.nodes] == before


def test_control_flow_is_left_to_torch():
    class Branches(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    assert not _decomposed(Branches(), torch.randn(3))[0]


def test_the_changes_end_with_the_context():
    from onnxscript.rewriter._matcher import SimplePatternMatcher
    from torch.onnx._internal.exporter import _fx_passes

    before = SimplePatternMatcher.match, _fx_passes.decompose_with_registry, torch.fx.config.do_not_emit_stack_traces
    with quick.quick_exporters():
        assert SimplePatternMatcher.match is not before[0]
        assert _fx_passes.decompose_with_registry is not before[1]
        assert torch.fx.config.do_not_emit_stack_traces
    after = SimplePatternMatcher.match, _fx_passes.decompose_with_registry, torch.fx.config.do_not_emit_stack_traces
    assert after == before


_HALVES = """
<ir_version: 8, opset_import: ["" : 20]>
halves (float[2, 8] x, float[2, 8] z) => (float[2, 4] a, float[2, 4] b, float[2, 4] c, float[2, 4] d)
<int64[1] zero = {0}, int64[1] four = {4}, int64[1] eight = {8}, int64[1] last = {-1}>
{
    b = Slice(x, four, eight, last)
    c = Slice(z, zero, four, last)
    a = Slice(x, zero, four, last)
    y = Neg(z)
    d = Slice(y, four, eight, last)
}
"""


def test_halves_of_one_tensor_are_split_and_halves_of_two_are_not():
    def optimized():
        model = ir.from_onnx_text(_HALVES)
        onnxscript.optimizer.optimize_ir(model)
        onnxscript.rewriter.rewrite(model)
        return Counter(node.op_type for node in model.graph)

    plain = optimized()
    with quick.quick_exporters():
        assert optimized() == plain
    assert plain == Counter({"Split": 1, "Slice": 2, "Neg": 1})


def test_an_output_whose_name_a_pass_lost_gets_that_of_its_node():
    program = torch.export.export(nn.Softplus(), (torch.randn(2, 3),))
    program.graph_signature.output_specs[0].arg.name = "alias"
    table = dict(torch.export.default_decompositions().items())
    assert quick.decomposed(program, table, lambda operator: operator in table)
    (returned,) = next(node for node in program.graph.nodes if node.op == "output").args[0]
    assert program.graph_signature.output_specs[0].arg.name == returned.name
