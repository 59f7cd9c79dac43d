"""Tests of export/from_onnx/rewrite_attentions.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from rmsnorm_deploy.export.from_onnx.rewrite import Rewritten, rewrite
from rmsnorm_deploy.export.from_onnx.rewrite_attentions import lower_bound
from rmsnorm_deploy.export.graph.infer_types import fill_types
from rmsnorm_deploy.export.graph.metadata import REQUIRES_KEY
from rmsnorm_deploy.models.errors import UsageError
from tests.helpers.graphs.attention_graphs import SPELLINGS, attention_model
from tests.helpers.models.families import build

Feeds = dict[str, NDArray[Any]]
LOWEST = float(np.finfo(np.float32).min)


def run(model: ir.Model, feeds: Feeds) -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {v.name: feeds[v.name] for v in session.get_inputs()})[0])


def feeds_for(masked: float | None, *, batch: int = 2, length: int = 3, keys: int = 5, shape: Any = None) -> Feeds:
    """Inputs; the mask hides keys with a number, or is of bools without one, and one query attends to nothing."""
    rng = np.random.default_rng(0)
    sizes = {"q": (batch, 4, length, 8), "k": (batch, 2, keys, 8), "v": (batch, 2, keys, 8)}
    feeds: Feeds = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    hidden = rng.random(shape or (batch, 1, length, keys)) < 0.4
    hidden[..., 1] = False
    hidden[0, :, 0] = True
    bias = np.where(hidden, masked, rng.standard_normal(hidden.shape)) if masked is not None else hidden
    return {**feeds, "mask": bias.astype(np.float32 if masked is not None else np.bool_)}


def rewritten(**parts: str) -> tuple[ir.Model, Rewritten]:
    model = attention_model(**parts)
    return model, rewrite(model, "ort", attention="node")


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("sizes", [{}, {"batch": 1, "length": 1, "keys": 7}], ids=["chunk", "token"])
def test_the_operator_computes_the_same(name: str, sizes: dict[str, int]) -> None:
    parts, _ = SPELLINGS[name]
    model, result = rewritten(**parts)
    assert [node.op_type for node in result.model.graph].count("Attention") == 1
    assert "Softmax" not in {node.op_type for node in result.model.graph}
    feeds = feeds_for(None if "bool" in parts.get("mask_type", "") else LOWEST, **sizes)
    if "[1, 1" in parts.get("mask_type", ""):
        feeds["mask"] = feeds["mask"][:1]
    if name == "two masks":  # the lowest number twice is infinite
        feeds["mask"] = np.maximum(feeds["mask"], LOWEST / 4)
    np.testing.assert_allclose(run(result.model, feeds), run(model, feeds), atol=2e-6, rtol=0)


def test_a_query_that_attends_to_nothing_gets_the_average_of_the_original() -> None:
    model, result = rewritten()
    feeds = feeds_for(LOWEST)
    got = run(result.model, feeds)
    np.testing.assert_allclose(got[0, 0], feeds["v"][0].repeat(2, axis=0).mean(1), atol=1e-6)
    np.testing.assert_allclose(got, run(model, feeds), atol=2e-6)


def test_zeros_stay_zeros_where_an_infinite_mask_hides_every_key() -> None:
    model, result = rewritten(behind="bad = IsNaN (weights)\nused = Where (bad, zero, weights)")
    feeds = feeds_for(-np.inf)
    got = run(result.model, feeds)
    assert np.all(got[0, 0] == 0)
    assert np.all(got[1] != 0)
    np.testing.assert_allclose(got, run(model, feeds), atol=2e-6)
    assert not any("NaN" in note for note in result.notes)


def test_an_average_takes_the_place_of_nan_with_a_note() -> None:
    model, result = rewritten()
    feeds = feeds_for(-np.inf)
    got, before = run(result.model, feeds), run(model, feeds)
    assert np.isnan(before[0, 0]).all()
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[1], before[1], atol=2e-6)
    (note,) = [note for note in result.notes if "infinity" in note]
    assert note.startswith("the mask of 1 attention may be minus infinity")


@pytest.mark.parametrize("mask", ["float[B, 1, 1, T] mask", "float[1, 4, S, T] mask", "float[S, T] mask"])
def test_a_mask_of_other_dims_gets_those_of_the_scores(mask: str) -> None:
    model, result = rewritten(mask_type=mask)
    assert len(result.attentions) == 1
    shape = {"float[B, 1, 1, T] mask": (2, 1, 1, 5), "float[1, 4, S, T] mask": (1, 4, 3, 5)}.get(mask, (3, 5))
    feeds = feeds_for(0.0)
    feeds["mask"] = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(run(result.model, feeds), run(model, feeds), atol=2e-6)


def test_a_result_with_its_heads_first_keeps_them_there() -> None:
    model, result = rewritten(end="z = Identity (y)", outputs="float[B, 4, S, 8] z")
    feeds = feeds_for(LOWEST)
    np.testing.assert_allclose(run(result.model, feeds), run(model, feeds), atol=2e-6)


def test_a_result_that_is_read_twice_has_one_operator() -> None:
    parts = {"end": "a = Transpose <perm = [0, 2, 1, 3]> (y)\nb = Transpose <perm = [0, 2, 1, 3]> (y)\nz = Add (a, b)"}
    model, result = rewritten(**parts)
    feeds = feeds_for(LOWEST)
    np.testing.assert_allclose(run(result.model, feeds), run(model, feeds), atol=4e-6)


def test_keys_in_another_order_are_transposed_once() -> None:
    parts = {
        "inputs": ", float[B, T, 4, 8] flat", "keys": "kt = Transpose <perm = [0, 2, 3, 1]> (flat)",
    }  # fmt: skip
    model, result = rewritten(**parts)
    (row,) = result.attentions
    assert (row.before.key.perm, row.before.heads) == ((0, 2, 1, 3), (4, 4))
    feeds = feeds_for(LOWEST)
    feeds["flat"] = np.random.default_rng(2).standard_normal((2, 5, 4, 8)).astype(np.float32)
    np.testing.assert_allclose(run(result.model, feeds), run(model, feeds), atol=2e-6)


def test_one_head_of_keys_and_values_is_read_by_all_queries() -> None:
    parts = {
        "inputs": ", float[B, 1, T, 8] k1, float[B, 1, T, 8] v1", "keys": "kt = Transpose <perm = [0, 1, 3, 2]> (k1)",
        "product": "y = MatMul (used, v1)",
    }  # fmt: skip
    model, result = rewritten(**parts)
    assert result.attentions[0].before.heads == (4, 1)
    feeds = feeds_for(LOWEST)
    feeds |= {"k1": feeds["k"][:, :1], "v1": feeds["v"][:, 1:]}
    np.testing.assert_allclose(run(result.model, feeds), run(model, feeds), atol=2e-6)


def test_zeros_of_infinite_masks_are_kept_in_files_of_earlier_opsets() -> None:
    parts = {"behind": "bad = IsNaN (weights)\nused = Where (bad, zero, weights)"}
    model = attention_model(opset=15, **parts)
    result = rewrite(model, "ort", attention="node")
    feeds = feeds_for(-np.inf)
    np.testing.assert_allclose(run(result.model, feeds), run(model, feeds), atol=2e-6)


def test_the_file_names_its_runtime_and_its_opset() -> None:
    _, result = rewritten()
    assert json.loads(result.model.metadata_props[REQUIRES_KEY]) == {"onnxruntime": "1.27"}
    assert result.model.graph.opset_imports[""] == 23
    assert result.changed
    assert result.attentions[0].lowered.cell.emits == "Attention, Transpose"


def test_the_default_changes_nothing() -> None:
    model = attention_model()
    result = rewrite(model, "ort")
    assert (result.attentions, result.attention_refusals, result.changed) == ([], [], False)
    assert [node.op_type for node in result.model.graph] == [node.op_type for node in model.graph]


def test_an_opset_without_the_operator_is_a_reason() -> None:
    result = rewrite(attention_model(), "ort", opset=22, attention="node")
    assert result.attentions == []
    assert result.attention_refusals[0].reason == "Attention requires opset 23, and the file has opset 22"


@pytest.mark.parametrize("target", ["primitives", "standard", "plugin"])
def test_targets_without_the_operator_are_refused(target: str) -> None:
    with pytest.raises(UsageError, match=r"attention: node is for target ort, .* got target " + target):
        rewrite(attention_model(), target, attention="node")


def test_a_cache_in_place_is_for_exports() -> None:
    with pytest.raises(UsageError, match="expected node or decomposed for a file, got in-place"):
        rewrite(attention_model(), "ort", attention="in-place")


def test_the_lowest_number_of_a_mask_follows_from_its_constants() -> None:
    mask = "m = Where (show, zero, low)\ne = Unsqueeze (m, one)\nmasked = Add (scaled, e)\nn = Mul (e, low)\n"
    mask += "f = Cast <to = 1> (show)\np = Mul (low, f)"
    model = attention_model(mask=mask, inputs=", bool[B, S, T] show")
    fill_types(model)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    assert lower_bound(values["e"]) == pytest.approx(LOWEST)
    assert lower_bound(values["n"]) == -np.inf
    assert lower_bound(values["p"]) == pytest.approx(LOWEST)
    assert lower_bound(model.graph.inputs[0]) == -np.inf


def exported(family: str, implementation: str, path: Path) -> ir.Model:
    """The file that torch's own exporter writes, with dynamic batch and length."""
    model = build(family)
    model.set_attn_implementation(implementation)
    wrapped = _Logits(model).eval()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    given = {"input_ids": torch.full((2, 7), 5), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    torch.onnx.export(
        wrapped, (), str(path), kwargs=given, dynamic_shapes=dict.fromkeys(given, dims), dynamo=True, verbose=False,
        external_data=False,
    )  # fmt: skip
    return ir.load(path)


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize(("family", "implementation"), [("llama", "sdpa")])
def test_files_of_torchs_exporter_compute_the_same_on_padded_batches(
    family: str, implementation: str, tmp_path: Path
) -> None:
    model = exported(family, implementation, tmp_path / "model.onnx")
    result = rewrite(model, "ort", attention="node")
    assert [row.before.heads for row in result.attentions] == [(4, 2), (4, 2)]
    assert result.attention_refusals == []
    for batch, length, padding in ((1, 1, 0), (2, 9, 4)):
        mask = np.ones((batch, length), np.int64)
        mask[-1, :padding] = 0
        feeds = {"input_ids": np.arange(batch * length).reshape(batch, length) % 90 + 3, "attention_mask": mask}
        np.testing.assert_allclose(run(result.model, feeds), run(model, feeds), atol=2e-5)
