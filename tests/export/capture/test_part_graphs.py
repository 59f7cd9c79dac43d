"""What the encoder and the decoder of a model are called with, and which inputs and outputs each graph keeps."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from rmsnorm_deploy.export.capture.part_graphs import keep_part, lost_states, part_sample
from rmsnorm_deploy.models.calling.parts import DECODER, ENCODER
from tests.helpers.graphs.onnx_text import parsed
from tests.helpers.models.encoder_decoders import t5

SELF, CROSS = "past_key_values.self_attention_cache.layers.0", "past_key_values.cross_attention_cache.layers.0"


def inputs() -> dict[str, Any]:
    ids = torch.arange(2, 16).reshape(2, 7)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": torch.tensor([[0, 3], [0, 4]]),
    }


def test_the_encoder_is_called_with_a_masked_position() -> None:
    given = inputs()
    sample = part_sample(t5(), ENCODER, given)
    assert sorted(sample) == ["attention_mask", "decoder_input_ids", "input_ids", "use_cache"]
    assert (int(sample["attention_mask"].sum()), int(given["attention_mask"].sum())) == (13, 14)
    assert sample["decoder_input_ids"].tolist() == [[0, 3], [0, 4]]


def test_the_decoder_is_called_with_three_tokens_in_its_cache_and_two_new_ones() -> None:
    model = t5()
    sample = part_sample(model, DECODER, inputs())
    assert sorted(sample) == ["attention_mask", "decoder_input_ids", "encoder_outputs", "past_key_values", "use_cache"]
    assert sample["decoder_input_ids"].tolist() == [[3, 0], [4, 0]]
    cache = sample["past_key_values"]
    assert list(cache.self_attention_cache.layers[0].keys.shape) == [2, 4, 3, 8]
    assert list(cache.cross_attention_cache.layers[0].keys.shape) == [2, 4, 7, 8]
    with torch.no_grad():
        whole = model(
            input_ids=inputs()["input_ids"], attention_mask=sample["attention_mask"],
            decoder_input_ids=torch.tensor([[0, 3, 0, 3, 0], [0, 4, 0, 4, 0]]),
        )  # fmt: skip
        step = model(**sample)
    torch.testing.assert_close(step.logits, whole.logits[:, 3:])


def graph(text: str, names: dict[str, str]) -> ir.Model:
    """A graph with inputs and outputs named as transformers' exporter names them."""
    program = parsed(text)
    for value in [*program.graph.inputs, *program.graph.outputs]:
        value.name = names.get(str(value.name), value.name)
    return program


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def test_the_encoders_graph_keeps_its_states_and_the_cross_attention_cache() -> None:
    program = graph(
        "g (int64[s0, s1] ids, int64[s0, s1] mask, int64[s0, s2] tokens) => (float[a] logits, float[a] states, "
        "float[a] key, float[a] own) { logits = Neg (tokens)  b = Shape <start = 0, end = 1> (tokens)  "
        "states = Expand (ids, b)  key = Neg (mask)  own = Abs (tokens) }",
        {"ids": "input.input_ids", "mask": "input.attention_mask", "tokens": "input.decoder_input_ids",
         "logits": "output.logits", "states": "output.encoder_last_hidden_state",
         "key": f"output.{CROSS}.keys", "own": f"output.{SELF}.keys"},
    )  # fmt: skip
    keep_part(program, ENCODER)
    assert names(program.graph.inputs) == ["input_ids", "attention_mask"]
    assert names(program.graph.outputs) == ["last_hidden_state", "present.0.encoder.key"]
    assert [node.op_type for node in program.graph] == ["Shape", "Expand", "Neg"]
    assert next(node for node in program.graph if node.op_type == "Shape").inputs[0].name == "input_ids"  # type: ignore[union-attr]


def test_the_decoders_graph_keeps_the_logits_and_its_own_cache() -> None:
    program = graph(
        "g (int64[s0, s1] mask, float[s0, s1, 8] states, int64[s0, s2] tokens, float[a] own, float[a] cross, "
        "float[a] unused) => (float[a] logits, float[a] new, float[a] same, int64[1] window) { l = Add (tokens, mask)  "
        "logits = Add (l, states)  new = Add (own, cross)  same = Identity (cross)  window = Size (own) }",
        {"mask": "attention_mask", "states": "encoder_outputs.last_hidden_state", "tokens": "decoder_input_ids",
         "own": f"{SELF}.keys", "cross": f"{CROSS}.keys", "unused": f"{CROSS}.values",
         "logits": "logits", "new": f"{SELF}.keys", "same": f"{CROSS}.keys", "window": f"{SELF}._window"},
    )  # fmt: skip
    program.graph.outputs[-1].shape = ir.Shape([])
    keep_part(program, DECODER)
    assert names(program.graph.inputs) == [
        "attention_mask", "encoder_hidden_states", "decoder_input_ids", "past_key_values.0.decoder.key",
        "past_key_values.0.encoder.key",
    ]  # fmt: skip
    assert names(program.graph.outputs) == ["logits", "present.0.decoder.key"]
    assert lost_states(program) == []


def test_states_that_are_in_one_place_only_are_lost() -> None:
    program = graph(
        "g (float[a] x, float[a] y, float[a] z) => (float[a] p, float[a] q) { p = Add (x, y)  q = Add (z, z) }",
        {"x": "past_key_values.0.key", "y": "past_key_values.0.encoder.key", "z": "past_key_values.1.conv_state",
         "p": "present.0.key", "q": "present.1.recurrent_state"},
    )  # fmt: skip
    assert lost_states(program) == ["1.conv_state", "1.recurrent_state"]
