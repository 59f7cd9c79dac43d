"""Cases as both sides run them: made up, run with a cache or without, and judged output by output."""

from __future__ import annotations

import dataclasses
import itertools
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
    CHUNK_SUFFIX,
    DECODE_SUFFIX,
    Call,
    Run,
    judge_cache,
    judge_run,
    made_up_cases,
    named,
    repeats,
    run_guarded,
    wide,
    with_cache_names,
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
    assert shapes(made_up_cases([OPEN], Reader(), None, 0), "x") == [(1, 1, 8), (1, 7, 8), (2, 33, 8)]


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


# --------------------------------------------------------------------------------------------------- run_guarded


def run(runner: FunctionRunner, calls: tuple[int, ...] = (), /, **feeds: Array) -> Run:
    return run_guarded(runner, Case("the case", feeds, calls), "the candidate")


def test_a_case_without_a_cache_is_run_once() -> None:
    runner = FunctionRunner(lambda feeds: {"y": 2 * feeds["x"], "present.0.key": feeds["x"]}, outputs=["y"])
    found = run(runner, x=np.ones(3))
    assert set(found.got) == {"y", "present.0.key"}  # nothing goes into a cache, so this is an output like any other
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
    run_of_two = run(runner, **feeds)
    found = run_of_two.got
    assert set(found) == {"logits", "logits" + DECODE_SUFFIX}
    assert [call.positions for call in run_of_two.calls] == [(0, 1, 2), (3,)]
    assert run_of_two.present["present.0.key"].tolist() == ids.tolist()
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
    assert (set(found.got), set(found.present)) == ({"logits"}, {"present.0.key"})
    assert len(runner.fed) == 1


def test_steps_and_chunks_are_calls_of_their_own() -> None:
    """A prefill of 2, three steps of 1, and 3 tokens at once on the cache that is filled by then."""
    runner = FunctionRunner(cached, outputs=["logits", "present.0.key"])
    ids = np.arange(1, 9)[None]
    feeds = {"input_ids": ids, "attention_mask": np.array([[0, *[1] * 7]]), "past_key_values.0.key": np.zeros((1, 0))}
    found = run(runner, (1, 1, 1, 3), **feeds)
    assert [(call.suffix, call.positions) for call in found.calls] == [
        ("", (0, 1)), (DECODE_SUFFIX, (2, 3, 4)), (CHUNK_SUFFIX, (5, 6, 7)),
    ]  # fmt: skip
    assert {name: value[0, :, 0].tolist() for name, value in found.got.items()} == {
        "logits": [1, 3], "logits" + DECODE_SUFFIX: [6, 10, 15], "logits" + CHUNK_SUFFIX: [21, 28, 36],
    }  # fmt: skip
    assert found.present["present.0.key"].tolist() == ids.tolist()
    assert [fed["attention_mask"].tolist() for fed in runner.fed] == [
        [[0, 1]], [[0, 1, 1]], [[0, 1, 1, 1]], [[0, 1, 1, 1, 1]], [[0, *[1] * 7]],
    ]  # fmt: skip


def test_a_case_that_is_shorter_than_its_calls_has_one_step() -> None:
    runner = FunctionRunner(cached, outputs=["logits", "present.0.key"])
    found = run(runner, (1, 1, 1, 3), **{"input_ids": np.ones((1, 4)), "past_key_values.0.key": np.zeros((1, 0))})
    assert [call.positions for call in found.calls] == [(0, 1, 2), (3,)]


def test_a_second_run_must_give_the_same_bits() -> None:
    count = itertools.count()
    steady = FunctionRunner(lambda feeds: {"y": feeds["x"]})
    moody = FunctionRunner(lambda feeds: {"y": feeds["x"] + 1e-7 * (next(count) > 0)})
    for runner, same in ((steady, True), (moody, False)):
        found = repeats(runner, run(runner, x=np.ones(3)))
        assert found.repeated is same
    true = {"y": np.ones(3)}
    rows = judge_run(found, true, true, {}, ["y"])
    assert [(row.name, row.passed) for row in rows] == [("y", True), ("a second run", False)]


def test_a_second_run_that_fails_is_an_error_of_the_package() -> None:
    count = itertools.count()

    def once(feeds: Mapping[str, Array]) -> dict[str, Array]:
        if next(count):
            raise RuntimeError("out of memory")
        return {"y": feeds["x"]}

    runner = FunctionRunner(once)
    first = run(runner, x=np.ones(3))
    with pytest.raises(UsageError, match=r"a second run failed on case .*: RuntimeError: out of memory"):
        repeats(runner, first)


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


def judged(
    candidate: np.ndarray, positions: tuple[int, ...] = (), suffix: str = "", limits: Mapping[str, Limits] | None = None
) -> Any:
    """The verdict on logits of a call at some places of the length."""
    true = logits()
    found = Run(Case("c", {}), (Call({"logits": candidate}, positions, suffix),))
    (row,) = judge_run(found, {"logits": true}, {"logits": true.astype(np.float32)}, limits or {}, ["logits"])
    return row


def test_an_output_is_held_to_the_whole_of_pytorchs() -> None:
    assert judged(logits().astype(np.float32)).passed
    wrong = logits().astype(np.float32)
    wrong[0, -1] = 0.0
    assert not judged(wrong).passed


def test_each_call_is_held_to_the_places_of_its_tokens() -> None:
    right = logits().astype(np.float32)
    assert judged(right[:, :-1], (0, 1, 2)).passed
    step = judged(right[:, -1:], (3,), DECODE_SUFFIX)
    assert (step.name, step.passed) == ("logits" + DECODE_SUFFIX, True)
    assert judged(right[:, 1:3], (1, 2), CHUNK_SUFFIX).passed
    assert not judged(right[:, 1:], (0, 1, 2)).passed
    assert not judged(right[:, :1], (3,), DECODE_SUFFIX).passed
    assert judged(right[:, 2:3], (0, 1, 2)).passed  # logits of the last token only
    assert "shape" in judged(right[:, :2], (0, 1, 2)).reason


def test_another_dtype_passes_only_with_explicit_limits() -> None:
    verdict = judged(logits())
    assert not verdict.passed
    assert "float64" in verdict.reason
    assert "float32" in verdict.reason
    assert verdict.figures is not None
    assert judged(logits(), limits={"logits": Limits(atol=1e-3)}).passed


def test_limits_of_an_output_hold_for_its_decode_step_too() -> None:
    off = (logits() + 0.01).astype(np.float32)
    limits = {"logits": Limits(atol=0.1)}
    assert not judged(off).passed
    assert judged(off, limits=limits).passed
    assert judged(off[:, -1:], (3,), DECODE_SUFFIX, limits).passed
    assert not judged(off, limits={"other": Limits(atol=0.1)}).passed


@pytest.mark.parametrize(("mask", "passed"), [([0, 0, 1, 1], True), ([1, 0, 0, 1], False), ([1, 1, 1, 1], False)])
def test_tokens_with_nothing_but_padding_before_them_are_not_judged(mask: list[int], passed: bool) -> None:
    """They attend to nothing, so their values have no meaning; those after a real token do."""
    wrong = logits().astype(np.float32)
    wrong[0, 1] += 1.0
    feeds = {"attention_mask": np.array([mask, [1, 1, 1, 1]])}
    found = Run(Case("c", feeds), (Call({"logits": wrong}),))
    true = logits()
    (row,) = judge_run(found, {"logits": true}, {"logits": true.astype(np.float32)}, {}, ["logits"])
    assert row.passed is passed


def test_a_run_that_fails_where_pytorch_does_not_is_a_failure() -> None:
    (row,) = judge_run(Run(Case("c", {}), (), error="it fails"), {"y": np.ones(1)}, {"y": np.ones(1)}, {}, ["y"])
    assert (row.name, row.passed, row.reason) == ("the run", False, "it fails")


# --------------------------------------------------------------------------------------------------- judge_cache


def caches(**changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {f"present.{n}.{part}": rng.standard_normal((2, 3, 5, 8)) for n in (0, 1) for part in ("key", "value")}
    return {**made, **{name.replace("_", "."): value for name, value in changes.items()}}


def cache_rows(present: dict[str, np.ndarray], theirs: dict[str, np.ndarray], mask: Any = None) -> list[Any]:
    feeds = {} if mask is None else {"attention_mask": np.array(mask)}
    found = Run(Case("c", feeds), (), {name: value.astype(np.float32) for name, value in present.items()})
    rows = judge_cache(found, theirs, {name: value.astype(np.float32) for name, value in theirs.items()})
    return [(row.name, row.passed) for row in rows]


def test_a_right_cache_has_one_row() -> None:
    ((name, passed),) = cache_rows(caches(), caches())
    assert (name.endswith("(worst of 4)"), passed) == (True, True)


def test_a_wrong_tensor_of_the_cache_has_a_row_of_its_own() -> None:
    wrong = caches()["present.1.key"]
    wrong[1, 2, 4, 7] += 0.1
    rows = cache_rows(caches(present_1_key=wrong), caches())
    assert rows[0] == ("present.1.key", False)
    assert len(rows) == 2


def test_padding_in_the_cache_has_no_meaning() -> None:
    wrong = caches()["present.0.value"]
    wrong[0, :, 0] = 7.0
    mask = [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert all(passed for _, passed in cache_rows(caches(present_0_value=wrong), caches(), mask))
    assert not all(passed for _, passed in cache_rows(caches(present_0_value=wrong), caches(), [[1] * 5] * 2))


def test_a_sliding_layer_keeps_its_last_tokens() -> None:
    theirs = {name: value[:, :, 2:] for name, value in caches().items()}
    assert all(passed for _, passed in cache_rows(caches(), theirs))
    earlier = {name: value[:, :, :3] for name, value in caches().items()}
    assert not all(passed for _, passed in cache_rows(caches(), earlier))


def test_the_caches_of_pytorch_get_the_files_names() -> None:
    x = np.ones(1)
    given = {"past_key_values.layers.12.keys": x, "logits": x, "past_key_values.layers.0.values": x}
    assert with_cache_names(given) == {"present.12.key": x, "logits": x, "present.0.value": x}


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
    made = Run(Case("c", {"input_ids": ids, "past_key_values.0.key": np.zeros((2, 9))}), ())
    assert list(made.torch_feeds) == ["input_ids"]
    assert made.size == 6


def test_limits_for_every_output_are_for_the_cache_too() -> None:
    wrong = caches()["present.1.key"] * 1.01
    present = {name: value.astype(np.float32) for name, value in caches(present_1_key=wrong).items()}
    theirs, found = caches(), Run(Case("c", {}), (), present)
    own = {name: value.astype(np.float32) for name, value in theirs.items()}
    for limit, passed in ((0.011, True), (0.009, False)):
        rows = judge_cache(found, theirs, own, {"*": Limits(max_rms=limit, min_top1=1.0)})
        assert all(row.passed for row in rows) is passed
        assert "top-1" not in rows[0].reason


def test_pytorch_gets_floating_point_inputs_in_its_own_dtype() -> None:
    feeds = {"x": np.ones(2, np.float16), "ids": np.ones(2, np.int64), "past_key_values.0.key": np.ones(1, np.float16)}
    found = Run(Case("c", feeds), ())
    assert {name: value.dtype.name for name, value in found.torch_feeds.items()} == {"x": "float16", "ids": "int64"}
    wide_feeds = dataclasses.replace(found, torch_dtype="float32").torch_feeds
    assert {name: value.dtype.name for name, value in wide_feeds.items()} == {"x": "float32", "ids": "int64"}
    assert set(found.own_feeds) == {"x", "ids"}
