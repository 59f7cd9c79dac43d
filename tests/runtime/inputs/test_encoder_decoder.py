"""An encoder and a decoder run together: what each gets, and what is kept between the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rmsnorm_deploy.runtime.inputs.encoder_decoder import decoder_steps, encoder_decoder_tokens
from rmsnorm_deploy.runtime.runners.base import Array, TensorInfo

KEY, CROSS = "past_key_values.0.decoder.key", "past_key_values.0.encoder.key"


class Encoder:
    def inputs(self) -> list[TensorInfo]:
        return [TensorInfo("input_ids", "int64", ("batch", "sequence"))]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"last_hidden_state": feeds["input_ids"][..., None], "present.0.encoder.key": feeds["input_ids"] + 100}


class Decoder:
    """Its most likely token is the number of tokens in its cache, and the last one."""

    def __init__(self) -> None:
        self.fed: list[dict[str, Any]] = []

    def inputs(self) -> list[TensorInfo]:
        return [
            TensorInfo("decoder_input_ids", "int64", ("batch", "decoder_sequence")),
            TensorInfo(KEY, "float32", ("batch", 1, "past_sequence", 1)),
            TensorInfo(CROSS, "int64", ("batch", "encoder_sequence")),
        ]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.fed.append({name: value.tolist() for name, value in feeds.items()})
        new = feeds["decoder_input_ids"].astype(np.float32)[:, None, :, None]
        cache = np.concatenate([feeds[KEY], new], axis=2)
        logits = np.eye(9, dtype=np.float16)[[[cache.shape[2]]] * len(cache)]
        return {"logits": logits, "present.0.decoder.key": cache}


def test_the_cross_attention_cache_stays_and_the_other_grows() -> None:
    decoder = Decoder()
    step = decoder_steps((Encoder(), decoder), np.array([[5, 6]]), np.ones((1, 2), np.int64))  # type: ignore[arg-type]
    first, second = step(np.array([[3]])), step(np.array([[4]]))
    assert (first.argmax(), second.argmax(), first.dtype.name) == (1, 2, "float32")
    assert [fed[KEY] for fed in decoder.fed] == [[[[]]], [[[[3.0]]]]]
    assert [fed[CROSS] for fed in decoder.fed] == [[[105, 106]], [[105, 106]]]
    assert [fed["decoder_input_ids"] for fed in decoder.fed] == [[[3]], [[4]]]


def test_tokens_end_at_the_count_or_at_an_end_token() -> None:
    runners: Any = (Encoder(), Decoder())
    assert encoder_decoder_tokens(runners, [5, 6], 0, set(), 4) == [1, 2, 3, 4]
    assert encoder_decoder_tokens(runners, [5, 6], 0, {2}, 4) == [1, 2]
    assert encoder_decoder_tokens(runners, [5, 6], 2, {2}, 1) == [1]
