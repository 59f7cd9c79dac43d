"""The inputs of a validation reach what a config and a file name, and what they do not reach is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from rmsnorm_deploy.export.graph.sizes import SizeLimits
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.inputs.plan import CALLS, Plan, plan_cases
from rmsnorm_deploy.runtime.runners.base import Array, TensorInfo

IDS = TensorInfo("input_ids", "int64", ("batch", "sequence"))
MASK = TensorInfo("attention_mask", "int64", ("batch", "sequence"))
POSITIONS = TensorInfo("position_ids", "int64", ("batch", "sequence"))
X = TensorInfo("x", "float32", ("batch", "sequence", 8))
PAST = TensorInfo("past_key_values.0.key", "float32", ("batch", 2, "past_sequence", 4))
TOTAL = TensorInfo("attention_mask", "int64", ("batch", "total_sequence"))


class Model(nn.Module):
    """A model with a config, and as many parameters as asked for."""

    def __init__(self, parameters: int = 8, **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.zeros_(nn.Linear(1, 1).weight).new_zeros(1).expand(parameters))
        self.config = SimpleNamespace(**{"vocab_size": 50, **config})


def planned(*infos: TensorInfo, thorough: bool = False, limits: SizeLimits | None = None, **config: Any) -> Plan:
    return plan_cases(infos, Model(**config), 0, limits or SizeLimits(), thorough)


def feeds(plan: Plan, start: str) -> dict[str, Array]:
    (case,) = [case for case in plan.cases if case.name.startswith(start)]
    return case.feeds


def test_batches_and_lengths() -> None:
    shapes = {case.feeds["x"].shape[:2] for case in planned(X).cases}
    assert {batch for batch, _ in shapes} == {1, 2, 5}
    lengths = {length for _, length in shapes}
    assert {1, 2} <= lengths
    assert any(length % 2 for length in lengths - {1})


def test_floats_of_every_kind() -> None:
    sizes = [float(np.abs(case.feeds["x"]).max()) for case in planned(X).cases]
    assert min(sizes) < 1e-2  # eps decides
    assert max(sizes) > 1e3  # squares overflow float16


def test_padding_left_right_and_a_hole() -> None:
    plan = planned(IDS, MASK)
    rows = {tuple(row) for row in feeds(plan, "5x7, padded")["attention_mask"].tolist()}
    assert {(1,) * 7, (0, 0, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 0, 0), (0, 1, 1, 1, 1, 1, 0)} <= rows
    assert feeds(plan, "1x7, padded")["attention_mask"].tolist() == [[0, 1, 1, 0, 1, 1, 0]]


def test_other_positions_than_the_default_ones() -> None:
    rows = feeds(planned(IDS, POSITIONS), "3x7 at other")["position_ids"].tolist()
    assert rows == [[*range(7)], [3, 4, 5, 8, 9, 10, 11], [*range(29, 36)]]


def test_all_token_ids_where_that_is_cheap() -> None:
    plan = planned(IDS)
    assert set(feeds(plan, "all token ids")["input_ids"].ravel().tolist()) == set(range(50))
    assert not any("token ids" in text for text in plan.untried)


def test_special_first_and_last_ids_where_it_is_not() -> None:
    plan = planned(IDS, vocab_size=100_000, bos_token_id=77, eos_token_id=[500, 99_998])
    ids = set(feeds(plan, "8 special, first and last")["input_ids"].ravel().tolist())
    assert ids == {0, 1, 2, 77, 500, 99_997, 99_998, 99_999}
    assert "all 100000 token ids: add --thorough" in plan.untried
    assert not any("token ids" in text for text in planned(IDS, vocab_size=100_000, thorough=True).untried)


def test_a_large_model_does_not_try_all_ids_of_a_small_vocabulary() -> None:
    plan = planned(IDS, parameters=10**9, vocab_size=1000)
    assert "all 1000 token ids: add --thorough" in plan.untried


def test_one_case_is_longer_than_every_window() -> None:
    plan = planned(IDS, sliding_window=40, attention_chunk_size=90)
    assert feeds(plan, "1x93")["input_ids"].shape == (1, 93)
    assert [case.long for case in plan.cases if case.name == "1x93"] == [True]


def test_a_window_that_is_too_long_is_said() -> None:
    plan = planned(IDS, sliding_window=4096)
    (text,) = [text for text in plan.untried if "4096" in text]
    assert text == ("lengths past 4096 (the sliding window, sliding_window): add --thorough, or --shape 1x4097")
    assert feeds(planned(IDS, sliding_window=4096, thorough=True), "1x4099")["input_ids"].shape == (1, 4099)


def test_a_length_never_exceeds_the_positions_that_the_model_has() -> None:
    plan = planned(IDS, sliding_window=126, max_position_embeddings=128)
    assert max(case.feeds["input_ids"].shape[1] for case in plan.cases) <= 128


def test_a_decoder_with_a_cache_gets_steps_and_a_chunk() -> None:
    plan = planned(IDS, TOTAL, PAST)
    assert CALLS == (1, 1, 1, 3)
    assert {case.calls for case in plan.cases} == {CALLS, (1,)}
    assert feeds(plan, "5x7, padded left and right then 1 more")["attention_mask"].shape == (5, 8)
    alone = feeds(plan, "1x7, padded left and right, with a hole in the mask then 1+1+1+3 more")["attention_mask"]
    assert [place for place, kept in enumerate(alone[0]) if not kept] == [0, 6, 12]
    assert feeds(plan, "1x7 then 1+1+1+3 more")["input_ids"].shape == (1, 13)
    assert feeds(plan, "1x7 then 1+1+1+3 more")["past_key_values.0.key"].shape == (1, 2, 0, 4)


def test_encoder_and_decoder_have_other_lengths() -> None:
    decoder = TensorInfo("decoder_input_ids", "int64", ("batch", "decoder_sequence"))
    cases = [case for case in planned(IDS, MASK, decoder).cases if case.name != "all token ids"]
    assert len(cases) > 3
    for case in cases:
        assert case.feeds["input_ids"].shape[1] != case.feeds["decoder_input_ids"].shape[1], case.name


def test_only_the_first_case_is_required() -> None:
    """A file that runs at all and fails on another case fails; one that does not run is an error."""
    assert [case.name for case in planned(IDS, MASK).cases if not case.optional] == ["1x1"]


def test_a_file_of_fixed_shape_has_its_own_shape() -> None:
    fixed = TensorInfo("input_ids", "int64", (2, 4))
    plan = planned(fixed, vocab_size=10)
    assert {case.feeds["input_ids"].shape for case in plan.cases} == {(2, 4)}
    assert plan.untried == ["other shapes: all dims of the file are fixed", "all 10 token ids: add --thorough"]


def test_sizes_outside_of_the_files_limits_are_not_tried() -> None:
    plan = planned(IDS, MASK, limits=SizeLimits({"sequence": (1, 16), "batch": (1, 2)}))
    shapes = {case.feeds["input_ids"].shape for case in plan.cases}
    assert max(batch for batch, _ in shapes) <= 2
    assert max(length for _, length in shapes) <= 16
    assert any("sizes for which the file was not exported" in text for text in plan.untried)


def test_nothing_fits_is_an_error() -> None:
    with pytest.raises(UsageError, match="sizes for which the"):
        planned(IDS, limits=SizeLimits({"sequence": (100_000, 100_001)}, ("sequence % 7 == 8",)))


def test_thorough_adds_seeds_and_equal_seeds_give_equal_cases() -> None:
    names = [case.name for case in planned(X, thorough=True).cases]
    assert {"1x1, seed 1", "2x33, seed 2"} <= set(names)
    one, two = planned(IDS, MASK), planned(IDS, MASK)
    assert all(
        np.array_equal(a.feeds["input_ids"], b.feeds["input_ids"]) for a, b in zip(one.cases, two.cases, strict=True)
    )
