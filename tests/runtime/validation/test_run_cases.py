"""Cases as both sides run them: made up, run with a cache or without, and judged output by output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from torch import Tensor, nn

from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.runtime.accuracy.tolerances import Limits
from rmsnorm_deploy.runtime.inputs.cases import Case
from rmsnorm_deploy.runtime.runners.base import Array, TensorInfo
from rmsnorm_deploy.runtime.validation.run_cases import (
    DECODE_SUFFIX,
    Run,
    by_position,
    judge_output,
    made_up_cases,
    named,
    run_guarded,
    wide,
)
from tests.helpers.runtime.stand_ins import FunctionRunner

OPEN = TensorInfo("x", "float32", ("batch", "sequence", 8))
IDS = TensorInfo("input_ids", "int64", ("batch", "sequence"))
PAST = TensorInfo("past_key_values.0.key", "float32", ("batch", 2, "past_sequence_length", 4))


class Reader(nn.Module):
    """Takes x and a mask; knows 10 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


def shapes(cases: list[Case], name: str) -> list[tuple[int, ...]]:
    return [case.feeds[name].shape for case in cases]


# ------------------------------------------------------------------------------------------------- made_up_cases


def test_made_up_cases_have_the_shapes_that_were_asked_for() -> None:
    cases = made_up_cases([OPEN], Reader(), [(2, 5), (1, 3)], 0)
    assert [case.name for case in cases] == ["2x5", "1x3"]
    assert shapes(cases, "x") == [(2, 5, 8), (1, 3, 8)]


def test_made_up_cases_have_the_default_shapes_else() -> None:
    assert shapes(made_up_cases([OPEN], Reader(), None, 0), "x") == [(1, 1, 8), (1, 7, 8), (3, 33, 8)]


def test_a_decoder_with_a_cache_gets_one_more_token() -> None:
    cases = made_up_cases([IDS, PAST], Reader(), [(2, 5)], 0)
    assert shapes(cases, "input_ids") == [(2, 6)]
    assert shapes(cases, PAST.name) == [(2, 2, 0, 4)]
    assert "2x5" in cases[0].name
    assert cases[0].name != "2x5"


def test_token_ids_are_of_the_models_vocabulary() -> None:
    (case,) = made_up_cases([IDS], Reader(), [(8, 50)], 0)
    assert set(np.unique(case.feeds["input_ids"])) == set(range(10))


def test_a_file_of_fixed_shape_has_one_case() -> None:
    (case,) = made_up_cases([TensorInfo("x", "float32", (2, 8))], Reader(), None, 0)
    assert case.feeds["x"].shape == (2, 8)
    assert "x" not in case.name.split()  # no batch and length that it does not have
    assert "1x1" not in case.name


def test_the_seed_decides_the_values() -> None:
    one, two, other = (made_up_cases([OPEN], Reader(), [(2, 5)], seed)[0].feeds["x"] for seed in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


# --------------------------------------------------------------------------------------------------- by_position


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x"], None),
        (["mask", "x"], None),
        (["x", "past_key_values.0.key"], None),
        (["hidden", "mask"], ["hidden", "mask"]),
        (["x", "attention", "past_key_values.0.key"], ["x", "attention"]),
    ],
)
def test_names_that_forward_does_not_have_go_by_position(names: list[str], expected: list[str] | None) -> None:
    assert by_position(Reader(), [TensorInfo(name, "float32", None) for name in names]) == expected


# --------------------------------------------------------------------------------------------------- run_guarded


def run(runner: FunctionRunner, **feeds: Array) -> dict[str, Array]:
    return run_guarded(runner, Case("the case", feeds), "the candidate")


def test_a_case_without_a_cache_is_run_once() -> None:
    runner = FunctionRunner(lambda feeds: {"y": 2 * feeds["x"], "present.0.key": feeds["x"]}, outputs=["y"])
    found = run(runner, x=np.ones(3))
    assert set(found) == {"y", "present.0.key"}
    assert len(runner.fed) == 1


def cached(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Logits are the sum of all ids so far; the cache holds the ids."""
    ids, past = feeds["input_ids"], feeds["past_key_values.0.key"]
    present = np.concatenate([past, ids.astype(past.dtype)], axis=1)
    logits = np.cumsum(present, axis=1)[:, past.shape[1] :]
    return {"logits": logits[..., None], "present.0.key": present}


def test_a_decoder_runs_over_its_prompt_and_over_one_more_token() -> None:
    runner = FunctionRunner(cached, outputs=["logits", "present.0.key"])
    ids = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones((2, 4), np.int64),
        "position_ids": np.arange(4)[None].repeat(2, 0),
        "past_key_values.0.key": np.zeros((2, 0)),
        "bias": np.zeros(4),
    }
    found = run(runner, **feeds)
    assert set(found) == {"logits", "logits" + DECODE_SUFFIX}
    assert found["logits"][..., 0].tolist() == [[1, 3, 6], [5, 11, 18]]
    assert found["logits" + DECODE_SUFFIX][..., 0].tolist() == [[10], [26]]
    prefill, decode = runner.fed
    assert prefill["input_ids"].tolist() == [[1, 2, 3], [5, 6, 7]]
    assert prefill["attention_mask"].shape == (2, 3)
    assert prefill["position_ids"].shape == (2, 3)
    assert decode["input_ids"].tolist() == [[4], [8]]
    assert decode["position_ids"].tolist() == [[3], [3]]
    assert decode["attention_mask"].shape == (2, 4)
    assert decode["past_key_values.0.key"].tolist() == [[1, 2, 3], [5, 6, 7]]
    assert all(fed["bias"].shape == (4,) for fed in runner.fed)
    assert np.array_equal(feeds["input_ids"], ids)


def test_a_single_token_has_nothing_to_cache() -> None:
    runner = FunctionRunner(cached, outputs=["logits", "present.0.key"])
    found = run(runner, **{"input_ids": np.array([[7]]), "past_key_values.0.key": np.zeros((1, 0))})
    assert set(found) == {"logits"}
    assert len(runner.fed) == 1


def test_any_exception_of_a_runner_becomes_a_usage_error() -> None:
    def failing(feeds: Mapping[str, Array]) -> dict[str, Array]:
        raise ZeroDivisionError("by nothing")

    with pytest.raises(UsageError) as error:
        run(FunctionRunner(failing), x=np.ones(1))
    assert all(text in str(error.value) for text in ("the candidate", "the case", "ZeroDivisionError", "by nothing"))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_error_of_our_own_is_left_as_it_is() -> None:
    def failing(feeds: Mapping[str, Array]) -> dict[str, Array]:
        raise UnsupportedError("no kernel")

    with pytest.raises(UnsupportedError, match="no kernel"):
        run(FunctionRunner(failing), x=np.ones(1))


@pytest.mark.parametrize(("returned", "word"), [({"y": np.ones(1)}, "z, got y"), ({}, "declares, got none")])
def test_outputs_that_do_not_come_are_refused(returned: dict[str, Array], word: str) -> None:
    runner = FunctionRunner(lambda feeds: returned, outputs=["y", "z"] if returned else [])
    with pytest.raises(UsageError, match=f"expected the outputs .*{word}"):
        run(runner, x=np.ones(1))


# -------------------------------------------------------------------------------------------------- judge_output


def logits(rows: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, rows, 16))


def judged(name: str, candidate: np.ndarray, limits: Mapping[str, Limits] | None = None) -> Any:
    true = logits()
    return judge_output(name, candidate, {"logits": true}, {"logits": true.astype(np.float32)}, limits or {})


def test_an_output_is_held_to_the_whole_of_pytorchs() -> None:
    assert judged("logits", logits().astype(np.float32)).passed
    wrong = logits().astype(np.float32)
    wrong[0, -1] = 0.0
    assert not judged("logits", wrong).passed


def test_the_prompt_is_held_to_all_but_the_last_and_the_step_to_the_last() -> None:
    right = logits().astype(np.float32)
    assert judged("logits", right[:, :-1]).passed
    assert judged("logits" + DECODE_SUFFIX, right[:, -1:]).passed
    assert not judged("logits", right[:, 1:]).passed
    assert not judged("logits" + DECODE_SUFFIX, right[:, :1]).passed
    assert "shape" in judged("logits", right[:, :2]).reason


def test_another_dtype_passes_only_with_explicit_limits() -> None:
    verdict = judged("logits", logits())
    assert not verdict.passed
    assert "float64" in verdict.reason
    assert "float32" in verdict.reason
    assert verdict.figures is not None
    assert judged("logits", logits(), {"logits": Limits(atol=1e-3)}).passed


def test_limits_of_an_output_hold_for_its_decode_step_too() -> None:
    off = (logits() + 0.01).astype(np.float32)
    limits = {"logits": Limits(atol=0.1)}
    assert not judged("logits", off).passed
    assert judged("logits", off, limits).passed
    assert judged("logits" + DECODE_SUFFIX, off[:, -1:], limits).passed
    assert not judged("logits", off, {"other": Limits(atol=0.1)}).passed


# ------------------------------------------------------------------------------------------------- named and Run


def test_outputs_are_named_as_the_candidate_names_them() -> None:
    one, two = np.zeros(1), np.ones(1)
    assert named({"a": one, "b": two, "c": one}, ["b", "present.0.key"]) == {"b": two}
    assert named({"output_0": one, "output_1": two}, ["y", "z", "present.0.value"]) == {"y": one, "z": two}


def test_outputs_of_another_number_are_refused() -> None:
    with pytest.raises(UsageError, match="y, z") as error:
        named({"output": np.zeros(1)}, ["y", "z"])
    assert "output" in str(error.value)


def test_floats_are_widened_and_the_rest_is_not() -> None:
    feeds = {
        "a": np.ones(2, np.float16),
        "b": np.ones(2, ml_dtypes.bfloat16),
        "c": np.ones(2, np.int32),
        "d": np.ones(2, bool),
    }
    found = wide(feeds)
    assert [found[name].dtype.name for name in "abcd"] == ["float64", "float64", "int32", "bool"]
    assert feeds["a"].dtype == np.float16


def test_a_runs_size_and_feeds_leave_the_cache_out() -> None:
    ids = np.ones((2, 3), np.int64)
    made = Run(Case("c", {"input_ids": ids, "past_key_values.0.key": np.zeros((2, 9))}), {})
    assert list(made.torch_feeds) == ["input_ids"]
    assert made.size == 6
