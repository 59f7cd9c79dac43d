"""Attentions that were recognized become one node while a model is captured; nothing else changes."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from rmsnorm_deploy import export_model
from rmsnorm_deploy.export.capture import attention_nodes as attention_nodes_module
from rmsnorm_deploy.export.capture.attention_nodes import attention_nodes, attentions_by_spec
from rmsnorm_deploy.models.attention.attend import attend
from rmsnorm_deploy.models.attention.find_attention import AttentionRecognition, find_attention
from rmsnorm_deploy.models.calling.example_inputs import example_inputs
from rmsnorm_deploy.models.errors import UsageError
from tests.helpers.extent import EVERY
from tests.helpers.models.families import CACHED, FAMILIES, build

# A window, a softcap, sinks; `RMSNORM_TESTS=all` tests all.
SOME = ("gemma2", "gpt_oss")
DECODERS = [name for name in FAMILIES if name in CACHED and name != "mamba2"]


def operators(path):
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def test_in_pytorch_the_model_computes_its_own_function():
    model = build("llama").eval()
    feeds = example_inputs(model)
    wanted = model(**feeds).logits
    found = find_attention(model, lambda: model(**feeds))
    with attention_nodes(model, found):
        assert torch.equal(model(**feeds).logits, wanted)
        with attentions_by_spec(), mock.patch.object(attention_nodes_module, "attend", wraps=attend) as used:
            torch.testing.assert_close(model(**feeds).logits, wanted, rtol=1e-5, atol=1e-6)
        assert used.call_count == 2
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_without_recognized_attentions_nothing_is_intercepted():
    with attention_nodes(build("llama"), AttentionRecognition()):
        assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_the_manifest_names_each_attention(tmp_path):
    result = export_model(build("gemma2"), tmp_path / "out", target="ort")
    rows = result.manifest["attention"]
    assert [row["path"] for row in rows] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(row["spec"] == {"scale": 8**-0.5, "softcap": 50.0} for row in rows)
    assert all(row["class"] == "Gemma2Attention" for row in rows)
    nodes = {node.name: node for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert [nodes[row["node"]].op_type for row in rows] == ["Attention", "Attention"]
    assert result.manifest["requires"] == {"onnxruntime": "1.27"}
    assert result.manifest["notes"] == []  # such as that the captured graph could not be run at other sizes
    metadata = {row.key: row.value for row in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert json.loads(metadata["rmsnorm_deploy.requires"]) == {"onnxruntime": "1.27"}


def test_decomposed_writes_what_the_function_does(tmp_path):
    result = export_model(build("llama"), tmp_path / "out", target="ort", attention="decomposed")
    assert "Attention" not in operators(tmp_path / "out" / "model.onnx")
    assert result.manifest["attention"] == []
    assert result.manifest["requires"] == {}
    with pytest.raises(UsageError, match="attention: expected one of node, decomposed, in-place, got 'one'"):
        export_model(build("llama"), tmp_path / "other", attention="one")


def test_a_function_that_differs_stays_decomposed_and_says_why(tmp_path):
    original = modeling_llama.eager_attention_forward

    def doubled(module, query, key, value, mask, **options):
        return original(module, query, key, value, mask, **{**options, "scaling": 2 * options["scaling"]})

    model = build("llama").eval()
    model.set_attn_implementation("eager")
    with mock.patch.object(modeling_llama, "eager_attention_forward", doubled):
        result = export_model(model, tmp_path / "out", target="ort")
        wanted = model(**example_inputs(model)).logits.detach().numpy()
    rows = result.manifest["attention"]
    assert [row["path"] for row in rows] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all("its result differs from that of scale" in row["reason"] for row in rows)
    assert "Attention" not in operators(tmp_path / "out" / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    feeds = {name: value.numpy() for name, value in example_inputs(model).items()}
    got = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def left_padded(model, rows, length):
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, :row], mask[row, :row] = 0, 0
    return ids, mask


@pytest.mark.parametrize("name", DECODERS if EVERY else SOME)
def test_steps_of_a_left_padded_batch_are_those_of_pytorch(name, tmp_path):
    """Prefill, past the window of 16, and single tokens: the greedy tokens and the logits are PyTorch's."""
    model = build(name).eval()
    export_model(model, tmp_path / "out", target=["primitives", "ort"], with_past=True)
    for target in ("primitives", "ort"):
        same_steps(model, onnxruntime.InferenceSession(tmp_path / "out" / target / "model.onnx"))


def same_steps(model, session):
    inputs = {value.name: value for value in session.get_inputs()}
    ids, mask = left_padded(model, 3, 14)
    past, cache, step = {}, None, ids
    for _ in range(6):
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
        with torch.no_grad():
            given = {"position_ids": position} if "position_ids" in inputs else {}
            wanted = model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True, **given)
        cache = wanted.past_key_values
        feeds = {"input_ids": step.numpy(), "attention_mask": mask.numpy(), "position_ids": position.numpy()}
        for key, value in inputs.items():
            if key.startswith("past_key_values."):
                shape = [3 if dim == "batch" else dim if isinstance(dim, int) else 0 for dim in value.shape]
                feeds[key] = past.get(key, np.zeros(shape, np.float32))
        outputs = session.run(None, {key: feeds[key] for key in inputs})
        results = dict(zip((value.name for value in session.get_outputs()), outputs, strict=True))
        logits = wanted.logits[:, -1].numpy()
        np.testing.assert_allclose(results["logits"][:, -1], logits, atol=3e-5, rtol=1e-5)
        past = {key.replace("present.", "past_key_values."): results[key] for key in results if key != "logits"}
        step = wanted.logits[:, -1:].argmax(-1)
        assert np.array_equal(results["logits"][:, -1:].argmax(-1), step.numpy())
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
