"""Which provider runs each norm, and with which operators, in onnxruntime itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.runtime.runners import onnxruntime as ort_runner
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from rmsnorm_deploy.runtime.runners.ort_assignment import (
    NodeRun,
    NormNodes,
    norm_assignment,
    norms_in,
    profiled_nodes,
    recorded_nodes,
)

ort = pytest.importorskip("onnxruntime", reason='needs onnxruntime: pip install "rmsnorm-deploy[cpu]"')

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
FUSED = "SimplifiedLayerNormalization"
X = np.random.default_rng(0).standard_normal((2, 4, 32)).astype(np.float32)


class Block(nn.Module):
    """Three norms: `last` is called first, the sum in front of `middle` becomes a part of it in the plugin."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.last, self.first = (nn.RMSNorm(32, eps=1e-6) for _ in range(3))
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.linear(self.last(x)))
        return self.middle(self.linear(y) + y) + y


@pytest.fixture(scope="module", params=["ort", "standard", "primitives", "plugin"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("exported") / request.param
    export_model(Block().eval(), folder, inputs=(torch.zeros(2, 4, 32),), target=request.param)
    return request.param, folder / "model.onnx"


# What onnxruntime's CPU provider runs: it fuses a spelled-out norm, alone and inlined from a local function.
WANTED = {
    "ort": dict.fromkeys(("last", "first", "middle"), FUSED),
    "standard": dict.fromkeys(("last", "first", "middle"), "RMSNormalization"),
    "primitives": dict.fromkeys(("last", "first", "middle"), FUSED),
    "plugin": {"last": FUSED, "first": FUSED, "middle": f"Add+{FUSED}"},
}


@pytest.mark.parametrize("profile", [False, True])
def test_each_norm_of_a_file(exported: tuple[str, Path], profile: bool) -> None:
    """The optimized graph and the profile of a run say the same."""
    target, path = exported
    with OrtRunner(path, session_options={"profile_norms": profile}) as runner:
        name = runner.inputs()[0].name
        first, second = runner.run({name: X}), runner.run({name: X})
        rows = runner.provenance()["norms"]
    assert {row["path"]: row["op"] for row in rows} == WANTED[target]
    assert {row["provider"] for row in rows} == {CPU}
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_norms_that_are_not_fused_list_their_operators(tmp_path: Path) -> None:
    export_model(Block().eval(), tmp_path / "out", inputs=(torch.zeros(2, 4, 32),), target="primitives")
    with OrtRunner(tmp_path / "out" / "model.onnx", session_options={"graph_optimization_level": "basic"}) as runner:
        rows = runner.norm_assignment()
    assert [row["op"] for row in rows] == ["Pow+ReduceMean+Add+Sqrt+Div+Mul"] * 3


def test_a_large_file_is_not_opened_twice(exported: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its providers are known, its fused operators are not."""
    monkeypatch.setattr(ort_runner, "has_large_weights", lambda files: True)
    with OrtRunner(exported[1]) as runner:
        rows = runner.norm_assignment()
    assert [(row["provider"], row["op"]) for row in rows] == [(CPU, None)] * 3


def test_a_file_without_norms_has_no_rows(tmp_path: Path) -> None:
    export_model(nn.Linear(32, 32).eval(), tmp_path / "out", inputs=(torch.zeros(2, 4, 32),), target="ort")
    with OrtRunner(tmp_path / "out" / "model.onnx", session_options={"profile_norms": True}) as runner:
        runner.run({runner.inputs()[0].name: X})
        assert runner.provenance()["norms"] == []


def test_a_profile_that_no_run_ended_leaves_no_file(
    exported: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    OrtRunner(exported[1], session_options={"profile_norms": True}).close()
    assert list(tmp_path.iterdir()) == []


def test_norms_in_a_file(exported: tuple[str, Path]) -> None:
    target, path = exported
    norms = norms_in(onnx.load(path, load_external_data=False))
    assert [norm.path for norm in norms] == ["last", "first", "middle"]
    functions = [("RMSNorm", 0), ("RMSNorm", 1), ("AddRMSNorm", 0)]
    assert [call for norm in norms for call in norm.calls] == (functions if target == "plugin" else [])
    assert all(name.startswith(f"{norm.path}/") for norm in norms for name in norm.names)


NORM = NormNodes("a", frozenset({"a/Pow", "a/Mul"}), frozenset({"v", "y"}), ())


def _row(recorded: list[NodeRun], ran: list[NodeRun], norm: NormNodes = NORM) -> tuple[Any, Any]:
    (row,) = norm_assignment([norm], recorded, ran)
    return row["provider"], row["op"]


def test_nodes_that_a_provider_compiles() -> None:
    inside = [NodeRun(name, "Pow", TENSORRT, compiled=True) for name in ("a/Pow", "a/Mul", "other")]
    assert _row(inside, []) == (TENSORRT, "compiled")


def test_a_norm_on_two_providers() -> None:
    recorded = [NodeRun("a/Pow", "Pow", CUDA), NodeRun("a/Mul", "Mul", CPU)]
    assert _row(recorded, [NodeRun("a/Pow", "Pow"), NodeRun("a/Mul", "Mul")]) == (f"{CUDA}+{CPU}", "Pow+Mul")


@pytest.mark.parametrize(
    "name", ["a/Mul/SimplifiedLayerNormFusion/", "a/Mul/SimplifiedLayerNormFusion//SkipLayerNormFusion/", "renamed"]
)
def test_a_fused_node_by_its_name_or_its_output(name: str) -> None:
    outputs = frozenset({"y"} if name == "renamed" else {"z"})
    assert _row([NodeRun("a/Mul", "Mul", CPU)], [NodeRun(name, FUSED, None, outputs)]) == (CPU, FUSED)


def test_what_is_not_known_is_none() -> None:
    assert _row([NodeRun("b/Mul", "Mul", CPU)], [NodeRun("ab/Mul", "Mul"), NodeRun("a/Mul/x", "Mul")]) == (None, None)


def test_a_profile_alone_has_providers_too() -> None:
    """As for an onnxruntime that does not record them."""
    assert _row([], [NodeRun("a/Mul/SimplifiedLayerNormFusion/", FUSED, CUDA)]) == (CUDA, FUSED)


def test_calls_of_a_function_that_cannot_be_told_apart() -> None:
    norms = [NormNodes(path, frozenset(), frozenset(), (("RMSNorm", place),)) for place, path in enumerate("ab")]
    start, more = "_inlfunc_RMSNorm_", "rmsnorm_deploy::RMSNorm/squares"
    both = [NodeRun(f"{start}token_7_{more}", "Pow", CUDA), NodeRun(f"{start}{more}", "Pow", CPU)]
    assert [row["provider"] for row in norm_assignment(norms, both, [])] == [CPU, CUDA]
    assert [row["provider"] for row in norm_assignment(norms, both[:1], [])] == [None, None]


def test_a_session_without_a_record(exported: tuple[str, Path]) -> None:
    session = ort.InferenceSession(exported[1], providers=[CPU])
    assert recorded_nodes(session) == []
    assert recorded_nodes(SimpleNamespace()) == []


def test_the_nodes_of_a_profile(tmp_path: Path) -> None:
    def event(name: str, **args: Any) -> dict[str, Any]:
        return {"cat": "Node", "name": name, "args": args}

    kernel = event("a/Mul_kernel_time", op_name="Mul", provider=CPU)
    events = [
        {"cat": "Session", "name": "model_loading", "args": {}},
        event("a/Mul_fence_before", op_name="Mul"),
        kernel,
        kernel,
        event("engine_kernel_time", op_name="TRTKernel", provider=TENSORRT),
    ]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events))
    assert profiled_nodes(path) == [
        NodeRun("a/Mul", "Mul", CPU), NodeRun("engine", "TRTKernel", TENSORRT, compiled=True)
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="needs an NVIDIA GPU and onnxruntime-gpu")
def test_norms_on_a_gpu(exported: tuple[str, Path]) -> None:
    """The record of the session and the profile of a run agree; only RMSNormalization may lack a kernel for CUDA."""
    target, path = exported
    found = []
    for profile in (False, True):
        with OrtRunner(path, providers=["cuda"], session_options={"profile_norms": profile}) as runner:
            runner.run({runner.inputs()[0].name: X})
            found.append({row["path"]: (row["provider"], row["op"]) for row in runner.provenance()["norms"]})
    assert found[0] == found[1]
    assert {op for _, op in found[0].values()} == set(WANTED[target].values())
    assert {provider for provider, _ in found[0].values()} <= ({CUDA, CPU} if target == "standard" else {CUDA})
