"""The norms of an ONNX file in ONNX Runtime: each alone, what lies between them, and their values as the file runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx

from ...export.onnx_io.read_model import read_model
from ...models.dtypes import numpy_dtype
from ..runners.base import Array
from ..runners.onnxruntime import OrtRunner
from .access import NormFeed, NormResult, RunNorms, Sink, Sources
from .activation_store import ActivationStore
from .graph_norms import GraphNorm, GraphNorms, Key, fed_name, gate_name, operand_name

# Weights beyond this many bytes are not repacked a second time: that would take longer than the run.
_LARGE_FILE = 1 << 30


class OnnxNorms:
    """An ONNX file opened at its norms; see `NormAccess`.

    Args:
        path: the file.
        providers: ONNX Runtime's execution providers.
    """

    def __init__(self, path: Path, providers: list[str]) -> None:
        self._path, self._providers = path, providers
        self._graph = GraphNorms(path)
        self._large = sum(file.stat().st_size for file in read_model(path).external_files) > _LARGE_FILE

    @property
    def keys(self) -> list[Key]:
        """The norms in the file."""
        return list(self._graph.norms)

    @property
    def problems(self) -> dict[str, str]:
        """Norms whose nodes are there but cannot be cut out."""
        return self._graph.problems

    def unused(self) -> list[Key]:
        """Norms whose result nothing reads."""
        return [key for key, norm in self._graph.norms.items() if not norm.used]

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        """What goes into the segment before a norm, or before an output."""
        found = self._graph.ancestry(keys, end if isinstance(end, str) else self._graph.norms[end].x)
        norms = self._graph.norms
        feeding = [key for key in keys if found.values & {norms[key].x, norms[key].y}]
        return Sources(feeding, frozenset(found.paths), found.reads_inputs)

    @contextmanager
    def alone(self, keys: Iterable[Key]) -> Iterator[RunNorms]:
        """See `NormAccess.alone`. A fused residual add gets x in two parts that sum to it exactly."""
        norms = [self._graph.norms[key] for key in keys]
        with self._opened(self._graph.alone([norm.key for norm in norms])) as runner:

            def run(feeds: Mapping[Key, NormFeed]) -> dict[Key, NormResult]:
                arrays: dict[str, Array] = {}
                for norm in norms:
                    arrays.update(self._operands(norm, feeds[norm.key]))
                results = runner.run(arrays)
                return {n.key: NormResult(results[n.y], results.get(n.x)) for n in norms}

            yield run

    def between(
        self, feeds: Mapping[str, Array], keys: list[Key], store: ActivationStore, sink: Sink, window: int | None
    ) -> dict[str, Array]:
        """See `NormAccess.between`. Each window is a session that loads the weights of its part of the model only."""
        outputs: dict[str, Array] = {}
        for first in range(0, len(keys), window or max(len(keys), 1)):
            wanted = keys[first : first + (window or len(keys))]
            last = wanted[-1] == keys[-1]
            with self._opened(self._graph.between(keys, wanted=wanted, with_outputs=last)) as runner:
                results = runner.run(self._fed(runner, feeds, keys, store))
            for norm in (self._graph.norms[key] for key in wanted):
                sink(norm.key, "x", results[norm.x])
                if norm.gate is not None:
                    sink(norm.key, "gate", results[norm.gate])
            outputs.update({name: results[name] for name in self._graph.output_names if name in results})
        return outputs

    def trace(self, feeds: Mapping[str, Array], keys: list[Key], sink: Sink, window: int | None) -> dict[str, Array]:
        """See `NormAccess.trace`. The whole file runs once for each window; values outside it are not kept."""
        norms = [self._graph.norms[key] for key in keys]
        names = list(dict.fromkeys(name for norm in norms for name in (norm.x, norm.y)))
        own = self._graph.output_names
        with self._opened(self._graph.exposed(names)) as runner:
            for first in range(0, len(norms), window or max(len(norms), 1)):
                part = norms[first : first + (window or len(norms))]
                results = runner.run(feeds, outputs=list(dict.fromkeys([*own, *(v for n in part for v in (n.x, n.y))])))
                for norm in part:
                    sink(norm.key, "x", results[norm.x])
                    sink(norm.key, "y", results[norm.y])
        return {name: results[name] for name in own}

    @property
    def remarks(self) -> list[str]:
        """How the parts are run otherwise than the whole file is."""
        if not self._large:
            return []
        return ["the file is large: its parts were run without repacking weights for the kernels, which opens at once"]

    def _opened(self, model: onnx.ModelProto) -> OrtRunner:
        return OrtRunner(
            model.SerializeToString(),
            providers=self._providers,
            weights_folder=self._path.parent,
            session_options={"repack_weights": not self._large},
        )

    def _operands(self, norm: GraphNorm, feed: NormFeed) -> dict[str, Array]:
        x = feed.x.astype(numpy_dtype(self._graph.dtype(norm.operands[0])), copy=False)
        arrays = {operand_name(norm.key, 0): x}
        if len(norm.operands) > 1:
            first = np.arange(x.size).reshape(x.shape) % 2 == 0
            zero = np.zeros((), x.dtype)
            arrays = {
                operand_name(norm.key, 0): np.where(first, x, zero),
                operand_name(norm.key, 1): np.where(first, zero, x),
            }
        if norm.gate is not None and feed.gate is not None:
            arrays[gate_name(norm.key)] = feed.gate.astype(numpy_dtype(self._graph.dtype(norm.gate)), copy=False)
        return arrays

    def _fed(
        self, runner: OrtRunner, feeds: Mapping[str, Array], keys: list[Key], store: ActivationStore
    ) -> dict[str, Array]:
        wanted = {info.name: info.dtype for info in runner.inputs()}
        arrays = {name: value for name, value in feeds.items() if name in wanted}
        for norm in (self._graph.norms[key] for key in keys):
            for name, role in ((norm.x, "fed_x"), (norm.y, "fed_y")):
                if fed_name(name) in wanted:
                    value = np.asarray(store.get(norm.key, role))
                    arrays[fed_name(name)] = value.astype(numpy_dtype(wanted[fed_name(name)]), copy=False)
        return arrays
