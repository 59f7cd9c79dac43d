"""What `rmsnorm doctor` finds on a machine (`Surroundings`), and one use of a target on it (`Way`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .engines.api import RuntimeName


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver.

    Attributes:
        version: its version, such as `580.65`; None if it is not known.
        cuda: the latest CUDA version that it supports, from its library; None without a usable one.
        gpus: name and architecture (compute capability without the point) of each GPU.
    """

    version: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Product:
    """TensorRT or TensorRT-RTX.

    Attributes:
        version: version of the Python module, None if it cannot be imported.
        problem: why it cannot be imported.
        has_builder: whether the module has the builder.
        has_parser: whether it has the ONNX parser.
        partial: the modules of the lean and the dispatch runtime, if they are installed.
        distributions: versions of its packages by name.
        creators: the plugin creators of this package that are in its registry with the library loaded, each as `name`,
            `version` and `namespace`.
        registry_problem: why the registry could not be read, or why it refused the library.
    """

    version: str | None = None
    problem: str = ""
    has_builder: bool = False
    has_parser: bool = False
    partial: tuple[str, ...] = ()
    distributions: Mapping[str, str] = field(default_factory=dict)
    creators: tuple[Mapping[str, str], ...] = ()
    registry_problem: str = ""

    @property
    def kind(self) -> str:
        """`full` (builds and runs engines), `runtime only`, the lean modules that are installed, or `missing`."""
        if self.version is not None:
            return "full" if self.has_builder and self.has_parser else "runtime only"
        return ", ".join(self.partial) or "missing"

    def to_dict(self) -> dict[str, Any]:
        """The product as JSON values."""
        return {**asdict(self), "kind": self.kind}


@dataclass(frozen=True, slots=True)
class PluginState:
    """The plugins for TensorRT.

    Attributes:
        library: the C++ library that builds use, None if there is none.
        expected: the path at which it is expected.
        is_current: whether it was built for the current contract.
        headers: version of the TensorRT headers that it was built with.
        creators: name, version and namespace of its creators.
        nvrtc: version of the NVRTC with which it compiles kernels; empty if it uses its generic kernel.
        problem: why it cannot be read.
        registering: the library that registers itself, for ONNX Runtime's TensorRT provider; None if it is missing.
        python: whether the plugins in Python can be used in place of the library.
        nvrtc_path: the NVRTC that pip installed, None to let the system's loader find one.
        toolchain_problem: why the library cannot be built here.
    """

    library: str | None = None
    expected: str = ""
    is_current: bool = False
    headers: str = ""
    creators: tuple[Mapping[str, str], ...] = ()
    nvrtc: str = ""
    problem: str = ""
    registering: str | None = None
    python: bool = False
    nvrtc_path: str | None = None
    toolchain_problem: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether builds and runs can load the library."""
        return self.library is not None and self.is_current and not self.problem


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What was found on this machine. Problems are texts, empty if there is no problem.

    Attributes:
        versions: installed versions by distribution, None if it is not installed.
        imports: the problem of each module that export requires.
        onnxruntime: onnxruntime's version, None if it cannot be imported.
        providers: the problem of each ONNX Runtime provider `cpu`, `cuda`, `tensorrt`, found by opening a session.
        compiled: the providers that onnxruntime was built with, by their full names.
        gpus: name, memory and driver of each GPU that nvidia-smi, the driver or torch finds.
        torch_cuda: the CUDA version that torch was built for, None for a CPU build.
        driver: the driver.
        products: `tensorrt` and `rtx`.
        plugin: the plugins for TensorRT.
    """

    versions: dict[str, str | None]
    imports: dict[str, str]
    onnxruntime: str | None
    providers: dict[str, str]
    compiled: list[str]
    gpus: list[str]
    torch_cuda: str | None
    driver: Driver
    products: Mapping[RuntimeName, Product]
    plugin: PluginState


@dataclass(frozen=True, slots=True)
class Way:
    """One use of a target on this machine.

    Attributes:
        name: `export`, `tensorrt build`, `tensorrt run`, `tensorrt-rtx build`, `tensorrt-rtx run`, or a provider of
            ONNX Runtime: `onnxruntime cpu`, `onnxruntime cuda`, `onnxruntime tensorrt`.
        missing: what is missing; empty if the use is possible.
        get: the commands that install what is missing, in order.
    """

    name: str
    missing: list[str] = field(default_factory=list)
    get: list[str] = field(default_factory=list)

    @property
    def possible(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    def to_dict(self) -> dict[str, Any]:
        """The use as JSON values."""
        return {"name": self.name, "possible": self.possible, "missing": self.missing, "get": self.get}
