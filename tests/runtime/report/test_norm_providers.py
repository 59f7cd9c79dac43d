"""The lines of a report about the providers that ran its norms."""

from __future__ import annotations

from typing import Any

import pytest

from rmsnorm_deploy.runtime.report.html import render
from rmsnorm_deploy.runtime.report.norm_providers import cpu_notes, norm_lines
from rmsnorm_deploy.runtime.report.page import TextPage
from rmsnorm_deploy.runtime.report.printed import print_validation
from tests.helpers.interface.report_sample import sample_report

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FUSED = "SimplifiedLayerNormalization"


def row(path: str, provider: str | None = CPU, op: str | None = FUSED) -> dict[str, Any]:
    return {"path": path, "provider": provider, "op": op}


def run(*rows: dict[str, Any], asked: str = CPU) -> dict[str, Any]:
    return {"runner": "onnxruntime", "providers_asked": [asked], "norms": list(rows)}


def of(candidate: Any) -> dict[str, Any]:
    return {"provenance": {"candidate": candidate}}


def layer(path: str, plugin: bool = False, dtype: str = "float16") -> dict[str, Any]:
    return {"path": path, "layer": "x", "plugin": plugin, "precision": dtype, "statistics": "float32"}


def engine(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"runner": "tensorrt", "product": "TensorRT", "norms": list(rows)}


@pytest.mark.parametrize(
    ("candidate", "lines"),
    [
        (run(row("a"), row("b")), [f"norms ran on: {CPU} 2 ({FUSED})"]),
        (
            run(row("a", CUDA), row("b"), row("c", CUDA, "RMSNormalization"), asked=CUDA),
            [f"norms ran on: {CUDA} 2 ({FUSED}, RMSNormalization), {CPU} 1 ({FUSED})"],
        ),
        (run(row("a", CPU, None), row("b", None, None)), [f"norms ran on: {CPU} 1, unknown 1"]),
        (
            {"encoder": run(row("a")), "decoder": run(row("b")), "other": None},
            [f"encoder: norms ran on: {CPU} 1 ({FUSED})", f"decoder: norms ran on: {CPU} 1 ({FUSED})"],
        ),
        (run(), []),
        ({"runner": "tensorrt", "norms": [{"path": "a", "layer": "x"}]}, []),
        (
            engine(layer("a"), layer("b", plugin=True), layer("c", plugin=True, dtype="float32")),
            [
                "norms ran in: the plugin 2 (float16, statistics in float32; float32, statistics in float32), "
                "layers of TensorRT 1 (float16, statistics in float32)"
            ],
        ),
        (
            {"ort": run(row("a")), "rtx": engine(layer("a"))},
            [
                "rtx: norms ran in: layers of TensorRT 1 (float16, statistics in float32)",
                f"ort: norms ran on: {CPU} 1 ({FUSED})",
            ],
        ),
        ({"runner": "stand-in"}, []),
        (None, []),
    ],
)
def test_lines(candidate: Any, lines: list[str]) -> None:
    assert norm_lines(of(candidate)) == lines


def test_notes_of_norms_on_the_cpu() -> None:
    rows = [row("a", CUDA), row("b"), row("c", f"{CUDA}+{CPU}"), row("d", None)]
    text = f"{CUDA} was requested, and 2 norms ran on {CPU}: b, c"
    assert cpu_notes(of(run(*rows, asked=CUDA))) == [text]
    assert cpu_notes(of({"decoder": run(*rows, asked=CUDA)})) == [f"decoder: {text}"]
    assert cpu_notes(of(run(*rows))) == []
    assert cpu_notes(of(run(row("a", CUDA), asked=CUDA))) == []
    assert cpu_notes({}) == norm_lines({}) == []


def test_both_reports_show_them() -> None:
    report = sample_report()
    report["provenance"]["candidate"] = run(row("a", CUDA), row("b"), asked=CUDA)
    page = TextPage()
    print_validation(page, report)
    shown = [norm_lines(report)[0], f"note: {cpu_notes(report)[0]}"]
    assert [line for line in page.lines if line in shown] == [shown[0], shown[1]]
    html = render(report)
    assert norm_lines(report)[0] in html
    assert cpu_notes(report)[0] in html
