"""`benchmarks.kernel` without a GPU: rows, bytes, times, errors, peers, tables, losses; and a short run on a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kernel import accuracy, measure, run, table, timing, tune
from benchmarks.kernel.accuracy import OURS, PEERS, judged
from benchmarks.kernel.cases import (
    OPS,
    OUTPUTS,
    ROWS,
    WIDTHS,
    Budget,
    Case,
    Tensors,
    case_of,
    default_cases,
    grid,
    tensors,
    whole_grid,
)
from benchmarks.kernel.compiled import compiling_processes, layout_name
from benchmarks.kernel.measure import Gpu, Setting
from benchmarks.kernel.peers import Failures, Peer, peers, pytorch, reason_of
from benchmarks.kernel.timing import Spread, spread
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig

H200 = Gpu(90, 132)
EVERY = [(op, output, dtype) for op in OPS for output in OUTPUTS for dtype in ("bfloat16", "float16", "float32")]


def made(case: Case, seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    return tensors(case, "cpu")


def exact(case: Case, given: Tensors) -> Tensors:
    """Outputs from float64, rounded once to the dtype and once more to a quantized one."""
    x = given.x if given.residual is None else given.x + given.residual
    wide = x.double()
    y = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * given.weight.double()
    y = y.to(x.dtype)
    largest = 127 if case.kernel.quantized == "int8" else 448
    outputs = [y]
    if case.kernel.quantized != "none":
        scale = given.scale.double() if given.scale is not None else y.double().abs().amax(-1, keepdim=True) / largest
        scaled = (y.double() / scale).clamp(-largest - (largest == 127), largest)
        outputs = [(scaled.round() if largest == 127 else scaled).float().to(given.y.dtype)]
    outputs += [x] if given.sum is not None else []
    outputs += [scale.float()] if given.row_scale is not None else []
    return given.with_outputs(outputs)


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


# Peers

VERSIONS = {"liger-kernel": "0.8.5", "quack-kernels": "0.6.5", "flashinfer-python": "0.7.2", "triton": "3.5"}


def peer_of(name: str) -> Peer:
    return next(peer for peer in peers(True, VERSIONS.get)[0] if peer.name == name)


def test_peers_have_names_and_versions_and_those_that_are_missing_are_named() -> None:
    found, missing = peers(True, VERSIONS.get)
    assert missing == []
    assert {peer.name: peer.version for peer in found} == {
        "torch": torch.__version__, "torch.compile": f"{torch.__version__}, triton 3.5",
        "liger": "0.8.5", "quack": "0.6.5", "flashinfer": "0.7.2",
    }  # fmt: skip
    found, missing = peers(False, lambda name: None)
    assert [peer.name for peer in found] == ["torch"]
    assert missing == ["liger-kernel", "quack-kernels", "flashinfer-python"]


@pytest.mark.parametrize(
    ("name", "output", "dtype", "missing"),
    [
        ("torch", "int8-static", "float32", ""),
        ("torch.compile", "fp8-per-row", "bfloat16", ""),
        ("liger", "same", "float32", ""),
        ("liger", "fp8-static", "bfloat16", "no quantized output"),
        ("quack", "int8-static", "bfloat16", "no quantized output"),
        ("flashinfer", "same", "float32", "no float32"),
        ("flashinfer", "fp8-static", "float16", ""),
        ("flashinfer", "fp8-per-row", "bfloat16", "no scale for each row"),
        ("flashinfer", "int8-static", "bfloat16", "no int8 output"),
    ],
)
def test_what_peers_lack(name: str, output: str, dtype: str, missing: str) -> None:
    assert peer_of(name).missing(case_of("add_rms_norm", output, dtype, 2, 64)) == missing


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def _liger_rms_norm(X, W, eps, offset, casting_mode, row_mode):  # type: ignore[no-untyped-def]  # noqa: N803
    assert (offset, casting_mode, row_mode) == (0.0, "gemma", None)
    return _norm(X, W, eps), X, None, 0, 0, 0


def _liger_add(X, R, W, eps, offset, casting_mode):  # type: ignore[no-untyped-def]  # noqa: N803
    assert (offset, casting_mode) == (0.0, "gemma")
    return _norm(X + R, W, eps), X + R, None, 0, 0, 0, 0


def _quack_fwd(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, store_rstd=False,
    weight_offset=0.0,
):  # type: ignore[no-untyped-def]  # fmt: skip
    total = x if residual is None else x + residual
    return _norm(total, weight, eps), total, None


def _rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):  # type: ignore[no-untyped-def]
    return out.copy_(_norm(input, weight, eps))


def _rmsnorm_quant(out, input, weight, scale, eps=1e-6, enable_pdl=None):  # type: ignore[no-untyped-def]
    out.copy_((_norm(input, weight, eps).float() / scale).clamp(-448, 448).to(out.dtype))


def _fused_add(input, residual, weight, eps=1e-6, enable_pdl=None):  # type: ignore[no-untyped-def]
    residual += input
    input.copy_(_norm(residual, weight, eps))


def _fused_add_quant(out, input, residual, weight, scale, eps=1e-6, enable_pdl=None):  # type: ignore[no-untyped-def]
    residual += input
    _rmsnorm_quant(out, residual, weight, scale, eps)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with the signatures of the libraries, computed by PyTorch; FlashInfer writes over its inputs."""
    members: dict[str, dict[str, Callable[..., Any]]] = {
        "liger_kernel": {}, "liger_kernel.ops": {},
        "liger_kernel.ops.rms_norm": {"rms_norm_forward": _liger_rms_norm},
        "liger_kernel.ops.fused_add_rms_norm": {"fused_add_rms_norm_forward": _liger_add},
        "quack": {}, "quack.rmsnorm": {"rmsnorm_fwd": _quack_fwd},
        "flashinfer": {},
        "flashinfer.norm": {
            "rmsnorm": _rmsnorm, "rmsnorm_quant": _rmsnorm_quant, "fused_add_rmsnorm": _fused_add,
            "fused_add_rmsnorm_quant": _fused_add_quant,
        },
    }  # fmt: skip
    for name, functions in members.items():
        module = ModuleType(name)
        for function, value in functions.items():
            setattr(module, function, value)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("name", "op", "output"),
    [
        (name, op, output)
        for name in ("torch", "liger", "quack", "flashinfer")
        for op in OPS
        for output in OUTPUTS
        if not peer_of(name).missing(case_of(op, output, "bfloat16", 4, 256))
    ],
)
def test_peers_compute_the_same_and_leave_our_tensors_alone(name: str, op: str, output: str) -> None:
    case, peer = case_of(op, output, "bfloat16", 4, 256), peer_of(name)
    given, before = made(case), made(case)
    outputs = peer.call(case)(peer.own(given))
    assert judged(case, given.with_outputs(outputs), PEERS).problem == ""
    for ours, same in zip((*given.inputs(), *given.outputs()), (*before.inputs(), *before.outputs()), strict=True):
        assert torch.equal(ours.contiguous().view(torch.int8), same.contiguous().view(torch.int8))


def test_the_number_of_outputs_is_checked() -> None:
    given = made(case_of("add_rms_norm", "same", "bfloat16", 2, 64))
    with pytest.raises(ValueError, match="shorter"):
        given.with_outputs([given.y])


def test_a_peer_is_given_up_after_three_failures_in_a_row() -> None:
    peer, failures = peer_of("torch"), Failures()
    for _ in range(2):
        failures.failed(peer, "first")
    assert failures.given_up(peer) == ""
    failures.succeeded(peer)
    for reason in ("a", "b", "c"):
        assert failures.given_up(peer) == ""
        failures.failed(peer, reason)
    assert failures.given_up(peer) == "not tried after 3 failures: c"
    assert failures.given_up(peer_of("liger")) == ""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("\n  no kernel image\nmore"), "RuntimeError: no kernel image"),
        (ImportError(), "ImportError"),
        (ValueError("x" * 300), f"ValueError: {'x' * 105}..."),
    ],
)
def test_reasons_are_short(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


# One row


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The GPU replaced: our kernel by float64, graphs by names, times by this table."""
    times = {"ours": 2.0, "torch": 8.0, "copy": 1.9}

    def timed(graphs: dict[str, Any], launches: int, *rest: Any) -> dict[str, Spread]:
        half = 1.0 if rest else 0.5  # warm times are half of the cold ones
        return {name: Spread(times[name] * half, times[name] * half - 0.1, times[name] * half + 0.1) for name in graphs}

    def launched(case: Case, *rest: Any) -> Callable[[Tensors], None]:
        def launch(given: Tensors) -> None:
            for written, output in zip(given.outputs(), exact(case, given).outputs(), strict=True):
                written.copy_(output)

        return launch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, value in {
        "tensors": lambda case: tensors(case, "cpu"), "launched": launched, "cold": timed, "warm": timed,
        "recorded": lambda call, sets, keep=True: (call(sets[0]), len(sets)),
        "copy_pairs": lambda size, count: [0] * count, "copy_graph": len,
    }.items():  # fmt: skip
        monkeypatch.setattr(measure, name, value)
    return times


def setting_of(case: Case, *others: Peer) -> Setting:
    compiled: Any = SimpleNamespace(registers=32, spilled_bytes=0)
    return Setting(H200, {H200.work(case): compiled}, torch.zeros(1), others)


def test_a_row_has_times_bandwidth_ratios_errors_and_resources(without_gpu: dict[str, float]) -> None:
    case = case_of("add_rms_norm", "same", "bfloat16", 64, 1024)
    row = measure.measured(case, setting_of(case, peer_of("torch")))
    assert row["ours"] == {
        "cold": {"median": 2.0, "p10": 1.9, "p90": 2.1}, "warm": {"median": 1.0, "p10": 0.9, "p90": 1.1},
    }  # fmt: skip
    assert row["peers"]["torch"]["version"] == torch.__version__
    assert row["peers"]["torch"]["error"] <= 2.0
    assert row["best"] == {
        "cold": {"peer": "torch", "median": 8.0, "ratio": 0.25},
        "warm": {"peer": "torch", "median": 4.0, "ratio": 0.25},
    }  # fmt: skip
    assert row["tb_per_second"] == pytest.approx(64 * 1024 * 8 / 2.0 / 1e6)
    assert row["of_copy"] == pytest.approx(0.95)
    assert (row["problem"], row["registers"], row["spilled_bytes"]) == ("", 32, 0)
    assert 0 < row["error"] <= 0.5001
    assert row["layout"] == layout_name(H200.layout(case))
    assert json.loads(json.dumps(table.as_json(row)))["bytes"] == 64 * 1024 * 8


@pytest.mark.usefixtures("without_gpu")
def test_a_peer_that_is_wrong_fails_or_lacks_the_operator_is_no_rival() -> None:
    case = case_of("rms_norm", "same", "bfloat16", 8, 256)

    def fails(case: Case) -> Any:
        raise ImportError("no module | named so")

    others = [
        dataclasses.replace(peer_of("torch"), name="wrong", call=lambda case: lambda t: [pytorch(t)[0] * 1.5]),
        dataclasses.replace(peer_of("torch"), name="fails", call=fails),
        dataclasses.replace(peer_of("torch"), name="lacks", missing=lambda case: "no such thing"),
    ]
    setting = setting_of(case, *others)
    rows = [measure.measured(case, setting) for _ in range(4)]
    found = rows[0]["peers"]
    assert found["wrong"]["problem"].startswith("wrong: expected at most 4.01 ULP, got ")
    assert found["fails"]["problem"] == "failed: ImportError: no module | named so"
    assert found["lacks"] == {"version": torch.__version__, "missing": "no such thing"}
    assert rows[3]["peers"]["fails"]["problem"] == "not tried after 3 failures: ImportError: no module | named so"
    assert rows[0]["best"] == {}
    text = table.rows_table(rows[:1], {peer.name: peer.version for peer in others})
    head, _, line = text.splitlines()
    assert head.count("|") == line.count("|")
    assert "failed: ImportError: no module / named so" in line
    assert "| - |" in line
    problems = table.problems(rows[:1])
    assert len(problems) == 2
    assert problems[1].endswith("ImportError: no module | named so")


@pytest.mark.usefixtures("without_gpu")
def test_a_wrong_result_of_ours_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "launched", lambda *rest: lambda given: None)
    case = case_of("rms_norm", "fp8-static", "bfloat16", 2, 64)
    row = measure.measured(case, setting_of(case))
    assert row["problem"] == "expected at most 0.51 steps, got nan"
    assert "WRONG: expected at most 0.51 steps" in table.row_line(row)
    assert table.problems([row]) == [f"{case.name}: ours is wrong: {row['problem']}"]
    assert json.dumps(table.as_json(row), allow_nan=False)
    assert table.as_json(row)["error"] == "nan"
    assert measure.checked(case, setting_of(case)).problem == row["problem"]


# Tables and losses


def row_of(case: Case, ours: float, rivals: dict[str, float], copy: float, warm: float = 0.5) -> dict[str, Any]:
    """A row with these microseconds; warm times are `warm` of ours and half of the others."""
    medians = {"ours": ours, "copy": copy, **rivals}
    times = {
        name: {"cold": {"median": us}, "warm": {"median": us * (warm if name == "ours" else 0.5)}}
        for name, us in medians.items()
    }
    return {
        "op": case.op, "dtype": case.kernel.dtype, "rows": case.rows, "width": case.kernel.width, "bytes": case.size,
        "ours": times["ours"], "copy": times["copy"],
        "peers": {name: {"version": "1", "error": 0.5, **times[name]} for name in rivals},
        **measure.compared(case.size, times, list(rivals)),
        "error": 0.5, "problem": "", "layout": "1x32x1x8 c1", "registers": 32, "spilled_bytes": 0,
    }  # fmt: skip


FEW = case_of("rms_norm", "same", "bfloat16", 64, 4096)
MANY = case_of("rms_norm", "same", "bfloat16", 2048, 4096)
LARGE = case_of("add_rms_norm", "same", "bfloat16", 8192, 4096)  # 268 MB


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (row_of(FEW, 2.0, {"torch": 2.0, "quack": 3.0}, 1.0), []),
        (row_of(FEW, 2.01, {"torch": 2.0, "quack": 3.0}, 1.0), ["2.01 us, torch 2.00 us, ratio 1.005 with a cold L2",
                                                              "1.00 us, torch 1.00 us, ratio 1.005 with a warm L2"]),
        (row_of(FEW, 2.0, {"torch": 2.0}, 1.0, warm=0.6), ["1.20 us, torch 1.00 us, ratio 1.200 with a warm L2"]),
        (row_of(MANY, 10.0, {"torch": 11.0}, 9.7), []),
        (row_of(MANY, 10.0, {"torch": 11.0}, 9.6), ["96.0% of a copy of the same bytes, expected 97%"]),
        (row_of(MANY, 10.0, {}, 9.6), ["96.0% of a copy of the same bytes, expected 97%"]),
        (row_of(LARGE, LARGE.size / 3.73e6, {"torch": 99.0}, 99.0), []),
        (row_of(LARGE, LARGE.size / 3.71e6, {"torch": 99.0}, 99.0),
         ["3.71 TB/s is 92.8% of the copy bandwidth of 4.00 TB/s, expected 93%"]),
    ],
)  # fmt: skip
def test_losses_are_named(row: dict[str, Any], expected: list[str]) -> None:
    found = table.losses([row], 4.0)
    name = f"{row['op']} {row['dtype']} {row['rows']}x{row['width']}: "
    assert found == [name + text for text in expected]


def test_the_last_table_is_followed_by_the_losses_and_names_what_was_not_measured() -> None:
    rows = [row_of(LARGE, 90.0, {"torch": 99.0}, 95.0), row_of(FEW, 3.0, {"torch": 2.0, "quack": 2.5}, 1.0)]
    text = table.conclusion(rows, 2.0, [MANY], ["rms_norm bfloat16 8x64: RuntimeError: x"])
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("## ")] == [
        "## Ours, the best peer, and a copy", "## Not measured", "## Wrong or failed", "## Losses",
    ]  # fmt: skip
    assert (
        lines[4]
        == "| rms_norm | bfloat16 | 64 | 4096 | 3.00 | 2.00 torch | 1.00 | 1.50 | 33% | 1.50 | 1.00 torch | 1.50 |"
    )
    assert lines[5].startswith("| add_rms_norm | bfloat16 | 8192 | 4096 | 90.00 | 99.00 torch | 95.00 | 0.91 | 106% |")
    assert {line.count("|") for line in lines[2:6]} == {13}
    assert "- rms_norm bfloat16 8x64: RuntimeError: x\n- rms_norm bfloat16 2048x4096" in text
    assert "Every result is accurate, and every peer ran." in text
    assert lines[-2].startswith("- rms_norm bfloat16 64x4096: 3.00 us, torch 2.00 us, ratio 1.500 with a cold L2")
    without = table.conclusion(rows[:1], 2.0, [], [])
    assert without.endswith("## Losses\n\nNone in 1 rows.")
    assert "Every row was measured." in without


def test_the_head_has_the_versions() -> None:
    head = table.rows_table([], {"torch": "2.11.0", "liger": "0.8.5"}).splitlines()[0]
    assert "| torch 2.11.0 | liger 0.8.5 |" in head


# Layouts


@pytest.mark.parametrize("case", tune.tuned_cases()[::7], ids=lambda case: case.name)
def test_layouts_are_many_whole_and_valid_and_the_chosen_one_is_first(case: Case) -> None:
    found = tune.layouts(case, H200)
    assert found[0] == dataclasses.replace(H200.layout(case), few=False)
    assert len(set(found)) == len(found) >= 5
    assert len({layout_name(config) for config in found}) == len(found)
    for config in found:
        config.check(case.kernel, 90)
        assert config.is_whole(case.kernel.width)
    assert {config.cluster for config in tune.layouts(case, Gpu(80, 108))[1:]} == {1}
    assert [work[1] for work in tune.works(case, H200)] == found


def test_where_the_rule_loses_more_than_three_percent() -> None:
    row = {"op": "rms_norm", "rows": 8, "width": 4096, "copy": 1.5, "wrong": {"b": "NaN"}}
    rows = [
        {**row, "layouts": {"a": 2.05, "b": 2.0}},
        {**row, "layouts": {"a": 2.07, "b": 2.0, "c": 3.0}},
        {**row, "layouts": {"a": 1.0, "b": 2.0}},
    ]
    assert tune.rule_losses(rows) == ["rms_norm 8x4096: chosen a 2.07 us, fastest b 2.00 us, ratio 1.035"]
    assert tune.line(rows[1]) == (
        "| rms_norm | 8 | 4096 | 1.50 | a 2.07 | b 2.00 | 1.035 | b 2.00 WRONG, a 2.07, c 3.00 |"
    )
    assert tune.HEAD.count("|") == tune.line(rows[0]).count("|")


# Whole runs


def test_kernels_are_compiled_once_each_in_other_processes() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install 'rmsnorm-deploy[kernel]'")
    case = case_of("rms_norm", "same", "bfloat16", 8, 256)
    work = (case.kernel, LaunchConfig(32, 1, 8), 90)
    with compiling_processes() as compile_all:
        found = compile_all([work, H200.work(case), work])
    assert set(found) == {work, H200.work(case)}
    assert all(compiled.registers > 8 and compiled.architecture == 90 for compiled in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("arguments", [[], ["--tune"], ["--check"]])
def test_without_a_gpu_the_exit_code_is_4(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(arguments) == 4
    assert capsys.readouterr().err == "benchmarks.kernel requires an NVIDIA GPU and the CUDA build of torch.\n"


@pytest.mark.usefixtures("without_gpu")
def test_a_run_writes_its_files_and_lists_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cases = [FEW, case_of("rms_norm", "same", "bfloat16", 2, 64), case_of("rms_norm", "same", "bfloat16", 3, 64), MANY]
    real = measure.measured

    def measured(case: Case, setting: Setting) -> dict[str, Any]:
        if case is cases[1]:
            raise RuntimeError("launch failed")
        return real(case, setting)

    monkeypatch.setattr(run, "measured", measured)
    monkeypatch.setattr(run, "copy_bandwidth", lambda flushed: 4.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    now = iter(range(0, 100, 10))
    compiled: Any = SimpleNamespace(registers=32, spilled_bytes=0)
    setting = Setting(H200, {H200.work(case): compiled for case in cases}, torch.zeros(1), [peer_of("torch")])
    given = run.parser().parse_args(
        ["--json", str(tmp_path / "k.json"), "--markdown", str(tmp_path / "k.md"), "--no-compile"]
    )
    budget = Budget(55.0, 0.0, lambda: float(next(now)))
    assert run._measure(run.Run(given, budget, setting, "GPU of a test"), cases) == 1
    content = json.loads((tmp_path / "k.json").read_text(encoding="utf-8"))
    assert content["device"] == "GPU of a test"
    assert [row["rows"] for row in content["rows"]] == [64, 3]
    assert content["failed"] == ["rms_norm bfloat16 2x64: RuntimeError: launch failed"]
    assert content["left"] == [MANY.name]
    assert all(row["seconds"] > 0 for row in content["rows"])
    text = (tmp_path / "k.md").read_text(encoding="utf-8")
    assert text.startswith("GPU of a test\n\nA copy of 2 GiB: 4.00 TB/s.")
    assert f"- {content['failed'][0]}\n- {MANY.name}\n" in text
    printed = capsys.readouterr().out
    assert "2 of 4 rows in" in printed
    assert printed.endswith(text[text.index("## Ours") :])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and the CUDA build of torch")
def test_a_short_run_on_a_gpu(tmp_path: Path) -> None:
    chosen = ["--rows", "3", "2048", "--width", "1001", "4096", "--output", "same", "fp8-per-row", "--no-compile"]
    assert run.main([*chosen, "--json", str(tmp_path / "k.json"), "--markdown", str(tmp_path / "k.md")]) == 0
    content = json.loads((tmp_path / "k.json").read_text(encoding="utf-8"))
    assert len(content["rows"]) == 16
    assert content["left"] == content["failed"] == []
    for row in content["rows"]:
        assert "problem" not in row["peers"]["torch"]
        for state in ("cold", "warm"):
            assert 0.5 < row["ours"][state]["median"] < 1000
            assert row["ours"][state]["p10"] <= row["ours"][state]["median"] <= row["ours"][state]["p90"]
    assert run.main(["--tune", "--rows", "8", "--width", "4096", "--op", "rms_norm"]) == 0
