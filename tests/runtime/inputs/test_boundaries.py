"""The lengths and the special tokens that real configs name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from torch import nn

from rmsnorm_deploy.models.builtin.decoder import small_decoder
from rmsnorm_deploy.runtime.inputs.boundaries import lengths_named, longest_length, special_ids


def model(config: Any) -> nn.Module:
    made = nn.Identity()
    made.config = config
    return made


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (transformers.LlamaConfig(), []),
        (transformers.MistralConfig(sliding_window=40), [40]),
        (transformers.MistralConfig(sliding_window=None), []),
        (transformers.Gemma2Config(sliding_window=64), [64]),
        (transformers.Qwen2Config(use_sliding_window=False, sliding_window=40), []),
        (transformers.T5Config(relative_attention_num_buckets=32, relative_attention_max_distance=128), [32, 128]),
        (SimpleNamespace(attention_window=[8, 16], sliding_window=True), [8, 16]),
        (SimpleNamespace(text_config=SimpleNamespace(sliding_window=12)), [12]),
        (
            SimpleNamespace(
                rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 48},
                max_position_embeddings=96,
            ),
            [48, 96],
        ),
        (SimpleNamespace(rope_scaling={"type": "dynamic"}, max_position_embeddings=96), [96]),
        (SimpleNamespace(rope_scaling={"type": "linear"}, max_position_embeddings=96), []),
        (
            SimpleNamespace(rope_parameters={"full": {"rope_type": "yarn", "original_max_position_embeddings": 5}}),
            [5],
        ),
        (None, []),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else str(value),
)
def test_lengths(config: Any, lengths: list[int]) -> None:
    found = lengths_named(model(config))
    assert list(found) == lengths
    assert all(found.values())


def test_each_length_says_what_it_bounds() -> None:
    assert lengths_named(model(transformers.MistralConfig(sliding_window=40))) == {
        40: "the sliding window, sliding_window"
    }


def test_the_longest_length_is_the_smallest_that_any_part_allows() -> None:
    parts = SimpleNamespace(max_position_embeddings=100, encoder=SimpleNamespace(n_positions=50))
    assert longest_length(model(parts)) == 50
    assert longest_length(model(None)) is None
    assert longest_length(model(transformers.LlamaConfig(max_position_embeddings=77))) == 77


def test_special_ids_are_those_of_the_config_and_of_text() -> None:
    config = transformers.LlamaConfig(vocab_size=50, bos_token_id=3, eos_token_id=[4, 49], pad_token_id=99)
    assert special_ids(model(config), 50) == [3, 4, 49]
    assert special_ids(model(SimpleNamespace(image_token_id=5, eos_token_id=6, bos_token_id=None)), 50) == [6]
    assert special_ids(model({"eos_token_id": 7}), 50) == [7]
    assert special_ids(model(None), 50) == []


def test_a_config_with_slots_is_read_too() -> None:
    assert isinstance(special_ids(small_decoder(), 50), list)
