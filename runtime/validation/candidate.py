"""The side that is compared with PyTorch (`Candidate`): an exported file, another PyTorch model, or any runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.graph.sizes import SizeLimits, limits_in, size_limits_of
from ...export.onnx_io.owned_files import sha256
from ...export.onnx_io.read_model import read_model
from ...models.calling.calls import CallForm
from ...models.errors import UsageError
from ...models.recognition.find_norms import find_norms
from ..engines.api import ORT
from ..engines.engine_file import EngineFile, open_engine_file
from ..inputs.exported import Exported, open_exported
from ..norms.access import NormAccess
from ..norms.onnx_norms import OnnxNorms
from ..norms.torch_norms import TorchNorms, survey_norms
from ..runners.base import Array, Runner
from ..runners.open import CPU_NAME, open_runner
from ..tensorrt.on_demand import BuiltOnDemand, local_options, open_model
from ..tensorrt.options import BuildOptions
from .options import ValidationOptions

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Candidate:
    """The side that is compared with PyTorch.

    Attributes:
        name: the name in reports.
        opened: opens its runner; may be called several times.
        norms: returns access to its norms, as they are called on the given inputs; None if that is not possible.
        manifest: the manifest of an exported folder, else empty.
        limits: the sizes for which a file was exported.
        runtime: the runtime's name in the lowering table.
        no_norms: why there is no access to norms, where `norms` is None.
        inputs: PyTorch's name of an input by the candidate's, of those that differ. `opened` takes the candidate's.
    """

    name: str
    opened: Callable[[], AbstractContextManager[Runner]]
    norms: Callable[[Mapping[str, Array]], NormAccess] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    limits: SizeLimits = field(default_factory=SizeLimits)
    inputs: Mapping[str, str] = field(default_factory=dict)
    runtime: str = "onnxruntime"
    no_norms: str = ""


def candidate_of(
    thing: str | Path | Exported | nn.Module | Runner, options: ValidationOptions, form: CallForm | None = None
) -> Candidate:
    """The candidate for a path, a module or a runner.

    Args:
        thing: an exported folder or .onnx file, a PyTorch module, or an open runner.
        options: the provider and the window of norms, for files.
        form: how a module is called.

    Raises:
        UsageError: `thing` is not one of these, or the file does not exist.
    """
    from torch import nn

    if isinstance(thing, str | Path | Exported):
        return _of_file(thing if isinstance(thing, Exported) else open_exported(thing), options)
    if isinstance(thing, nn.Module):
        return _of_module(thing, form)
    if isinstance(thing, Runner):
        return _of_runner(thing)
    raise UsageError(f"expected a path, a PyTorch module or a runner to validate, got {type(thing).__name__}.")


def _of_file(exported: Exported, options: ValidationOptions) -> Candidate:
    path, provider = exported.model, options.provider
    runner = options.runners[0] if options.runners else None
    if exported.is_engine or runner not in (None, ORT):
        return _of_engine(exported, runner, options)
    return Candidate(
        str(path),
        lambda: open_runner(path, provider),
        lambda _feeds: OnnxNorms(path, provider, options.window),
        exported.manifest,
        _limits(exported),
    )


def _of_engine(exported: Exported, runner: str | None, options: ValidationOptions) -> Candidate:
    """An engine, or a file of which engines are built."""
    path = exported.model
    file = open_engine_file(path) if exported.is_engine else None
    build = local_options(str(runner)) if file is None else _build_options(file)
    model = path if file is None else file.model

    def norms(_feeds: Mapping[str, Array]) -> OnnxNorms:
        assert model is not None
        return OnnxNorms(
            model, CPU_NAME, options.window, lambda data, folder: BuiltOnDemand(data, build, folder, exact=True)
        )

    is_deep = options.deep or options.bisect
    if file is not None and is_deep:
        _check_model(file)
    shallow = "an engine shows its outputs; --deep builds engines whose norms are marked, and checks those"
    return Candidate(
        str(path),
        lambda: open_model(exported, runner, options.provider),
        norms if is_deep else None,
        exported.manifest,
        SizeLimits() if exported.is_engine and not exported.manifest else _limits(exported),
        runtime="tensorrt",
        no_norms="" if is_deep else shallow,
    )


def _build_options(file: EngineFile) -> BuildOptions:
    """The options that an engine was built with, without its profiles: for engines of its parts."""
    known = dict(file.record.get("options", {}))
    return BuildOptions(**{**known, "profiles": (), "runtime": file.runtime})


def _check_model(file: EngineFile) -> None:
    """Check that the file that an engine was built from is there and unchanged."""
    model, wanted = file.model, file.record.get("model", {}).get("sha256")
    if model is None or not model.is_file() or sha256(model) != wanted:
        what = "nothing says" if model is None else f"{model} is not the file"
        raise UsageError(
            f"{file.path}: --deep builds engines from the .onnx file that this engine was built from, and {what} "
            "from which it was built. Build it again, or omit --deep."
        )


def _limits(exported: Exported) -> SizeLimits:
    if exported.manifest:
        return size_limits_of(exported.manifest)
    file = read_model(exported.model)
    return limits_in({row.key: row.value for row in file.model.metadata_props}, file.where)


def _of_module(model: nn.Module, form: CallForm | None) -> Candidate:
    def norms(feeds: Mapping[str, Array]) -> TorchNorms:
        runner, recognition = open_runner(model, form=form), find_norms(model)
        return TorchNorms(model, runner, recognition, survey_norms(model, runner, recognition, feeds).called)

    return Candidate(type(model).__name__, lambda: open_runner(model, form=form), norms)


def _of_runner(runner: Runner) -> Candidate:
    """A candidate without access to norms: a runner only returns outputs. It is not closed."""

    @contextmanager
    def opened() -> Iterator[Runner]:
        yield runner

    return Candidate(type(runner).__name__, opened)
