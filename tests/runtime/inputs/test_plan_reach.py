"""The default inputs of a validation: which masks, positions, tokens and lengths are among them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from rmsnorm_deploy.runtime.inputs.boundaries import last_position
from rmsnorm_deploy.runtime.inputs.plan import CALLS, Plan, plan_cases
from rmsnorm_deploy.runtime.runners.base import TensorInfo

IDS = TensorInfo("input_ids", "int64", ("batch", "sequence"))
MASK = TensorInfo("attention_mask", "int64", ("batch", "total_sequence"))
POSITIONS = TensorInfo("position_ids", "int64", ("batch", "sequence"))
KEY = TensorInfo("past_key_values.0.key", "float32", ("batch", 2, "past_sequence", 4))
DECODER = TensorInfo("decoder_input_ids", "int64", ("batch", "decoder_sequence"))


class Model(nn.Module):
    """A model with a config and an embedding table."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 4)
        self.config = SimpleNamespace(vocab_size=97, **config)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def plan(*infos: TensorInfo, **config: Any) -> Plan:
    return plan_cases(infos, Model(**config), 0)


def lengths(found: Plan) -> list[int]:
    return [case.feeds["input_ids"].shape[1] for case in found.cases]


def test_a_case_follows_one_of_the_same_shapes_and_other_values() -> None:
    for infos in ((IDS, MASK), (TensorInfo("x", "float32", ("batch", "sequence", 4)),)):
        feeds = [case.feeds[infos[0].name] for case in plan(*infos).cases]
        pairs = [(a, b) for a, b in itertools.pairwise(feeds) if a.shape == b.shape]
        assert len(pairs) == 1
        assert not np.array_equal(*pairs[0])


def test_a_single_row_has_padding_and_a_hole() -> None:
    masks = [case.feeds["attention_mask"] for case in plan(IDS, MASK).cases]
    alone = [mask[0].tolist() for mask in masks if len(mask) == 1 and not mask.all()]
    assert alone == [[0, 1, 1, 0, 1, 1, 0]]


def test_rows_have_padding_left_right_on_both_sides_and_a_hole() -> None:
    masks = [case.feeds["attention_mask"] for case in plan(IDS, MASK).cases]
    rows = [row.tolist() for mask in masks if mask.shape == (5, 7) for row in mask]
    assert rows[:4] == [[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]]
    assert [[0, 1, 1, 0, 1, 1, 0]] in [mask.tolist() for mask in masks]


def test_the_rows_of_a_case_have_different_positions_up_to_the_last_one() -> None:
    found = plan(IDS, MASK, POSITIONS, max_position_embeddings=128)
    (case,) = (case for case in found.cases if "other positions" in case.name)
    assert case.feeds["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [3, 4, 5, 8, 9, 10, 11],
        [121, 122, 123, 124, 125, 126, 127],
    ]


def test_without_a_largest_position_the_last_row_starts_at_29() -> None:
    (case,) = (case for case in plan(IDS, MASK, POSITIONS).cases if "other positions" in case.name)
    assert case.feeds["position_ids"][:, 0].tolist() == [0, 3, 29]


def test_the_longest_case_reaches_the_last_position_with_and_without_a_cache() -> None:
    assert max(lengths(plan(IDS, MASK, max_position_embeddings=128))) == 128
    cached = plan(IDS, MASK, POSITIONS, KEY, max_position_embeddings=128)
    assert max(lengths(cached)) == 128
    assert cached.cases[-1].calls == CALLS


def test_a_longest_length_beyond_the_affordable_is_not_tried() -> None:
    assert max(lengths(plan(IDS, MASK, max_position_embeddings=131072))) == 64


def test_every_token_id_is_an_input_of_the_encoder_and_of_the_decoder() -> None:
    found = plan(IDS, MASK, DECODER)
    (case,) = (case for case in found.cases if case.name == "all token ids")
    for name in ("input_ids", "decoder_input_ids"):
        assert set(case.feeds[name].flat) == set(range(97))
        assert case.feeds[name].dtype == np.int64


def test_the_decoder_is_as_long_as_the_longest_relative_position_too() -> None:
    found = plan(IDS, MASK, DECODER, relative_attention_max_distance=128)
    assert max(case.feeds["decoder_input_ids"].shape[1] for case in found.cases) == 130
    unequal = [case for case in found.cases if case.feeds["decoder_input_ids"].shape != case.feeds["input_ids"].shape]
    assert len(unequal) >= len(found.cases) - 2


def test_a_decoder_as_long_as_the_encoder_keeps_its_length() -> None:
    same = TensorInfo("decoder_input_ids", "int64", ("batch", "sequence"))
    (case,) = (case for case in plan(IDS, MASK, same).cases if case.name == "all token ids")
    assert case.feeds["decoder_input_ids"].shape == case.feeds["input_ids"].shape


def test_the_last_position_is_that_of_the_original_context() -> None:
    assert last_position(Model(max_position_embeddings=128)) == 127
    scaled = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert last_position(Model(max_position_embeddings=128, rope_scaling=scaled)) == 63
    assert last_position(Model()) is None
