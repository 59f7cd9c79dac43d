"""RMSNorm and AddRMSNorm as quick deployable plugins of TensorRT 10.9 and later. Never run on a GPU.

TensorRT asks Python for a compiled kernel while it builds an engine, stores it in the engine, and launches it by itself
afterwards: running the engine requires neither a library nor Python.

TensorRT launches such a kernel without clusters and without launch attributes, so that all layouts are those of GPUs
before sm_90. The kernel's parameters are in TensorRT's order: inputs, the number of rows, outputs.

TensorRT reads the annotations of the registered functions as types. Therefore this module has no
`from __future__ import annotations`, and the functions are defined where `tensorrt.plugin` is imported.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError, UsageError
from .. import contract
from ..kernel.compiler import CompiledKernel, Kind, check_driver, compile_kernel
from ..kernel.launch_config import CLUSTER_ARCHITECTURE, LaunchConfig, layouts
from ..kernel.norm_kernel import NormKernel
from .images import kernel_of
from .launcher import cuda_driver

QUICK_OPERATORS: Final = (contract.RMS_NORM, contract.ADD_RMS_NORM)
# The layout for few rows and that for any number; TensorRT measures both. Its tactics are positive.
TACTICS: Final = (1, 2)
# Names in TensorRT of the contract's dtypes: in `AutoTuneCombination`, and as members of `DataType`.
_COMBINED: Final = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
_MEMBERS: Final = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_NEEDS: Final = 'quick plugins require TensorRT 10.9 or later; install: pip install "rmsnorm-deploy[tensorrt]"'


@dataclass(frozen=True, slots=True)
class Target:
    """What the kernels are compiled for.

    Attributes:
        architecture: compute capability without the point, such as 89; None for that of the GPU that builds the engine.
        kind: `ptx`, which later GPUs run too, or `cubin`, which a driver older than NVRTC can load.
    """

    architecture: int | None
    kind: Kind

    def compiled(self, kernel: NormKernel, tactic: int) -> tuple[CompiledKernel, LaunchConfig]:
        """The compiled kernel in the layout of a tactic."""
        architecture = self.architecture or _gpu_architecture()
        few, any_number = quick_layouts(kernel, architecture)
        config = few if tactic == TACTICS[0] else any_number
        return _compiled(kernel, config, architecture, self.kind), config


_registered: Final[dict[str, Target]] = {}


def register_quick_plugins(
    namespace: str = contract.PLUGIN_NAMESPACE, architecture: int | None = None, kind: Kind = "ptx"
) -> Any:
    """Register RMSNorm and AddRMSNorm in TensorRT's plugin registry, once in a process.

    After this `trt.OnnxParser` makes plugins of the norms of a file of target `plugin`. The registry has one creator
    for each name, so that in one process either these plugins have the contract's namespace, or the C++ library or
    `Plugins`. With another namespace they can be registered beside those, for networks that are written by hand::

        norms = register_quick_plugins("my_norms")
        norm = norms.RMSNorm(x, scale, epsilon=1e-5, scale_offset=0.0, scale_type=1)
        y = network.add_plugin(norm, aot=True).get_output(0)

    Args:
        namespace: without a point, and none of TensorRT's own.
        architecture: compute capability to compile for, without the point, such as 89; None for that of the GPU.
        kind: `ptx` or `cubin`; see `Target`.

    Returns:
        The module `tensorrt.plugin.op.<namespace>` with the plugins RMSNorm and AddRMSNorm.

    Raises:
        EnvironmentMissingError: TensorRT is not installed.
        UnsupportedError: it is older than 10.9.
        UsageError: TensorRT reserves the namespace, or it was registered with another architecture or kind.
        RmsnormDeployError: other creators of the same names are registered already.
    """
    target = Target(architecture, kind)
    trt, trtp = _import_tensorrt()
    if namespace not in _registered:
        registry, version = trt.get_plugin_registry(), contract.PLUGIN_VERSION
        taken = [name for name in QUICK_OPERATORS if registry.get_creator(name, version, namespace) is not None]
        if taken:
            raise RmsnormDeployError(
                f"quick plugins: {' and '.join(taken)} of namespace {namespace}, version {version} are registered "
                "already, by the C++ library or by other Python code. Register one of them in a process, or give the "
                "quick plugins another namespace."
            )
        try:
            _register_rms_norm(f"{namespace}::{contract.RMS_NORM}", target)
            _register_add_rms_norm(f"{namespace}::{contract.ADD_RMS_NORM}", target)
        except ValueError as error:
            raise UsageError(f"quick plugins: TensorRT refused namespace {namespace!r}: {error}") from error
        _registered[namespace] = target
    elif _registered[namespace] != target:
        raise UsageError(
            f"quick plugins of namespace {namespace}: expected {_registered[namespace]}, as they were registered in "
            f"this process, got {target}. Use another namespace."
        )
    return getattr(trtp.op, namespace)


def quick_layouts(kernel: NormKernel, architecture: int) -> list[LaunchConfig]:
    """The layouts of a kernel without clusters, one for each of `TACTICS`."""
    return layouts(kernel, min(architecture, CLUSTER_ARCHITECTURE - 1))


def _register_rms_norm(plugin_id: str, target: Target) -> None:
    import tensorrt.plugin as trtp

    @trtp.register(plugin_id)
    def describe(
        x: trtp.TensorDesc, scale: trtp.TensorDesc, epsilon: float, scale_offset: float, scale_type: int
    ) -> trtp.TensorDesc:
        return x.like()

    @trtp.autotune(plugin_id)
    def combine(
        x: trtp.TensorDesc, scale: trtp.TensorDesc, scale_type: int, outputs: tuple[trtp.TensorDesc]
    ) -> list[trtp.AutoTuneCombination]:
        return _combinations(3, scale_type)

    @trtp.aot_impl(plugin_id)
    def implement(
        x: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        epsilon: float,
        scale_offset: float,
        scale_type: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        return _kernel(contract.RMS_NORM, (x, scale), (epsilon, scale_offset, scale_type), tactic, target)


def _register_add_rms_norm(plugin_id: str, target: Target) -> None:
    import tensorrt.plugin as trtp

    @trtp.register(plugin_id)
    def describe(
        x: trtp.TensorDesc,
        residual: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        epsilon: float,
        scale_offset: float,
        scale_type: int,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        return x.like(), x.like()

    @trtp.autotune(plugin_id)
    def combine(
        x: trtp.TensorDesc,
        residual: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        scale_type: int,
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return _combinations(5, scale_type)

    @trtp.aot_impl(plugin_id)
    def implement(
        x: trtp.TensorDesc,
        residual: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        epsilon: float,
        scale_offset: float,
        scale_type: int,
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        return _kernel(contract.ADD_RMS_NORM, (x, residual, scale), (epsilon, scale_offset, scale_type), tactic, target)


def _combinations(tensors: int, scale_type: int) -> list[Any]:
    """All inputs and outputs have one dtype, which the scale's must allow, and are linear."""
    import tensorrt.plugin as trtp

    names = "|".join(
        name for dtype, name in _COMBINED.items() if contract.scale_type_problem(scale_type, dtype) is None
    )
    return [trtp.AutoTuneCombination(", ".join([names] * tensors), "LINEAR", list(TACTICS))] if names else []


def _kernel(
    op_type: str, inputs: tuple[Any, ...], attributes: tuple[float, float, int], tactic: int, target: Target
) -> tuple[str, str | bytes, Any, Any]:
    """What `aot_impl` returns: name and image of the kernel, its launch, and the arguments after its inputs."""
    import tensorrt.plugin as trtp

    x, dtypes, shapes = inputs[0], [tensor.dtype.name for tensor in inputs], [list(tensor.shape) for tensor in inputs]
    widths = {shape[-1] if shape else 0 for shape in shapes}
    if not set(dtypes) <= set(_MEMBERS) or len(set(dtypes)) > 1 or len(widths) > 1 or min(widths) < 1:
        got = ", ".join(f"{dtype} {shape}" for dtype, shape in zip(dtypes, shapes, strict=True))
        raise UsageError(
            f"{op_type}: expected inputs of one dtype ({', '.join(_MEMBERS)}) and one static last dim, got {got}."
        )
    dtype, width = _MEMBERS[dtypes[0]], widths.pop()
    kernel = kernel_of(op_type, dtype, width, *attributes)
    compiled, config = target.compiled(kernel, tactic)
    # An empty x has a block too, which finds no row: a launch of no blocks is an error.
    rows = math.prod(list(x.shape_expr)[:-1], start=trtp.ShapeExpr(1))
    launch = trtp.KernelLaunchParams()
    launch.grid_x = trtp.max(trtp.cdiv(rows, config.rows), 1)
    launch.block_x = config.block
    arguments = trtp.SymIntExprs(1)
    arguments[0] = trtp.SymInt32(rows)
    return compiled.name, compiled.image.decode() if compiled.kind == "ptx" else compiled.image, launch, arguments


@functools.lru_cache(maxsize=256)
def _compiled(kernel: NormKernel, config: LaunchConfig, architecture: int, kind: Kind) -> CompiledKernel:
    version = _driver_version()
    if kind == "ptx" and version is not None:
        check_driver(version)
    return compile_kernel(kernel, config, architecture, kind)


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports; None without a driver."""
    driver = cuda_driver()
    try:
        version = _called(driver.cuDriverGetVersion)
    except RuntimeError:  # cuda-bindings found no driver
        return None
    return version // 1000, version % 1000 // 10


def _gpu_architecture() -> int:
    """That of the GPU of the current CUDA context, in which TensorRT builds, or else of the first one."""
    driver = cuda_driver()
    try:
        _called(driver.cuInit, 0)
        status, device = driver.cuCtxGetDevice()
        if int(status) != 0:
            device = _called(driver.cuDeviceGet, 0)
        kinds = driver.CUdevice_attribute
        major = _called(driver.cuDeviceGetAttribute, kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = _called(driver.cuDeviceGetAttribute, kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    except RuntimeError as error:
        raise EnvironmentMissingError(
            f"quick plugins: no GPU to compile for ({error}). Call register_quick_plugins(architecture=...)."
        ) from error
    return 10 * int(major) + int(minor)


def _called(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    status, *values = function(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"the CUDA driver returned {getattr(status, 'name', status)}")
    return values[0] if values else None


def _import_tensorrt() -> tuple[Any, Any]:
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise EnvironmentMissingError(_NEEDS) from error
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise UnsupportedError(f"{_NEEDS}; got TensorRT {trt.__version__}")
    return trt, importlib.import_module("tensorrt.plugin")
