"""Errors along the depth: the points, what parts introduce by themselves, and whether looking changed anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy.runtime.inputs.cases import Case
from rmsnorm_deploy.runtime.norms.activation_store import ActivationStore, Key
from rmsnorm_deploy.runtime.norms.adversarial_rows import AS_IT_RUNS
from rmsnorm_deploy.runtime.validation.candidate import Candidate
from rmsnorm_deploy.runtime.validation.depth import DepthPoint, errors_introduced, measure_depth
from rmsnorm_deploy.runtime.validation.run_cases import Run
from tests.helpers.runtime.stand_ins import FunctionRunner, called, norm_check, segment, verdict

FIRST, SECOND = ("first", 0), ("second", 0)
# Errors that float32 holds exactly beside 1.
SMALL, LARGE = 2.0**-10, 2.0**-6


class Traced:
    """A side that has ones at every norm, one element of which is off by what is given; outputs as given."""

    def __init__(self, errors: Mapping[tuple[Key, str], float], outputs: dict[str, np.ndarray]) -> None:
        self._errors, self._outputs = errors, outputs
        self.fed: list[dict[str, np.ndarray]] = []

    def trace(self, feeds: dict[str, np.ndarray], keys: list[Key], sink: Any) -> dict[str, np.ndarray]:
        self.fed.append(feeds)
        for key in keys:
            for role in ("x", "y"):
                value = np.ones((3, 8), np.float32)
                value[1, 2] += np.float32(self._errors.get((key, role), 0.0))
                sink(key, role, value)
        return self._outputs


def measured(
    theirs: Mapping[tuple[Key, str], float], own: Mapping[tuple[Key, str], float], exposed: Any, plain: Any, **more: Any
) -> tuple[list[DepthPoint], str, Traced, Traced]:
    access, norms = Traced(theirs, exposed), Traced(own, {})
    runner = FunctionRunner(lambda feeds: plain)

    @contextmanager
    def opened() -> Iterator[Any]:
        yield runner

    feeds = {"input_ids": np.zeros((3, 8), np.int64), "past_key_values.0.key": np.zeros((3, 0))}
    with ActivationStore() as free:
        for key in (FIRST, SECOND):
            for role in ("x", "y"):
                free.put(key, role, np.ones((3, 8)))
        points, note = measure_depth(
            Candidate("c", opened), access, norms, Run(Case("case", feeds), {}),  # type: ignore[arg-type]
            [FIRST, SECOND], free, more.get("introduced", {}),
        )  # fmt: skip
    assert len(runner.fed) == 1
    return points, note, access, norms


OUT = {"y": np.ones((3, 8), np.float32)}


def test_a_point_for_each_side_of_each_norm() -> None:
    theirs = {(FIRST, "y"): LARGE, (SECOND, "x"): SMALL}
    points, _, access, norms = measured(theirs, {(SECOND, "y"): SMALL}, OUT, OUT)
    assert [(p.key, p.side, p.error, p.baseline_error) for p in points] == [
        (FIRST, "input", 0.0, 0.0),
        (FIRST, "output", LARGE, 0.0),
        (SECOND, "input", SMALL, 0.0),
        (SECOND, "output", 0.0, SMALL),
    ]
    assert all((p.introduced, p.baseline_introduced) == (None, None) for p in points)
    assert set(access.fed[0]) == {"input_ids", "past_key_values.0.key"}
    assert set(norms.fed[0]) == {"input_ids"}


def test_what_parts_introduce_stands_where_they_end() -> None:
    points, _, *_ = measured({}, {}, OUT, OUT, introduced={(FIRST, "y"): (1.0, 2.0), (SECOND, "x"): (3.0, 4.0)})
    found = {(p.key, p.side): (p.introduced, p.baseline_introduced) for p in points}
    assert found[FIRST, "output"] == (1.0, 2.0)
    assert found[SECOND, "input"] == (3.0, 4.0)
    assert found[FIRST, "input"] == found[SECOND, "output"] == (None, None)


def test_the_note_says_whether_looking_changed_the_outputs() -> None:
    _, same, *_ = measured({}, {}, OUT, OUT)
    changed = np.ones((3, 8), np.float32)
    changed[0, :2] += np.float32(LARGE)
    _, other, *_ = measured({}, {}, {"y": changed, "z": changed}, {**OUT, "z": changed})
    assert "did not change the outputs" in same
    assert "changed 2 elements" in other
    assert f"{LARGE:.3g}" in other


def test_the_note_of_outputs_that_are_whole_numbers() -> None:
    _, note, *_ = measured({}, {}, {"ids": np.array([1, 2, 3])}, {"ids": np.array([1, 2, 4])})
    assert "changed 1 elements" in note


# ------------------------------------------------------------------------------------------------ errors_introduced


def test_a_norm_introduces_what_it_does_as_the_model_runs() -> None:
    kinds = [verdict("normal", error=0.5), verdict(AS_IT_RUNS.name, LARGE, SMALL), verdict("tiny", error=0.5)]
    assert errors_introduced([norm_check(called("first"), kinds=kinds)], []) == {(FIRST, "y"): (LARGE, SMALL)}


def test_a_segment_introduces_error_before_the_norm_at_its_end() -> None:
    segments = [segment("a", end=SECOND, error=SMALL), segment("to an output")]
    assert errors_introduced([], segments) == {(SECOND, "x"): (SMALL, 0.0)}


def test_what_could_not_be_compared_is_left_out() -> None:
    nothing = verdict("x")
    broken = type(nothing)(AS_IT_RUNS.name, False, "shape", None, None)
    checks = [norm_check(called("first"), False, [broken]), norm_check(called("second"))]
    parts = [type(segment("s"))("s", broken, [], FIRST)]
    assert errors_introduced(checks, parts) == {}


@pytest.mark.parametrize(("error", "shown"), [(0.5, 0.5), (math.inf, "inf"), (math.nan, "nan")])
def test_a_point_as_json(error: float, shown: Any) -> None:
    assert DepthPoint(("p", 2), "output", error, 1.0, None, error).to_dict() == {
        "path": "p",
        "call": 2,
        "side": "output",
        "error": shown,
        "baseline_error": 1.0,
        "introduced": None,
        "baseline_introduced": shown,
    }
