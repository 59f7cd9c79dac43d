"""What is held against PyTorch: an exported file in ONNX Runtime, another PyTorch model, or any runner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...models.errors import UsageError
from ...models.recognition.find_norms import find_norms
from ..inputs.exported import Exported, open_exported
from ..norms.access import NormAccess, Sources
from ..norms.graph_norms import Key
from ..norms.onnx_norms import OnnxNorms
from ..norms.torch_norms import TorchNorms
from ..runners.base import Array, Runner
from ..runners.onnxruntime import OrtRunner
from ..runners.torch import TorchRunner

if TYPE_CHECKING:
    from torch import nn


class Candidate(Protocol):
    """One side of a comparison, whose runner is opened when it is needed and closed when it is not."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest of an exported folder; empty elsewhere."""
        ...

    def opened(self) -> Any:
        """A context manager that yields its `Runner`."""
        ...

    def norms(self, feeds: Mapping[str, Array]) -> NormAccess | None:
        """The candidate opened at its norms, or None where it cannot be."""
        ...

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        """What goes into the segment before a norm, or before an output."""
        ...


class OnnxCandidate:
    """An exported folder or an .onnx file, in ONNX Runtime."""

    def __init__(self, exported: Exported, provider: str) -> None:
        self.name = str(exported.model)
        self.manifest: Mapping[str, Any] = exported.manifest
        self._path, self._providers = exported.model, [provider]
        self._norms: OnnxNorms | None = None

    def opened(self) -> OrtRunner:
        """See `Candidate.opened`."""
        return OrtRunner(self._path, providers=self._providers)

    def norms(self, feeds: Mapping[str, Array]) -> OnnxNorms:
        """See `Candidate.norms`."""
        del feeds
        if self._norms is None:
            self._norms = OnnxNorms(self._path, self._providers)
        return self._norms

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        """See `Candidate.sources`."""
        return self.norms({}).sources(keys, end)


class TorchCandidate:
    """Another PyTorch model."""

    def __init__(self, model: nn.Module) -> None:
        self.name = type(model).__name__
        self.manifest: Mapping[str, Any] = {}
        self._model = model

    def opened(self) -> TorchRunner:
        """See `Candidate.opened`."""
        return TorchRunner(self._model)

    def norms(self, feeds: Mapping[str, Array]) -> TorchNorms:
        """See `Candidate.norms`."""
        norms = TorchNorms(self._model, TorchRunner(self._model), find_norms(self._model))
        norms.survey(feeds)
        return norms

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        """PyTorch does not tell what a value was computed from: the norm before it in time."""
        at = keys.index(end) if not isinstance(end, str) else len(keys)
        return Sources(keys[max(at - 1, 0) : at])


class RunnerCandidate:
    """Any runner, open already; its outputs are all that can be seen of it."""

    def __init__(self, runner: Runner) -> None:
        self.name = type(runner).__name__
        self.manifest: Mapping[str, Any] = {}
        self._runner = runner

    @contextmanager
    def opened(self) -> Iterator[Runner]:
        """See `Candidate.opened`; the runner stays open afterwards."""
        yield self._runner

    def norms(self, feeds: Mapping[str, Array]) -> None:
        """None: a runner shows its outputs only."""
        del feeds

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        """None are known."""
        del keys, end
        return Sources([])


def candidate_of(thing: str | Path | nn.Module | Runner, provider: str) -> Candidate:
    """The candidate that `thing` stands for.

    Args:
        thing: an exported folder or .onnx file, a PyTorch module, or an open runner.
        provider: ONNX Runtime's execution provider, for files.

    Raises:
        UsageError: it is none of them, or there is no such file.
    """
    from torch import nn

    if isinstance(thing, str | Path):
        return OnnxCandidate(open_exported(thing), provider)
    if isinstance(thing, nn.Module):
        return TorchCandidate(thing)
    if isinstance(thing, Runner):
        return RunnerCandidate(thing)
    raise UsageError(f"{type(thing).__name__} cannot be validated; give a path, a PyTorch module or a runner.")
