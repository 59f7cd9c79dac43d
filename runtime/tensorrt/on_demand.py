"""Run an ONNX model in TensorRT without an engine (`BuiltOnDemand`): one is built for the shapes that come."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...export.onnx_io.read_model import read_model
from ...models.errors import UnsupportedError, UsageError
from ..engines.api import FLAVORS, ORT, RUNNERS, cuda_device, flavor_name
from ..engines.open_engine import local_gpu
from ..inputs.exported import Exported
from ..runners.base import Array, ClosesOnExit, OnnxSession, Runner, TensorInfo, check_feeds
from ..runners.open import CPU_NAME, open_runner
from .build import Engine, build_engine
from .options import BuildOptions
from .profiles import BATCH, Range, roles

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

# How far a profile reaches at least, so that few engines are built: batches, and lengths.
_BATCH, _LENGTH = 4, 128
_MODEL: Final = "model.onnx"


def open_model(exported: Exported, runner: str | None = None, provider: str = CPU_NAME) -> Runner:
    """A runner for an exported model, open until its context exits.

    Args:
        exported: an exported model, or an engine.
        runner: `ort`, `tensorrt` or `rtx`; None for ONNX Runtime, or for the product that built an engine. Engines of a
            model that is none are built for the shapes that come.
        provider: see `open_runner`.

    Raises:
        UsageError: the runner or the provider does not fit the model.
        UnsupportedError, EnvironmentMissingError, RmsnormDeployError: as `open_runner` and `BuiltOnDemand`.
    """
    path = exported.model
    if runner not in (None, *RUNNERS):
        raise UsageError(f"--runner: expected {', '.join(RUNNERS)}, got {runner}.")
    if not exported.is_engine and runner in (None, ORT):
        return open_runner(path, provider)
    if provider != CPU_NAME:
        raise UsageError(
            f"{path}: expected no provider of ONNX Runtime for a run in TensorRT, got {provider}. Omit --provider."
        )
    if not exported.is_engine:
        local_gpu()  # before the time that a build takes
        return BuiltOnDemand(path, local_options(str(runner)))
    if runner == ORT:
        raise UsageError(f"{path} is an engine, which ONNX Runtime cannot run; name the folder it was built from.")
    return open_runner(path, runtime=runner)


def local_options(runtime: str) -> BuildOptions:
    """The options of a build for this machine's GPU.

    Raises:
        UsageError: the name of the product is unknown.
    """
    name, gpu = flavor_name(runtime), cuda_device()
    known = gpu is not None and gpu[1] in FLAVORS[name].architectures
    return BuildOptions(runtime=name, architectures=(gpu[1],) if gpu is not None and known else ())


class BuiltOnDemand(ClosesOnExit):
    """A `Runner` of an ONNX model in TensorRT. The engine is built at the first run, and again where shapes outgrow it.

    Args:
        source: an .onnx file, or the bytes of a model.
        options: how engines are built; the profiles follow from the shapes.
        weights_folder: the folder of the external data of a model given as bytes.
        progress: called with a line of text at each build.
        exact: the first engine is for the first shapes only, as parts of a model need: values that are fed have dims
            without names, which are to be those of the other values.

    Raises:
        UsageError: the model is not valid, or an input has a dtype that no engine has.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        options: BuildOptions,
        weights_folder: Path | None = None,
        progress: Callable[[str], None] | None = None,
        exact: bool = False,
    ) -> None:
        file = read_model(source, weights_folder)
        self._where, self._options, self._tell = file.where, options, progress or (lambda _: None)
        self._proto, graph = file.model, file.model.graph
        _name_dims(file.model)
        constants = {tensor.name for tensor in graph.initializer}
        self._inputs = [_info(value) for value in graph.input if value.name not in constants]
        self._outputs = [_info(value) for value in graph.output]
        self._ranges: dict[str, tuple[int, int]] = {}
        self._exact = exact
        self._stack = contextlib.ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rmsnorm-engine-")))
        for data in file.external_files:
            _share(data, self._folder / data.relative_to(_base(file.path, weights_folder)))
        self._runner: OnnxSession | None = None
        self._builds = 0

    def close(self) -> None:
        """Release the engine, and delete its files."""
        self._release()
        self._stack.close()

    def inputs(self) -> list[TensorInfo]:
        """The model's inputs, without initializers."""
        return list(self._inputs)

    def outputs(self) -> list[TensorInfo]:
        """The model's outputs."""
        return list(self._outputs)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run one inference; see `OnnxSession.run`.

        Raises:
            UsageError, UnsupportedError, RmsnormDeployError: as `build_engine` and `TensorRTRunner.run`.
        """
        check_feeds(self._inputs, feeds, self._where)
        return self._fitting({name: array.shape for name, array in feeds.items()}).run(feeds, outputs)

    def provenance(self) -> dict[str, Any]:
        """That of the last engine, without its temporary files, and how many were built.

        Raises:
            UsageError: nothing has run yet.
        """
        if self._runner is None:
            raise UsageError(f"{self._where}: expected a run before its provenance; no engine is built yet.")
        found = self._runner.provenance()
        return {**found, "engine": {"built_on_demand": self._builds}, "model": {"path": self._where}}

    def _fitting(self, shapes: Mapping[str, tuple[int, ...]]) -> OnnxSession:
        """The engine, built again if a dim is outside of its profile."""
        sizes = {
            dim: size
            for info in self._inputs
            for dim, size in zip(info.shape or (), shapes[info.name], strict=True)
            if isinstance(dim, str)
        }
        known = self._ranges or ({dim: (size, size) for dim, size in sizes.items()} if self._exact else {})
        ranges = {dim: _reach(dim, size, known.get(dim)) for dim, size in sizes.items()}
        if self._runner is not None and ranges == self._ranges:
            return self._runner
        self._release()
        self._ranges = ranges
        self._runner = open_runner(self._built(sizes).path)
        return self._runner

    def _built(self, sizes: Mapping[str, int]) -> Engine:
        self._builds += 1
        self._tell(f"building an engine for {self._where}" + (f", number {self._builds}" if self._builds > 1 else ""))
        varying = {dim: span for dim, span in self._ranges.items() if span[0] != span[1]}
        past, total, _ = roles(list(varying))
        parts = [
            f"{dim}:{Range(least, sizes[dim], most)}"
            for dim, (least, most) in varying.items()
            if dim != total or past is None  # else it follows from its parts
        ]
        model = self._folder / _MODEL
        model.write_bytes(_with_sizes(self._proto, {dim: sizes[dim] for dim in sizes if dim not in varying}))
        options = dataclasses.replace(self._options, profiles=(" ".join(parts),) if parts else ())
        return build_engine(model, self._folder / f"{self._builds}.engine", options)

    def _release(self) -> None:
        if self._runner is not None:
            self._runner.__exit__(None, None, None)
            self._runner = None
            (self._folder / f"{self._builds}.engine").unlink(missing_ok=True)


def _reach(dim: str, size: int, known: tuple[int, int] | None) -> tuple[int, int]:
    """The range of a dim that covers this size and the earlier ones; the first has room for others."""
    past, total, new = roles([dim])
    is_length = dim in (past, total, new)
    if known is not None:
        # A length grows with the tokens; it doubles, so that few engines are built.
        most = known[1] if size <= known[1] else 2 * size if is_length else size
        return min(known[0], size), most
    if BATCH.search(dim.lower()):
        return min(1, size), max(_BATCH, size)
    if is_length:
        return 0 if dim == past else min(1, size), max(_LENGTH, size)
    return size, size


def _name_dims(model: ModelProto) -> None:
    """Give each input's dims without size and name a name, which profiles require."""
    for value in model.graph.input:
        for index, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and not dim.dim_param:
                dim.dim_param = f"{value.name}_dim_{index}"


def _with_sizes(model: ModelProto, sizes: Mapping[str, int]) -> bytes:
    """The model with these dims of its inputs fixed: the plugin requires a width that is known."""
    from onnx import ModelProto

    changed = ModelProto()
    changed.CopyFrom(model)
    for value in changed.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    return changed.SerializeToString()


def _info(value: ValueInfoProto) -> TensorInfo:
    import onnx

    kind = value.type.tensor_type
    if kind.elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        raise UnsupportedError(f"{value.name}: expected a tensor of numbers, got ONNX's type {kind.elem_type}.")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    if not kind.HasField("shape"):
        return TensorInfo(value.name, dtype, None)
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim)
    return TensorInfo(value.name, dtype, shape)


def _base(path: Path | None, weights_folder: Path | None) -> Path:
    base = weights_folder if path is None else path.parent
    assert base is not None  # `read_model` refuses external data without a folder
    return base


def _share(data: Path, place: Path) -> None:
    """The same file under another name, without a copy where the file system allows it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(data, place)
    except OSError:
        shutil.copyfile(data, place)
