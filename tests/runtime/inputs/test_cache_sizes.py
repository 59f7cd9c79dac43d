"""A KV cache whose heads and head size are only named: the numbers of the model's config, or a refusal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.inputs.cache_sizes import cache_sizes
from rmsnorm_deploy.runtime.inputs.synthetic import make_feeds
from rmsnorm_deploy.runtime.runners.base import TensorInfo

NAMED = ("batch_size", "kv_num_heads", "past_seq_len", "head_size")
MASK = TensorInfo("attention_mask", "int64", ("batch_size", "total_seq_len"))


def key(*shape: int | str | None) -> TensorInfo:
    return TensorInfo("past_key_values.0.key", "float32", shape)


def model(**config: Any) -> nn.Module:
    made = nn.Linear(1, 1)
    made.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}, {"kv_num_heads": 2, "head_size": 8}),
        ({"num_attention_heads": 4, "hidden_size": 32, "head_dim": 16}, {"kv_num_heads": 4, "head_size": 16}),
        ({"text_config": SimpleNamespace(num_attention_heads=4, hidden_size=32)}, {"kv_num_heads": 4, "head_size": 8}),
        ({"num_attention_heads": 5, "hidden_size": 32}, {"kv_num_heads": 5}),
        ({"num_key_value_heads": [2, 4]}, {}),
        ({"num_attention_heads": 4, "hidden_size": 32, "kv_lora_rank": 8}, {}),
        ({}, {}),
    ],
)
def test_heads_and_head_size_are_those_of_the_config(config: dict[str, Any], sizes: dict[str, int]) -> None:
    assert cache_sizes([key(*NAMED), MASK], model(**config)) == sizes
    assert cache_sizes([key(*NAMED), MASK], nn.Linear(1, 1)) == {}


def test_a_length_before_the_heads() -> None:
    infos = [key("batch_size", "past_seq_len", "kv_num_heads", 8)]
    assert cache_sizes(infos, model(num_key_value_heads=2)) == {"kv_num_heads": 2}


def test_generated_caches_are_empty_and_have_the_models_heads() -> None:
    infos = [key(*NAMED), MASK]
    sizes = cache_sizes(infos, model(num_attention_heads=4, num_key_value_heads=2, hidden_size=32))
    feeds = make_feeds(infos, 3, 7, 0, None, sizes=sizes)
    assert {name: array.shape for name, array in feeds.items()} == {infos[0].name: (3, 2, 0, 8), MASK.name: (3, 7)}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (NAMED, "dim 1 (kv_num_heads): expected a fixed size or a model whose config states num_key_value_heads"),
        (("b", 2, "past", "head_size"), "dim 3 (head_size): expected a fixed size or a model whose config states head"),
        (("b", None, "past", 8), "dim 1 (without a name): expected a fixed size"),
    ],
)
def test_a_cache_of_unknown_heads_is_refused(shape: tuple[int | str | None, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_feeds([key(*shape)], 1, 4, 0, None)
    assert message in str(caught.value)
    assert str(caught.value).endswith("got neither; give --inputs, or export the file with a fixed size.")
