"""TensorRT 10.7 to 11.x and TensorRT-RTX behind one interface (`Api`), with all differences between them."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from ...models.errors import EnvironmentMissingError, UnsupportedError, UsageError

RuntimeName = Literal["tensorrt", "rtx"]
RUNTIMES: Final[tuple[RuntimeName, ...]] = get_args(RuntimeName)
# What may run a model: ONNX Runtime, and the products that run engines.
ORT: Final = "ort"
RUNNERS: Final = (ORT, *RUNTIMES)


@dataclass(frozen=True, slots=True)
class Flavor:
    """One of the two products, TensorRT or TensorRT-RTX.

    Attributes:
        title: its name in messages.
        module: its Python module.
        distributions: packages that may install it; their versions identify its build.
        library_modules: packages that contain its shared libraries if pip installed it.
        install: the command that installs it.
        oldest: the lowest supported version.
        tool: the program that builds engines from the command line.
        unversioned: a library that is opened by a name without version, which the wheel does not contain.
        architectures: architectures that it can build for without a GPU; empty if it always builds for the local GPU.
        default_architectures: architectures that it builds for if none is named.
    """

    title: str
    module: str
    distributions: tuple[str, ...]
    library_modules: tuple[str, ...]
    install: str
    oldest: tuple[int, int]
    tool: str
    unversioned: str | None
    architectures: tuple[int, ...]
    default_architectures: tuple[int, ...]


FLAVORS: Final[dict[RuntimeName, Flavor]] = {
    "tensorrt": Flavor(
        "TensorRT", "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-libs", "tensorrt-cu12-libs"),
        ("tensorrt_libs",), 'pip install "rmsnorm-deploy[tensorrt]"', (10, 7), "trtexec",
        None, (), (),
    ),
    # NVIDIA's documentation of 1.7 ("CPU-Only AOT"): the default is 8.0, 8.6, 8.9 and 12.0; 7.5 must be requested.
    "rtx": Flavor(
        "TensorRT-RTX", "tensorrt_rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu12"),
        ("tensorrt_rtx_libs",), 'pip install "rmsnorm-deploy[rtx]"', (1, 4),
        "tensorrt_rtx", "libtensorrt_rtx.so", (75, 80, 86, 89, 120, 121), (80, 86, 89, 120),
    ),
}  # fmt: skip


def flavor_of(runtime: str) -> Flavor:
    """The product of a name.

    Raises:
        UsageError: the name is unknown.
    """
    for name, flavor in FLAVORS.items():
        if name == runtime:
            return flavor
    raise UsageError(f"runtime: expected {' or '.join(RUNTIMES)}, got {runtime!r}.")


def flavor_name(runtime: str) -> RuntimeName:
    """The name as one of `RUNTIMES`.

    Raises:
        UsageError: the name is unknown.
    """
    flavor = flavor_of(runtime)
    return next(name for name in RUNTIMES if FLAVORS[name] is flavor)


def is_installed(runtime: str) -> bool:
    """Whether the product's Python module can be found; it is not imported."""
    return importlib.util.find_spec(flavor_of(runtime).module) is not None


def check_installed(runtime: str) -> None:
    """Check that the product's Python module is installed.

    Raises:
        EnvironmentMissingError: it is not installed; the message contains the command that installs it.
    """
    flavor = flavor_of(runtime)
    if is_installed(runtime):
        return
    others = [name for name in RUNTIMES if name != runtime and is_installed(name)]
    hint = f" (installed here: {FLAVORS[others[0]].title}, --runtime {others[0]})" if others else ""
    raise EnvironmentMissingError(f"{flavor.title} for Python is not installed; install: {flavor.install}{hint}")


def library_folders(runtime: str) -> list[Path]:
    """Folders of the shared libraries that pip installed; empty if they are installed in the system."""
    folders = []
    for name in flavor_of(runtime).library_modules:
        spec = importlib.util.find_spec(name)
        folders += [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    return folders


def link_libraries(runtime: str, folder: Path) -> None:
    """Create links in `folder` for libraries that are opened by a name that the wheel does not contain.

    At the first plugin the parser of TensorRT-RTX opens `libtensorrt_rtx.so` without a version, and the process is
    terminated if the loader does not find it.
    """
    name = flavor_of(runtime).unversioned
    if name is None:
        return
    for place in library_folders(runtime):
        for library in sorted(place.glob(f"{name}.*")):
            if not (folder / name).exists():
                (folder / name).symlink_to(library)


class Api:
    """One loaded TensorRT.

    Args:
        runtime: `tensorrt` or `rtx`.

    Attributes:
        trt: the module.
        version: such as `1.7.1.116`.

    Raises:
        EnvironmentMissingError: it is not installed, or its libraries cannot be loaded.
        UnsupportedError: the version is too old.
    """

    def __init__(self, runtime: str) -> None:
        self.flavor = flavor_of(runtime)
        check_installed(runtime)
        try:
            self.trt: Any = importlib.import_module(self.flavor.module)
        except Exception as error:  # a missing shared library may raise any error
            raise EnvironmentMissingError(
                f"{self.flavor.title} is installed but cannot be loaded: {' '.join(str(error).split())}"
            ) from error
        self.version: str = self.trt.__version__
        if version_of(self.version) < self.flavor.oldest:
            oldest = ".".join(map(str, self.flavor.oldest))
            raise UnsupportedError(
                f"{self.flavor.title}: expected version {oldest} or later, got {self.version}. "
                f"Install: {self.flavor.install}"
            )

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return self.flavor.module == "tensorrt_rtx"

    def network(self, builder: Any) -> Any:
        """A strongly typed network: the only kind in TensorRT 11 and RTX, an option in TensorRT 10."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def set_architectures(self, config: Any, architectures: Sequence[int]) -> None:
        """Set the architectures of the engine. The full TensorRT always builds for the local GPU and has no setting."""
        if not self.is_rtx:
            return
        config.num_compute_capabilities = len(architectures)
        for index, architecture in enumerate(architectures):
            config.set_compute_capability(getattr(self.trt.ComputeCapability, f"SM{architecture}"), index)

    def set_flag(self, config: Any, name: str) -> None:
        """Set a builder flag by its name.

        Raises:
            UnsupportedError: this TensorRT has no such flag.
        """
        flag = getattr(self.trt.BuilderFlag, name, None)
        if flag is None:
            raise UnsupportedError(f"{self.flavor.title} {self.version} has no builder flag {name}.")
        config.set_flag(flag)

    def dtype_name(self, dtype: Any) -> str:
        """The name of one of TensorRT's data types, such as `float16`; TensorRT's own name for dtypes without norms."""
        trt = self.trt
        names = {
            trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16", trt.int8: "int8",
            trt.fp8: "float8_e4m3",
        }  # fmt: skip
        return names.get(dtype, str(dtype))

    @property
    def has_timing_cache(self) -> bool:
        """Whether a timing cache has an effect: RTX accepts one and ignores it."""
        return not self.is_rtx

    @property
    def can_read_engines(self) -> bool:
        """Whether an engine can be opened here: `Runtime` must not be used without a driver."""
        return cuda_device() is not None

    def engine_problem(self, runtime: Any, engine: bytes) -> str | None:
        """Why an engine cannot run on this machine; None if it can, or if this TensorRT does not say so before."""
        if not self.is_rtx or not hasattr(runtime, "get_engine_validity"):
            return None
        validity, diagnostics = runtime.get_engine_validity(engine)
        return str(diagnostics) if validity == self.trt.EngineValidity.INVALID else None

    @property
    def has_cuda_graphs(self) -> bool:
        """Whether TensorRT captures CUDA graphs itself."""
        return self.is_rtx and hasattr(self.trt, "CudaGraphStrategy")

    def execution_context(self, engine: Any, cuda_graphs: bool = False) -> Any:
        """A new execution context of an engine; None if there is not enough memory."""
        if not (cuda_graphs and self.has_cuda_graphs):
            return engine.create_execution_context()
        runtime_config = engine.create_runtime_config()
        runtime_config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(runtime_config)


def cuda_device(index: int = 0) -> tuple[str, int] | None:
    """Name and architecture (compute capability without the point) of a GPU, from the CUDA driver, or None."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    return None if failed else (name.value.decode(), 10 * major.value + minor.value)


def resolve_architectures(runtime: str, wanted: Sequence[int], elsewhere: bool = False) -> tuple[int, ...]:
    """The architectures that an engine is built for: the requested ones, that of the local GPU, or the defaults.

    Args:
        runtime: `tensorrt` or `rtx`.
        wanted: requested architectures.
        elsewhere: the engine is built on another machine, whose GPU is unknown.

    Raises:
        UnsupportedError: the product cannot build for a requested architecture.
        EnvironmentMissingError: it requires a GPU, and there is none.
    """
    flavor = flavor_of(runtime)
    device = cuda_device()
    if flavor.architectures:
        unknown = [number for number in wanted if number not in flavor.architectures]
        if unknown:
            known = ", ".join(f"sm_{number}" for number in flavor.architectures)
            raise UnsupportedError(f"{flavor.title} builds for {known}, not for sm_{unknown[0]}.")
        # The defaults lack some: an engine that is built on a machine with such a GPU must run there.
        local = (device[1],) if device is not None and device[1] in flavor.architectures else ()
        return tuple(wanted) or tuple(sorted({*flavor.default_architectures, *local}))
    if elsewhere:
        return tuple(wanted)
    if device is None:
        raise EnvironmentMissingError(
            f"{flavor.title} builds for the local GPU, and there is none. Build on a machine with a GPU (see "
            "--print-trtexec), or build with --runtime rtx, which does not require a GPU."
        )
    others = [number for number in wanted if number != device[1]]
    if others:
        raise UnsupportedError(
            f"{flavor.title} builds for the local GPU, {device[0]} (sm_{device[1]}), not for sm_{others[0]}. "
            "Omit --arch, or build on a machine that has such a GPU."
        )
    return (device[1],)


def version_of(text: str) -> tuple[int, int]:
    """Major and minor number of a version; (0, 0) if it contains no number."""
    numbers = [int(number) for number in re.findall(r"\d+", text)[:2]]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0) if numbers else (0, 0)
