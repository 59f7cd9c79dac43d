"""The parts of an encoder-decoder compute together what the whole model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rmsnorm_deploy.models.calling.parts import (
    DECODER,
    ENCODER,
    DecoderPart,
    EncoderPart,
    cross_cache,
    hidden_size,
    is_encoder_decoder,
    part_of,
)
from rmsnorm_deploy.models.errors import UsageError
from tests.helpers.models.encoder_decoders import t5
from tests.helpers.models.families import build

TOKENS = torch.tensor([[0, 3, 9, 4]])


def part_inputs(model: Any, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a part of an encoder-decoder, made from those of the whole model by running it."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    if name == ENCODER:
        return {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        encoded = EncoderPart(model)(ids, mask)
    return {
        "decoder_input_ids": inputs["decoder_input_ids"],
        "attention_mask": mask,
        "encoder_hidden_states": encoded["last_hidden_state"],
        **cross_cache(encoded),
    }


@pytest.fixture
def model() -> Any:
    return t5()


@pytest.fixture
def inputs() -> dict[str, Any]:
    ids = torch.tensor([[5, 17, 40, 8, 33, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "decoder_input_ids": TOKENS}


def test_both_parts_give_the_logits_of_the_whole_model(model: Any, inputs: dict[str, Any]) -> None:
    given = part_inputs(model, DECODER, inputs)
    assert sorted(given) == [
        "attention_mask", "decoder_input_ids", "encoder_hidden_states", "past_key_values.0.encoder.key",
        "past_key_values.0.encoder.value",
    ]  # fmt: skip
    with torch.no_grad():
        wanted = model(**inputs)
        got = part_of(model, DECODER)(**given)
    assert torch.equal(got["logits"], wanted.logits)
    keys = got["past_key_values"].self_attention_cache.layers[0].keys
    assert torch.equal(keys, wanted.past_key_values.self_attention_cache.layers[0].keys)


def test_the_encoder_returns_its_states_and_the_cross_attention_cache(model: Any, inputs: dict[str, Any]) -> None:
    given = part_inputs(model, ENCODER, inputs)
    assert sorted(given) == ["attention_mask", "input_ids"]
    with torch.no_grad():
        wanted = model(**inputs)
        got = part_of(model, ENCODER)(**given)
    assert sorted(got) == ["last_hidden_state", "present.0.encoder.key", "present.0.encoder.value"]
    layer = wanted.past_key_values.cross_attention_cache.layers[0]
    assert torch.equal(got["last_hidden_state"], wanted.encoder_last_hidden_state)
    assert torch.equal(got["present.0.encoder.key"], layer.keys)
    assert torch.equal(got["present.0.encoder.value"], layer.values)
    assert sorted(cross_cache(got)) == ["past_key_values.0.encoder.key", "past_key_values.0.encoder.value"]


def test_the_decoder_reads_only_the_shape_of_the_states(model: Any, inputs: dict[str, Any]) -> None:
    given = part_inputs(model, DECODER, inputs)
    part = DecoderPart(model)
    with torch.no_grad():
        wanted = part(**given)["logits"]
        del given["encoder_hidden_states"]
        assert torch.equal(part(**given)["logits"], wanted)
        given["past_key_values.0.encoder.value"] = given["past_key_values.0.encoder.value"] * 2
        assert not torch.equal(part(**given)["logits"], wanted)


def test_a_part_has_the_paths_and_the_parameters_of_the_whole_model(model: Any) -> None:
    part = part_of(model, ENCODER)
    assert [name for name, _ in part.named_modules()] == [name for name, _ in model.named_modules()]
    assert all(a is b for a, b in zip(part.parameters(), model.parameters(), strict=True))
    assert part.training is False


def test_an_absent_mask_is_one_of_ones(model: Any) -> None:
    given = part_inputs(model, ENCODER, {"input_ids": TOKENS, "decoder_input_ids": TOKENS})
    assert given["attention_mask"].tolist() == [[1, 1, 1, 1]]


def test_names_of_parts_that_a_model_does_not_have(model: Any) -> None:
    with pytest.raises(UsageError, match=r"one of its parts \(encoder, decoder\), got 'vision'"):
        part_of(model, "vision")
    with pytest.raises(UsageError, match=r"Linear: expected .* one of its parts \(it has none\), got 'encoder'"):
        part_of(nn.Linear(2, 2), "encoder")


def test_which_models_have_parts(model: Any) -> None:
    assert is_encoder_decoder(model)
    assert not is_encoder_decoder(build("qwen3"))
    assert not is_encoder_decoder(nn.Linear(2, 2))


def test_hidden_size(model: Any) -> None:
    assert hidden_size(model) == 32
