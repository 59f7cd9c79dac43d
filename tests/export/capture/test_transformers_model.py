"""What is done to the graph of transformers' exporter after the capture."""

from __future__ import annotations

import onnx_ir as ir

from rmsnorm_deploy.export.capture.transformers_model import _drop_returned_inputs
from tests.helpers.graphs.onnx_text import parsed


def _names(model: ir.Model) -> tuple[list[str | None], list[str | None]]:
    return [value.name for value in model.graph.inputs], [value.name for value in model.graph.outputs]


def _renamed(model: ir.Model, names: dict[str, str]) -> ir.Model:
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.name = names.get(value.name or "", value.name)
    return model


GRAPH = (
    "g (int64[b, s] ids, int64[b, s] mask_in) => (int64[b, s] logits, int64[b, s] mask_out) "
    "{ logits = Add (ids, mask_in)  mask_out = ACT (mask_in) }"
)
BEFORE = {"mask_in": "input.mask", "mask_out": "output.mask"}


def test_an_input_that_is_returned_is_no_output_and_keeps_its_name() -> None:
    model = _renamed(parsed(GRAPH.replace("ACT", "Identity")), BEFORE)
    _drop_returned_inputs(model)
    assert _names(model) == (["ids", "mask"], ["logits"])
    assert [node.op_type for node in model.graph] == ["Add"]


def test_an_input_that_is_returned_changed_is_an_output() -> None:
    model = _renamed(parsed(GRAPH.replace("ACT", "Neg")), BEFORE)
    _drop_returned_inputs(model)
    assert _names(model) == (["ids", "input.mask"], ["logits", "output.mask"])
