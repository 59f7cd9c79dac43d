"""The side that is compared with PyTorch (`Candidate`): an exported file, another PyTorch model, or any runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.graph.sizes import SizeLimits, limits_in, size_limits_of
from ...export.onnx_io.read_model import read_model
from ...models.calling.calls import CallForm
from ...models.errors import UsageError
from ...models.recognition.find_norms import find_norms
from ..inputs.exported import Exported, open_exported
from ..norms.access import NormAccess
from ..norms.onnx_norms import OnnxNorms
from ..norms.torch_norms import TorchNorms, survey_norms
from ..runners.base import Array, Runner
from ..runners.open import open_runner
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
        inputs: PyTorch's name of an input by the candidate's, of those that differ. `opened` takes the candidate's.
    """

    name: str
    opened: Callable[[], AbstractContextManager[Runner]]
    norms: Callable[[Mapping[str, Array]], NormAccess] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    limits: SizeLimits = field(default_factory=SizeLimits)
    inputs: Mapping[str, str] = field(default_factory=dict)


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
    return Candidate(
        str(path),
        lambda: open_runner(path, provider),
        lambda _feeds: OnnxNorms(path, provider, options.window),
        exported.manifest,
        _limits(exported),
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
