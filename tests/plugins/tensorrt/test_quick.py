"""The quick plugins in the real registry and `tensorrt.plugin` of TensorRT 11.4, without builder and GPU.

A process has one registry: so each task runs in its own. The kernels are run by the interpreter of PTX, with the
arguments that TensorRT gives: inputs, what the plugin adds, outputs.
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch

from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UnsupportedError
from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, choose, layouts
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from rmsnorm_deploy.plugins.tensorrt import quick
from rmsnorm_deploy.plugins.tensorrt.images import kernel_of
from rmsnorm_deploy.plugins.tensorrt.quick import quick_layouts, register_quick_plugins
from tests.helpers.norms.norm_cases import FLOAT16, case, residual_model
from tests.helpers.plugins.kernel_cases import Case, check_against_reference
from tests.helpers.plugins.kernels import Array, Kernels
from tests.helpers.plugins.ptx import Machine, Program
from tests.helpers.plugins.ptx_arithmetic import Approximation
from tests.helpers.plugins.ptx_memory import GlobalMemory
from tests.helpers.tensorrt import lean_tensorrt, quick_plugins
from tests.helpers.tensorrt.quick_plugins import ARCHITECTURE, BATCHES, CASES, DIMS, EPSILON, NAMESPACE

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC: pip install 'rmsnorm-deploy[kernel]'")

NUMBERS = range(len(CASES))
MEMBERS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


def ask(task: str) -> Any:
    rig = lean_tensorrt.lean_rig(lean_tensorrt.FOLDER)
    if rig is None:
        pytest.skip(lean_tensorrt.NEEDS)
    return lean_tensorrt.run_with(lean_tensorrt.BINDINGS, task, rig, quick_plugins.FILE)


def kernel(number: int) -> NormKernel:
    name, dtype, width, scale_offset, scale_type = CASES[number]
    return kernel_of(name, dtype, width, EPSILON, scale_offset, scale_type)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return ask("kernels")


@pytest.fixture(scope="module")
def registered() -> dict[str, Any]:
    return ask("registration")


class QuickKernels(Kernels):
    """The kernels that a plugin gave for one tactic, launched as it says."""

    def __init__(self, folder: Path, cases: list[tuple[NormKernel, LaunchConfig]], given: list[Any]) -> None:
        super().__init__(folder, cases)
        self._given = given

    def _launch(self, number: int, inputs: list[Array], scalars: list[int], outputs: list[Array], seed: int) -> None:
        row, batch = self._given[number], str(scalars[0] // DIMS[1])
        launch, memory = row["launch"][batch], GlobalMemory()
        pointers = [memory.put(array, False) for array in inputs], [memory.put(array, True) for array in outputs]
        arguments = [*pointers[0], *row["arguments"][batch], *pointers[1]]
        program = Program(base64.b64decode(row["image"]).decode())
        Machine(program, memory, arguments, launch["grid_x"], launch["block_x"], 1, Approximation(seed)).run()
        for array, pointer in zip(outputs, pointers[1], strict=True):
            array[...] = memory.get(pointer, array)


def test_the_plugins_are_registered_once(registered: dict[str, Any]) -> None:
    names = [contract.ADD_RMS_NORM, contract.RMS_NORM]
    assert NAMESPACE == contract.PLUGIN_NAMESPACE
    assert registered["keys"] == [[name, contract.PLUGIN_VERSION, NAMESPACE] for name in names]
    assert sorted(registered["both"]) == sorted(
        [name, contract.PLUGIN_VERSION, space] for name in names for space in (NAMESPACE, "second")
    )
    assert registered["again"] is True


def test_the_fields_are_the_attributes_of_the_nodes(registered: dict[str, Any]) -> None:
    """The parser makes fields of these attributes of a node, in this order."""
    assert registered["fields"] == {
        name: list(contract.OPERATOR_ATTRIBUTES[name]) for name in (contract.RMS_NORM, contract.ADD_RMS_NORM)
    }


@pytest.mark.parametrize("name", [contract.RMS_NORM, contract.ADD_RMS_NORM])
def test_every_request_but_the_strict_one_for_python_gives_a_plugin(name: str, registered: dict[str, Any]) -> None:
    found = {
        key.split()[1]: answer for key, answer in registered["requests"].items() if key.split()[0] == name
    }  # fmt: skip
    assert found.pop("STRICT_JIT").startswith("ValueError: JIT implementation requested, but not defined")
    assert found == dict.fromkeys(("UNKNOWN", "PREFER_AOT", "PREFER_JIT", "STRICT_AOT"), True)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other target", "UsageError: quick plugins of namespace rmsnorm_deploy: expected .*=90.*, got .*=80"),
        ("creators behind", "RmsnormDeployError: TensorRT's registry refused RMSNorm"),
        ("trt", "UsageError: quick plugins: TensorRT refused namespace 'trt'"),
        ("a.b", "UsageError: quick plugins: TensorRT refused namespace 'a.b'"),
        ("", "UsageError: quick plugins: TensorRT refused namespace ''"),
        ("dynamic width", r"UsageError: RMSNorm: expected inputs .* one static last dim, got FLOAT \[-1, 3, -1\], "),
        ("dtype", r"UsageError: RMSNorm: expected inputs of one dtype \(FLOAT, HALF, BF16\) and .*, got INT8 "),
        ("width of the scale", r"UsageError: AddRMSNorm: expected .*, got HALF \[-1, 3, 64\], .*, HALF \[32\]\.$"),
        ("scale_offset", "UsageError: RMSNorm: scale_offset: expected 0 or 1, got 0.5"),
        ("scale_type", "UsageError: AddRMSNorm: scale_type: expected 1 or 10 for X of float16, got 16"),
    ],
)
def test_what_is_refused(what: str, message: str, registered: dict[str, Any]) -> None:
    assert re.match(message, registered["refused"][what]), registered["refused"][what]


def test_a_registered_creator_of_the_same_name_is_noticed() -> None:
    found = ask("registration_behind_others")
    refused = "RmsnormDeployError: quick plugins: RMSNorm and AddRMSNorm of namespace rmsnorm_deploy, version 1 are"
    assert found["refused"].startswith(f"{refused} registered already")
    assert found["second"] is None


@pytest.mark.parametrize(
    ("name", "kernel_name", "arguments"),
    [(contract.RMS_NORM, "rms_norm", 4), (contract.ADD_RMS_NORM, "add_rms_norm", 6)],
)
def test_the_norms_of_a_plugin_file_become_plugins(
    name: str, kernel_name: str, arguments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case("llama", torch.float16).model if name == contract.RMS_NORM else residual_model(FLOAT16)
    lowered, _ = lower(model, "plugin")
    ir.save(lowered, tmp_path / "model.onnx")
    monkeypatch.setenv("MODEL", str(tmp_path / "model.onnx"))
    assert ask("file") == [[name, kernel_name, arguments]]


@pytest.mark.parametrize("number", NUMBERS)
def test_outputs_and_combinations(number: int, rows: list[dict[str, Any]]) -> None:
    name, dtype, width, _, scale_type = CASES[number]
    outputs = len(contract.OUTPUTS[name])
    assert rows[number]["types"] == [MEMBERS[dtype]] * outputs
    assert rows[number]["shapes"] == [[2, 3, width]] * outputs
    allowed = MEMBERS if scale_type == 1 else {dtype: MEMBERS[dtype]}
    tensors = len(contract.INPUTS[name]) + outputs
    assert rows[number]["combinations"] == [[f"{member} LINEAR"] * tensors for member in allowed.values()]
    assert rows[number]["tactics"] == [1, 2]


@pytest.mark.parametrize("number", NUMBERS)
def test_launches_are_those_of_the_layouts(number: int, rows: list[dict[str, Any]]) -> None:
    wanted = [choose(kernel(number), count, 89) for count in (1, None)]
    assert quick_layouts(kernel(number), ARCHITECTURE) == wanted
    for config, row in zip(wanted, rows[number]["kernels"], strict=True):
        assert row["name"] == contract.KERNEL_OPS[CASES[number][0]]
        assert row["argument_types"] == ["INT INT32"]
        for batch in BATCHES:
            launch, count = row["launch"][str(batch)], batch * DIMS[1]
            assert row["arguments"][str(batch)] == [count]
            assert launch == {
                "grid_x": max(config.grid(count), 1), "grid_y": 1, "grid_z": 1,
                "block_x": config.block, "block_y": 1, "block_z": 1, "shared_mem": 0,
            }  # fmt: skip


def test_a_row_that_clusters_would_read_has_layouts_without_them() -> None:
    assert any(config.cluster > 1 for config in layouts(kernel(len(CASES) - 1), ARCHITECTURE))


@pytest.mark.parametrize("number", NUMBERS)
def test_the_kernels_parameters_are_in_tensorrts_order(number: int, rows: list[dict[str, Any]]) -> None:
    name = CASES[number][0]
    inputs, outputs = len(contract.INPUTS[name]), len(contract.OUTPUTS[name])
    for row in rows[number]["kernels"]:
        text = base64.b64decode(row["image"]).decode()
        declared = re.search(rf"\.visible \.entry {row['name']}\((.*?)\)", text, re.DOTALL)
        assert declared is not None
        assert re.findall(r"\.param \.(\w+)", declared[1]) == ["u64"] * inputs + ["u32"] + ["u64"] * outputs
        assert re.search(r"nctapercluster|explicitcluster|barrier\.cluster|shared::cluster", text) is None
        assert f".target sm_{ARCHITECTURE}\n" in text


@pytest.mark.parametrize("tactic", [1, 2])
def test_the_kernels_are_right_with_tensorrts_arguments(
    tactic: int, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    given = [row["kernels"][tactic - 1] for row in rows]
    named = [
        (str(CASES[number]), kernel(number), quick_layouts(kernel(number), ARCHITECTURE)[tactic - 1])
        for number in NUMBERS
    ]
    library = QuickKernels(tmp_path, [(each, config) for _, each, config in named], given)
    check_against_reference(named, library)
    case = Case(named[1][1])
    assert library.run(1, **{**case.given, "rows": 0})["y"].shape == (0, 1000)  # and nothing is written


class Driver:
    """CUDA's driver with two GPUs, sm_86 and sm_90, of CUDA 12.4."""

    class CUdevice_attribute:
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 0, 1

    current: int | None = 1
    failing = False

    def cuInit(self, flags: int) -> tuple[int]:
        return (100 if self.failing else 0,)

    def cuCtxGetDevice(self) -> tuple[int, int | None]:
        return (201 if self.current is None else 0), self.current

    def cuDeviceGet(self, number: int) -> tuple[int, int]:
        return 0, number

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, ((8, 6), (9, 0))[device][attribute]

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, 12040


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    found = Driver()
    monkeypatch.setattr(quick, "cuda_driver", lambda: found)
    quick._compiled.cache_clear()
    yield found
    quick._compiled.cache_clear()


def test_kernels_are_for_the_gpu_that_builds(driver: Driver) -> None:
    target = quick.Target(None, "cubin")
    assert target.compiled(kernel(0), 1)[0].architecture == 90
    driver.current = None
    compiled, _ = target.compiled(kernel(0), 2)
    assert (compiled.architecture, compiled.kind) == (86, "cubin")
    driver.failing = True
    with pytest.raises(EnvironmentMissingError, match=r"no GPU to compile for .*100.*architecture="):
        target.compiled(kernel(0), 1)


def test_ptx_that_the_driver_refuses_is_not_made(driver: Driver) -> None:
    with pytest.raises(UnsupportedError, match=r"PTX for a driver of CUDA 12\.4"):
        quick.Target(86, "ptx").compiled(kernel(0), 1)


def test_tensorrt_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentMissingError, match=r"quick plugins require TensorRT 10\.9 or later; install"):
        register_quick_plugins()
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.8.0"))
    with pytest.raises(UnsupportedError, match=r"10\.9 or later; .*; got TensorRT 10\.8\.0"):
        register_quick_plugins()
