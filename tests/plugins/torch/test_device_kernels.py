"""The operators' way to the kernel: on the host, where the kernel reads the CPU's tensors, and on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rmsnorm_deploy.models.eager import eager
from rmsnorm_deploy.models.errors import RmsnormDeployError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins.kernel.compiler import CompiledKernel
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, layouts
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from rmsnorm_deploy.plugins.torch import call, device_kernels
from rmsnorm_deploy.plugins.torch.device_kernels import DeviceKernels, LaunchTensors
from rmsnorm_deploy.plugins.torch.operators import add_rms_norm, form_of, rms_norm
from rmsnorm_deploy.plugins.torch.quantize import quantize
from rmsnorm_deploy.plugins.torch.quantized_operators import add_rms_norm_quantized, rms_norm_quantized
from tests.helpers.plugins.kernels import HostKernels, compiler

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
CAST_FIRST = NormSpec(1e-5, order="cast_then_scale")
AFTER, GROUPS = CAST_FIRST.replace(gate="after", activation="silu"), CAST_FIRST.replace(group_size=16)


def tensors(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


@dataclass
class Call:
    """A call of an operator, and what the kernel that it runs is to be like: strided, heads, elements of a vector."""

    spec: NormSpec
    x: Tensor
    weight: Tensor | None
    residual: Tensor | None = None
    expected: tuple[bool, int, int] = (False, 1, 8)
    gate: Tensor | None = None
    quantized: torch.dtype | None = None
    scale: Tensor | None = None

    def made(self) -> call.Call:
        return call.Call(self.x, self.weight, self.spec, self.residual, self.gate, self.quantized, self.scale)


CALLS = {
    "cast first": Call(CAST_FIRST, tensors(BRAIN, 3, 5, 40), tensors(BRAIN, 40)),
    "float32 weight": Call(NormSpec(1e-5), tensors(HALF, 9, 40), tensors(FLOAT, 40)),
    "1 + weight in half": Call(
        CAST_FIRST.replace(scale="one_plus_weight", offset_in_float32=False), tensors(HALF, 9, 40), tensors(HALF, 40)
    ),
    "no weight": Call(NormSpec(1e-5, scale="none"), tensors(FLOAT, 9, 40), None, None, (False, 1, 4)),
    "rows of a wider tensor": Call(
        NormSpec(1e-5), tensors(HALF, 9, 56)[:, 2:42], tensors(HALF, 40), None, (True, 1, 2)
    ),
    "heads of a wider token": Call(
        CAST_FIRST, tensors(BRAIN, 2, 3, 88)[..., 8:72].unflatten(-1, (4, 16)), tensors(BRAIN, 16), None, (True, 4, 8)
    ),
    "transposed": Call(CAST_FIRST, tensors(BRAIN, 40, 6).T, tensors(BRAIN, 40)),
    "weight in the middle": Call(NormSpec(1e-5), tensors(HALF, 6, 40), tensors(FLOAT, 41)[1:], None, (False, 1, 1)),
    "no rows": Call(NormSpec(1e-5), tensors(HALF, 0, 40), tensors(HALF, 40)),
    "add": Call(NormSpec(1e-5), tensors(BRAIN, 5, 40), tensors(BRAIN, 40), tensors(BRAIN, 5, 40, seed=1)),
    "add to float32": Call(NormSpec(1e-5), tensors(BRAIN, 5, 40), tensors(FLOAT, 40), tensors(FLOAT, 5, 40, seed=1)),
    "add to heads": Call(
        CAST_FIRST, tensors(HALF, 2, 3, 4, 16), tensors(HALF, 16),
        tensors(HALF, 2, 3, 80, seed=1)[..., :64].unflatten(-1, (4, 16)), (True, 4, 8),
    ),
    "add to rows": Call(
        CAST_FIRST, tensors(HALF, 6, 24)[:, :16], tensors(HALF, 16), tensors(HALF, 16, 6, seed=1).T, (True, 1, 8)
    ),
    "gate after": Call(
        AFTER, tensors(BRAIN, 3, 5, 40), tensors(BRAIN, 40), None, (False, 1, 8), tensors(BRAIN, 3, 5, 40, seed=1)
    ),
    "sigmoid after": Call(
        NormSpec(1e-5, gate="after", activation="sigmoid"), tensors(HALF, 9, 40), tensors(FLOAT, 40), None,
        (False, 1, 8), tensors(HALF, 9, 40, seed=1),
    ),
    "gate of heads": Call(
        AFTER, tensors(HALF, 2, 3, 4, 16), tensors(HALF, 16), None, (True, 4, 8),
        tensors(HALF, 2, 3, 80, seed=1)[..., :64].unflatten(-1, (4, 16)),
    ),
    "groups": Call(GROUPS, tensors(BRAIN, 2, 5, 48), tensors(BRAIN, 48), None, (False, 3, 8)),
    "groups of a wider row": Call(GROUPS, tensors(HALF, 2, 5, 64)[..., 8:56], tensors(HALF, 48), None, (True, 3, 8)),
    "groups of heads": Call(
        GROUPS, tensors(HALF, 2, 3, 100)[..., :96].unflatten(-1, (2, 48)), tensors(HALF, 48), None, (False, 3, 8)
    ),
    "groups of a sum": Call(
        GROUPS, tensors(HALF, 5, 48), tensors(HALF, 48), tensors(HALF, 5, 48, seed=1), (False, 3, 8)
    ),
    "gate before groups": Call(
        GROUPS.replace(gate="before", activation="silu"), tensors(BRAIN, 2, 5, 48), tensors(BRAIN, 48), None,
        (True, 3, 8), tensors(BRAIN, 2, 5, 64, seed=1)[..., 16:],
    ),
}  # fmt: skip
SCALE = torch.tensor([0.02])
QUANTIZED = {
    "int8 by row": Call(CAST_FIRST, tensors(BRAIN, 3, 5, 40), tensors(BRAIN, 40), quantized=torch.int8),
    "int8": Call(
        NormSpec(1e-5), tensors(HALF, 2, 48), tensors(HALF, 48), None, (False, 1, 16), None, torch.int8, SCALE
    ),
    "e4m3 of a sum by row": Call(
        NormSpec(1e-5), tensors(BRAIN, 5, 40), tensors(FLOAT, 40), tensors(FLOAT, 5, 40, seed=1), (False, 1, 8), None,
        torch.float8_e4m3fn,
    ),
    "e4m3 of a sum of rows": Call(
        NormSpec(1e-5, scale="none"), tensors(FLOAT, 6, 24)[:, :16], None, tensors(FLOAT, 6, 16, seed=1), (True, 1, 4),
        None, torch.float8_e4m3fn, SCALE,
    ),
    "int8 of no rows": Call(CAST_FIRST, tensors(BRAIN, 0, 40), tensors(BRAIN, 40), quantized=torch.int8),
    "int8 of heads by row": Call(
        CAST_FIRST, tensors(BRAIN, 2, 3, 88)[..., 8:72].unflatten(-1, (4, 16)), tensors(BRAIN, 16), None, (True, 4, 16),
        None, torch.int8,
    ),
}  # fmt: skip
NARROW_GATE = Call(AFTER, tensors(FLOAT, 5, 40), tensors(BRAIN, 40), gate=tensors(BRAIN, 5, 40, seed=1))


@dataclass
class Device:
    """A driver whose kernels run on the host; it counts modules and keeps the streams of launches."""

    folder: Path
    compiled: dict[bytes, tuple[NormKernel, LaunchConfig]] = field(default_factory=dict)
    host: HostKernels | None = None
    loaded: list[bytes] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    last: tuple[NormKernel, LaunchConfig] | None = None

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=9, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=0,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=1,
    )  # fmt: skip

    def compile(self, kernel: NormKernel, config: LaunchConfig, architecture: int) -> CompiledKernel:
        image = f"{kernel} {config}".encode()
        self.compiled[image] = kernel, config
        return CompiledKernel(kernel.op, "cubin", image, architecture, 32, 0, 0, 0)

    def build(self) -> None:
        self.host = HostKernels(self.folder, list(self.compiled.values()))

    def cuCtxGetDevice(self) -> tuple[Any, ...]:
        return 0, 0

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, ...]:
        return 0, attribute

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        self.loaded.append(image)
        return 0, image

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Any, ...]:
        return 0, module

    def cuLaunchKernel(self, function: bytes, grid: int, *others: Any) -> tuple[Any, ...]:
        kernel, config = self.last = self.compiled[function]
        self.streams.append(others[6])
        rows = 1 + kernel.adds + kernel.has_gate
        by_row = kernel.quantization == "per_row"
        kinds = [ctypes.c_uint64] * (rows + kernel.has_weight + (kernel.quantization == "static")) + [ctypes.c_int32]
        kinds += [ctypes.c_int64] * (2 * kernel.strided * rows)
        kinds += [ctypes.c_uint64] * (1 + kernel.adds + by_row)
        addresses = (ctypes.c_uint64 * len(kinds)).from_address(others[7])
        values = [kind.from_address(address).value for kind, address in zip(kinds, addresses, strict=True)]
        if self.host is not None:
            number = list(self.compiled).index(function)
            entry = ctypes.cast(getattr(self.host._library, f"kernel_{number}"), ctypes.c_void_p)
            packed = (ctypes.c_uint64 * 16)(*values)
            assert not self.host._library.launch(entry, grid, config.block, config.cluster, packed, ctypes.c_uint(0))
        return (0,)


def run(given: Call) -> tuple[Tensor, ...]:
    return call.fused_result(given.made())


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """All kernels of the calls, as one library; the first round only finds out which they are."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler on the host")
    found = Device(tmp_path_factory.mktemp("kernels"))
    kernels = DeviceKernels(90, found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(device_kernels, "compile_kernel", found.compile)
        patch.setattr(device_kernels, "layouts", lambda *arguments: layouts(*arguments)[-1:])
        patch.setattr(call, "run_on_device", lambda *arguments: kernels.run(*arguments, stream=77))
        for given in (*CALLS.values(), *QUANTIZED.values(), NARROW_GATE):
            run(given)
        found.build()
        yield found


def assert_near(y: Tensor, wanted: Tensor) -> None:
    """As near as float32 statistics that are summed in another order: a rounding to half may fall to the other side."""
    assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)
    torch.testing.assert_close(y, wanted, rtol=2 * torch.finfo(y.dtype).eps, atol=0)
    if y.dtype != FLOAT and y.numel():
        assert (y == wanted).float().mean() > 0.95


def assert_quantized_near(given: Call, found: tuple[Tensor, ...]) -> None:
    """As PyTorch quantizes, but where y is off in its last bit: by one step then, and seldom; the sum exactly."""
    wanted = call.eager_result(given.made())
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in wanted]
    assert all(result.is_contiguous() for result in found)
    if given.residual is not None:
        assert torch.equal(found[1], wanted[1])
    if given.scale is None:
        torch.testing.assert_close(found[-1], wanted[-1], rtol=2 * torch.finfo(given.made().sum_dtype).eps, atol=0)
    # As integers, values of e4m3 of one sign are in order: a step is 1.
    steps = (found[0].view(torch.int8).int() - wanted[0].view(torch.int8).int()).abs()
    assert steps.numel() == 0 or (steps.max() <= 1 and (steps == 0).float().mean() > 0.98)


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_computes_the_call(device: Device, name: str) -> None:
    given = CALLS[name]
    total = given.x if given.residual is None else given.x + given.residual
    device.last = None
    results = run(given)
    assert all(result.is_contiguous() for result in results)
    assert_near(results[0], eager(given.spec, total, given.weight, gate=given.gate))
    assert all(torch.equal(result, total) for result in results[1:])
    if given.x.numel() == 0:
        assert device.last is None
        return
    assert device.last is not None
    kernel, config = device.last
    assert (kernel.strided, kernel.inner, config.elements) == given.expected


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_kernel_computes_and_quantizes_the_call(device: Device, name: str) -> None:
    given = QUANTIZED[name]
    device.last = None
    results = run(given)
    assert_quantized_near(given, results)
    if given.x.numel() == 0:
        assert device.last is None
        return
    assert device.last is not None
    kernel, config = device.last
    assert (kernel.quantized, kernel.quantization) == given.made().quantization
    assert (kernel.strided, kernel.inner, config.elements) == given.expected


def test_the_scale_is_the_last_input_and_those_of_rows_the_last_output() -> None:
    x, weight, total, rows = tensors(HALF, 2, 8), tensors(HALF, 8), tensors(HALF, 2, 8), tensors(FLOAT, 2, 1)
    y = torch.empty(2, 8, dtype=torch.int8)
    addresses: list[tuple[list[int], int, int]] = []

    class Recorder:
        def launch(self, pointers: list[int], inputs: int, count: int, stream: int, strides: list[int]) -> None:
            addresses.append((pointers, inputs, count))

    kernels = DeviceKernels(90, None)
    static = NormKernel(8, 1e-5, "add_rms_norm", quantized="int8", quantization="static")
    by_row = static.replace(quantization="per_row")
    recorder: Any = Recorder()
    kernels._launchers = {(static, 16): recorder, (by_row, 16): recorder}
    given = [call._with_rows(x), call._with_rows(total)]
    kernels.run(static, LaunchTensors(given, weight, SCALE, (y, total)))
    kernels.run(by_row, LaunchTensors(given, weight, None, (y, total, rows)))
    of_static, of_rows = (x, total, weight, SCALE, y, total), (x, total, weight, y, total, rows)
    assert addresses == [([t.data_ptr() for t in of_static], 4, 2), ([t.data_ptr() for t in of_rows], 3, 2)]


def test_a_gate_that_is_narrower_than_x_is_widened(device: Device) -> None:
    assert NARROW_GATE.gate is not None
    device.last = None
    (found,) = run(NARROW_GATE)
    assert device.last is not None
    assert torch.equal(found, run(replace(NARROW_GATE, gate=NARROW_GATE.gate.float()))[0])
    torch.testing.assert_close(found, eager(AFTER, NARROW_GATE.x, NARROW_GATE.weight, gate=NARROW_GATE.gate))


def test_kernels_are_loaded_once_and_launched_on_the_stream(device: Device) -> None:
    loaded = len(device.loaded)
    for _ in range(2):
        run(CALLS["cast first"])
    assert len(device.loaded) == loaded == len(device.compiled)
    assert set(device.streams) == {77}


@pytest.mark.parametrize("given", [
    Call(CAST_FIRST, tensors(BRAIN, 3, 40), tensors(FLOAT, 40)),  # the result has the weight's dtype
    Call(NormSpec(1e-5), tensors(torch.float64, 3, 40), tensors(torch.float64, 40)),
    Call(NormSpec(1e-5, scale="none"), tensors(HALF, 3, 40), None, tensors(BRAIN, 3, 40)),
    Call(AFTER, tensors(HALF, 3, 40), tensors(HALF, 40), gate=tensors(FLOAT, 3, 40)),
], ids=["wider weight", "float64", "two halves", "wider gate"])  # fmt: skip
def test_dtypes_that_the_kernel_lacks_are_computed_by_pytorch(device: Device, given: Call) -> None:
    device.last = None
    results = run(given)
    assert device.last is None
    total = given.x if given.residual is None else given.x + given.residual
    assert torch.equal(results[0], eager(given.spec, total, given.weight, gate=given.gate))


def test_nothing_is_compiled_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = Device(tmp_path)
    monkeypatch.setattr(device_kernels, "compile_kernel", device.compile)
    monkeypatch.setattr(device_kernels, "layouts", layouts)
    kernels, x = DeviceKernels(90, device), tensors(HALF, 2, 64)
    tensors_of_x = LaunchTensors([call._with_rows(x)], None, None, (x.clone(),))
    kernel = NormKernel(64, 1e-5, scale="none")
    with pytest.raises(RmsnormDeployError, match=r"width 64 in float16 that has not run yet\. Run the model once"):
        kernels.run(kernel, tensors_of_x, capturing=True)
    assert device.compiled == {}
    kernels.run(kernel, tensors_of_x)
    assert len(device.loaded) == len(layouts(kernel, 90)) > 1  # for every number of rows
    kernels.run(kernel, tensors_of_x, capturing=True)
    assert len(device.streams) == 2


needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.version.cuda), reason="needs an NVIDIA GPU and the CUDA build of torch"
)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", CALLS)
def test_the_operators_on_a_gpu(name: str) -> None:
    """Needs an NVIDIA GPU, the CUDA build of torch, and cuda-bindings and NVRTC."""
    given = CALLS[name]
    moved = (None if t is None else _moved(t) for t in (given.x, given.weight, given.residual, given.gate))
    x, weight, residual, gate = moved
    assert x is not None
    form = form_of(given.spec)
    if residual is None:
        assert_near(rms_norm(x, weight, 1e-5, gate, **form), eager(given.spec, x, weight, gate=gate))
    else:
        y, total = add_rms_norm(x, residual, weight, 1e-5, **form)
        assert torch.equal(total, x + residual)
        assert_near(y, eager(given.spec, x + residual, weight))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_quantized_operators_on_a_gpu(name: str) -> None:
    """Needs an NVIDIA GPU, the CUDA build of torch, and cuda-bindings and NVRTC."""
    given = QUANTIZED[name]
    tensors_given = (given.x, given.weight, given.residual, given.scale)
    x, weight, residual, scale = (None if t is None else _moved(t) for t in tensors_given)
    assert x is not None
    assert given.quantized is not None
    form, moved = form_of(given.spec), replace(given, x=x, weight=weight, residual=residual, scale=scale)
    if residual is None:
        y, used = rms_norm_quantized(x, weight, 1e-5, scale, dtype=given.quantized, **form)
        outputs: tuple[Tensor, ...] = (y,)
    else:
        y, used, total = add_rms_norm_quantized(x, residual, weight, 1e-5, scale, dtype=given.quantized, **form)
        outputs = (y, total)
    assert scale is None or used is scale
    assert_quantized_near(moved, (*outputs, used) if scale is None else outputs)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_pytorch_quantizes_on_a_gpu_as_on_the_cpu(dtype: torch.dtype) -> None:
    """Needs an NVIDIA GPU and the CUDA build of torch."""
    y = torch.cat([tensors(FLOAT, 4000, 40), torch.zeros(1, 40), tensors(FLOAT, 40, 40) * 1e-38])
    for scale in (None, SCALE):
        wanted, found = quantize(y, dtype, scale), quantize(y.cuda(), dtype, None if scale is None else scale.cuda())
        assert torch.equal(found[0].cpu().view(torch.int8), wanted[0].view(torch.int8))
        assert torch.equal(found[1].cpu(), wanted[1])


def _moved(tensor: Tensor) -> Tensor:
    """On the GPU with the same strides and offset."""
    base = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype, device="cuda")
    moved = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return moved.copy_(tensor)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    "compiled", [lambda f: f, lambda f: torch.compile(f, fullgraph=True)], ids=["eager", "inductor"]
)
def test_a_captured_graph_replays_on_new_values(compiled: Callable[..., Any]) -> None:
    """Needs an NVIDIA GPU, the CUDA build of torch, cuda-bindings and NVRTC; for inductor, Triton."""
    x, weight = tensors(BRAIN, 4, 136).cuda(), tensors(BRAIN, 136, seed=1).cuda()
    function = compiled(lambda x: rms_norm(x, weight, 1e-5) * 2)
    function(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function(x)
    x.copy_(tensors(BRAIN, 4, 136, seed=2))
    graph.replay()
    torch.cuda.synchronize()
    assert_near(y, eager(NormSpec(1e-5), x, weight) * 2)


@pytest.mark.gpu
@needs_cuda
def test_a_captured_graph_replays_a_quantized_norm() -> None:
    """Needs an NVIDIA GPU, the CUDA build of torch, and cuda-bindings and NVRTC."""
    x, weight = tensors(BRAIN, 4, 136).cuda(), tensors(BRAIN, 136, seed=1).cuda()
    rms_norm_quantized(x, weight, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, scale = rms_norm_quantized(x, weight, 1e-5)
    x.copy_(tensors(BRAIN, 4, 136, seed=2))
    graph.replay()
    torch.cuda.synchronize()
    assert_quantized_near(Call(NormSpec(1e-5), x, weight, quantized=torch.int8), (y, scale))


@pytest.mark.gpu
@needs_cuda
def test_a_capture_before_the_first_run_is_refused() -> None:
    """Needs an NVIDIA GPU, the CUDA build of torch, and cuda-bindings and NVRTC."""
    x = tensors(BRAIN, 4, 152).cuda()
    with pytest.raises(RmsnormDeployError, match="Run the model once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        rms_norm(x)
