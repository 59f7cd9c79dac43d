"""Rows, tables, losses and whole runs of `benchmarks.kernel` with a GPU replaced; and a short run on a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kernel import measure, run, table, tune
from benchmarks.kernel.cases import Budget, Case, Tensors, case_of, tensors
from benchmarks.kernel.compiled import compiling_processes, layout_name
from benchmarks.kernel.measure import Gpu, Setting
from benchmarks.kernel.peers import Peer, pytorch
from benchmarks.kernel.timing import Spread
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig
from tests.helpers.plugins.benchmarked import H200, exact, peer_of

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
