"""Rows, bytes and times of `benchmarks.kernel`, and how its results are compared with float64, without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kernel import accuracy, run, timing
from benchmarks.kernel.accuracy import OURS, PEERS, judged
from benchmarks.kernel.cases import OPS, OUTPUTS, ROWS, WIDTHS, Budget, Case, case_of, default_cases, grid, whole_grid
from benchmarks.kernel.peers import pytorch
from benchmarks.kernel.timing import Spread, spread
from tests.helpers.plugins.benchmarked import EVERY, exact, made

# Rows


def test_default_rows_are_a_part_of_the_grid_with_every_width_and_number_of_rows() -> None:
    chosen, whole = default_cases(), whole_grid()
    assert len(set(chosen)) == len(chosen) == 108
    assert len(set(whole)) == len(whole) == len(WIDTHS) * len(ROWS) * 8 + 2 * 2 * len(ROWS)
    assert set(chosen) <= set(whole)
    for cases in (chosen, whole):
        assert {case.rows for case in cases} == set(ROWS) == {1, 8, 64, 128, 132, 133, 2048, 8192, 32768}
        assert {case.kernel.width for case in cases} == set(WIDTHS)
        assert {case.op for case in cases} == {
            case_of(op, output, "bfloat16", 1, 64).op for op in OPS for output in OUTPUTS
        }
        assert {case.kernel.dtype for case in cases} == {"bfloat16", "float16", "float32"}
    assert any(width % 2 for width in WIDTHS)


@pytest.mark.parametrize(
    ("op", "output", "dtype", "bytes_of_element", "of_row"),
    [
        ("rms_norm", "same", "bfloat16", 4, 0),
        ("add_rms_norm", "same", "bfloat16", 8, 0),
        ("add_rms_norm", "same", "float32", 16, 0),
        ("rms_norm", "fp8-static", "bfloat16", 3, 0),
        ("add_rms_norm", "fp8-static", "float16", 7, 0),
        ("add_rms_norm", "int8-static", "bfloat16", 7, 0),
        ("rms_norm", "fp8-per-row", "bfloat16", 3, 4),
    ],
)
def test_bytes_of_a_row(op: str, output: str, dtype: str, bytes_of_element: int, of_row: int) -> None:
    assert case_of(op, output, dtype, 2048, 4096).size == 2048 * (4096 * bytes_of_element + of_row)


@pytest.mark.parametrize(
    ("rows", "width", "launches"),
    [(1, 4096, 64), (2048, 2048, 16), (8192, 8192, 4), (32768, 8192, 4), (32768, 65536, 1)],
)
def test_launches_of_a_graph(rows: int, width: int, launches: int) -> None:
    assert case_of("rms_norm", "same", "bfloat16", rows, width).launches == launches


def _budget(seconds: float, took: list[float]) -> tuple[list[Case], Budget]:
    """The cases that are measured when they take these times."""
    now = 0.0
    budget = Budget(seconds, 0.0, lambda: now)
    cases, measured = grid((1,), WIDTHS, ("rms_norm",), ("same",))[: len(took)], []
    for case, time in zip(budget.given(cases), took, strict=False):
        measured.append(case)
        now += time
    return measured, budget


@pytest.mark.parametrize(
    ("seconds", "took", "count"),
    [
        (35.0, [10.0] * 8, 3),
        (30.0, [10.0] * 8, 3),
        (1000.0, [10.0] * 8, 8),
        (70.0, [60.0, *[1.0] * 7], 1),
        (125.0, [60.0, *[1.0] * 7], 8),
        (75.0, [1.0, 1.0, 30.0, 20.0, 1.0, 1.0, 1.0, 1.0], 4),
    ],
)
def test_rows_stop_with_the_time_and_the_others_are_named(seconds: float, took: list[float], count: int) -> None:
    measured, budget = _budget(seconds, took)
    every = grid((1,), WIDTHS, ("rms_norm",), ("same",))[: len(took)]
    assert measured == every[:count]
    assert budget.left == every[count:]


def test_a_slow_row_is_forgotten_after_five_others() -> None:
    # After the sixth row 65 s are over: the slow one would not fit again, the last five do.
    assert len(_budget(70.0, [60.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])[0]) == 1
    assert len(_budget(121.0, [60.0, 0.1, 0.1, 0.1, 0.1, 0.1, 30.0, 0.1])[0]) == 8


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ([], 108),
        (["--all"], 756),
        (["--rows", "1", "8", "--width", "64"], 16),
        (["--op", "rms_norm", "--output", "same", "--width", "64"], 9),
        (["--rows", "1", "--width", "64", "--output", "same", "--dtype", "float16", "float32"], 4),
        (["--check"], 36),
        (["--tune"], 48),
        (["--tune", "--rows", "7"], 8),
    ],
)
def test_options_select_rows(arguments: list[str], count: int) -> None:
    given = run.parser().parse_args(arguments)
    assert len(set(run.selected(given))) == len(run.selected(given)) == count
    assert given.seconds < 480


# Times


def test_median_and_percentiles() -> None:
    assert spread([float(n) for n in range(99, 0, -1)]) == Spread(50.0, 10.0, 90.0)


@pytest.mark.parametrize(("state", "order"), [("cold", "f0f1"), ("warm", "0011")])
def test_graphs_are_replayed_in_turns(monkeypatch: pytest.MonkeyPatch, state: str, order: str) -> None:
    replayed: list[str] = []
    now = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Graph:
        def __init__(self, name: str, milliseconds: float) -> None:
            self.name, self.milliseconds = name, milliseconds

        def replay(self) -> None:
            nonlocal now
            now += self.milliseconds
            replayed.append(self.name)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    graphs = {"a": Graph("0", 0.008), "b": Graph("1", 0.012)}
    flushed: Any = SimpleNamespace(add_=lambda value: replayed.append("f"))
    found = timing.cold(graphs, 4, flushed, 5) if state == "cold" else timing.warm(graphs, 4, 5)
    assert "".join(replayed) == order * 5
    assert found["a"].median == pytest.approx(2.0)
    assert found["b"].p90 == pytest.approx(3.0)


@pytest.mark.parametrize(("keep", "alive"), [(True, 4), (False, 1)])
def test_a_graph_has_one_call_for_each_set_and_results_of_its_own_or_shared_memory(
    monkeypatch: pytest.MonkeyPatch, keep: bool, alive: int
) -> None:
    state = {"recording": False}

    @contextlib.contextmanager
    def recording(graph: object, stream: object) -> Iterator[None]:
        state["recording"] = True
        yield
        state["recording"] = False

    for name, value in {
        "Stream": object, "stream": contextlib.nullcontext, "synchronize": lambda: None, "CUDAGraph": object,
        "graph": recording,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    called: list[tuple[bool, int]] = []
    results: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def work(given: int) -> torch.Tensor:
        nonlocal most
        called.append((state["recording"], given))
        result = torch.zeros(1)
        if state["recording"]:
            results.append(weakref.ref(result))
            most = max(most, sum(found() is not None for found in results))
        return result

    timing.recorded(work, [5, 6, 7, 8], keep)
    assert called == [(False, 5), (False, 6), (False, 7), (True, 5), (True, 6), (True, 7), (True, 8)]
    assert most == alive
    assert all(found() is None for found in results)


# Errors


@pytest.mark.parametrize(("op", "output", "dtype"), EVERY)
def test_right_results_are_accurate_and_unwritten_ones_are_not(op: str, output: str, dtype: str) -> None:
    case = case_of(op, output, dtype, 5, 1001)
    given = made(case)
    assert judged(case, given).problem
    found = judged(case, exact(case, given))
    assert found.problem == ""
    assert 0 < found.error <= 0.5001
    of_pytorch = judged(case, given.with_outputs(pytorch(given)), PEERS)
    assert of_pytorch.problem == ""


@pytest.mark.parametrize(("op", "output", "dtype"), EVERY)
@pytest.mark.parametrize("row", [0, 4])
def test_planted_errors_are_found(monkeypatch: pytest.MonkeyPatch, op: str, output: str, dtype: str, row: int) -> None:
    monkeypatch.setattr(accuracy, "_AT_ONCE", 2 * 512)  # two rows at a time
    case = case_of(op, output, dtype, 5, 512)
    right = exact(case, made(case))
    y = right.y.float()
    column = int((y[row].abs() - y[row].abs().median()).abs().argmin())
    y[row, column] = y[row, column] * 1.4 + (3 if output == "int8-static" else 0)
    for limits in (OURS, PEERS):
        found = judged(case, dataclasses.replace(right, y=y.to(right.y.dtype)), limits)
        assert found.problem.startswith("expected at most")
        assert found.error > 1.01


def test_the_largest_error_does_not_depend_on_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("add_rms_norm", "same", "bfloat16", 7, 640)
    right = exact(case, made(case))
    whole = judged(case, right)
    monkeypatch.setattr(accuracy, "_AT_ONCE", 3 * 640)
    assert judged(case, right) == whole


@pytest.mark.parametrize("limits", [OURS, PEERS])
def test_a_wrong_sum_and_a_wrong_scale_are_named(limits: accuracy.Limits) -> None:
    case = case_of("add_rms_norm", "fp8-per-row", "bfloat16", 4, 256)
    right = exact(case, made(case))
    assert right.sum is not None
    assert right.row_scale is not None
    wrong_sum, wrong_scale = right.sum.clone(), right.row_scale.clone()
    wrong_sum[3, 17] *= 1.01
    wrong_scale[2] *= 1.05
    found = judged(case, dataclasses.replace(right, sum=wrong_sum), limits)
    assert (found.error, found.problem) == (math.inf, "the sum is not x + residual")
    found = judged(case, dataclasses.replace(right, row_scale=wrong_scale), limits)
    assert found.error == math.inf
    assert found.problem.startswith("the scale of a row is not")


def test_one_nan_is_found() -> None:
    case = case_of("rms_norm", "same", "bfloat16", 3, 64)
    right = exact(case, made(case))
    right.y[1, 5] = math.nan
    found = judged(case, right)
    assert math.isnan(found.error)
    assert found.problem == "expected at most 2.01 ULP, got nan"
