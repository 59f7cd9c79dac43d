"""`NormAccess` for an ONNX file in ONNX Runtime (`OnnxNorms`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...export.onnx_io.read_model import read_model
from ...models.dtypes import numpy_dtype
from ..runners.base import Array, OnnxSession, Runner
from ..runners.open import has_large_weights, open_runner
from .access import Formula, NormDtypes, NormFeed, NormResult, RecordedNorm, RunNorms, Sink, Sources, windows
from .activation_store import ActivationStore, Key
from .cut import Cut, Opener, RunCuts, cut_out, run_alone
from .formula import FileFormulas, read_formulas
from .graph_norms import GraphNorms, cut_name, fed_name


class OnnxNorms:
    """The norms of an ONNX file; see `NormAccess`.

    Args:
        path: the file.
        provider: see `open_runner`.
        window: number of norms whose values are in memory at a time; None for all. A smaller window takes less memory
            and more sessions.
        opener: opens parts of the file in another runtime than ONNX Runtime; None for the provider.
    """

    def __init__(self, path: Path, provider: str, window: int | None = None, opener: Opener | None = None) -> None:
        self._path, self._provider, self._window, self._opener = path, provider, window, opener
        self._graph = GraphNorms(path)
        self._formulas: FileFormulas | None = None
        self._large = has_large_weights(read_model(path).external_files)
        self._options: dict[str, Any] = {"session_options": {"repack_weights": not self._large}}

    @property
    def graph(self) -> GraphNorms:
        """The graph of the file."""
        return self._graph

    @property
    def in_engines(self) -> bool:
        """Whether parts of the file run in engines that are built of them."""
        return self._opener is not None

    @property
    def keys(self) -> list[Key]:
        """The norms in the file."""
        return list(self._graph.norms)

    @property
    def problems(self) -> Mapping[str, str]:
        """Norms that are in the file but cannot be cut out, with the reason."""
        return self._graph.problems

    @property
    def remarks(self) -> list[str]:
        """See `NormAccess.remarks`."""
        if self._opener is not None:
            return [
                "norms and segments ran in engines of their own, built of the same file with the norms' inputs and "
                "outputs marked: TensorRT does not fuse across marked values, so it may compute them in other kernels "
                "than the whole engine"
            ]
        if not self._large:
            return []
        return ["the file is large: its parts were run without repacking weights for the kernels, to save time"]

    @property
    def unused(self) -> frozenset[Key]:
        """Norms whose result is not read."""
        return frozenset(key for key, norm in self._graph.norms.items() if not norm.used)

    @property
    def recorded(self) -> Mapping[Key, RecordedNorm]:
        """See `NormAccess.recorded`."""
        return {key: norm.recorded for key, norm in self._graph.norms.items() if norm.recorded is not None}

    def formula(self, key: Key) -> Formula | str | None:
        """See `NormAccess.formula`. The graph decides, not its metadata; it is read when it is asked for first."""
        if self._formulas is None:
            self._formulas = read_formulas(self._path)
        return self._formulas.norms.get(self._graph.norms[key].y) or self._formulas.refusals.get(key[0])

    def dtypes(self, key: Key) -> NormDtypes:
        """See `NormAccess.dtypes`."""
        norm, dtype = self._graph.norms[key], self._graph.dtype
        return NormDtypes(dtype(norm.x), dtype(norm.y), None if norm.gate is None else dtype(norm.gate))

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        """See `NormAccess.sources`."""
        found = self._graph.ancestry(keys, end if isinstance(end, str) else self._graph.norms[end].x)
        norms = self._graph.norms
        feeding = [key for key in keys if found.values & {norms[key].x, norms[key].y}]
        return Sources(feeding, frozenset(found.paths), found.reads_inputs, frozenset(found.attentions))

    @contextmanager
    def alone(self, keys: Iterable[Key]) -> Iterator[RunNorms]:
        """See `NormAccess.alone`. A fused residual add receives x as two parts whose sum is exactly x."""
        places = {key: self._graph.place(key) for key in keys}
        with self.cut_out([place.cut() for place in places.values()]) as run_cuts:

            def run(feeds: Mapping[Key, NormFeed]) -> dict[Key, NormResult]:
                split = {cut_name(key): place.split(self._cast(key, feeds[key]))[1] for key, place in places.items()}
                results = run_cuts(split)
                found = {key: results[cut_name(key)] for key in places}
                return {key: NormResult(arrays["y"], arrays.get("sum")) for key, arrays in found.items()}

            yield run

    def cut_out(self, cuts: Sequence[Cut]) -> AbstractContextManager[RunCuts]:
        """A function that runs these parts of the graph alone."""
        cut = cut_out(self._graph.model, cuts)
        return run_alone(cut, self._provider, self._path.parent, opener=self._opener, **self._options)

    def between(
        self, feeds: Mapping[str, Array], keys: list[Key], store: ActivationStore, sink: Sink
    ) -> dict[str, Array]:
        """See `NormAccess.between`. Each window is one session, which loads only the weights of its part."""
        outputs: dict[str, Array] = {}
        for wanted in windows(keys, self._window):
            last = wanted[-1:] == keys[-1:]
            with self._opened(self._graph.between(keys, wanted=wanted, with_outputs=last)) as runner:
                results = runner.run(self._fed(runner, feeds, keys, store))
            for norm in (self._graph.norms[key] for key in wanted):
                sink(norm.key, "x", results[norm.x])
                if norm.gate is not None:
                    sink(norm.key, "gate", results[norm.gate])
            outputs.update({name: results[name] for name in self._graph.output_names if name in results})
        return outputs

    def trace(self, feeds: Mapping[str, Array], keys: list[Key], sink: Sink) -> dict[str, Array]:
        """See `NormAccess.trace`. The whole file runs once per window; values outside the window are not returned."""
        names = [name for norm in map(self._graph.norms.__getitem__, keys) for name in norm.values]
        own = self._graph.output_names
        outputs: dict[str, Array] = {}
        with self._opened(self._graph.exposed(names)) as runner:
            for part in windows(keys, self._window):
                norms = [self._graph.norms[key] for key in part]
                values = (name for norm in norms for name in norm.values)
                results = runner.run(feeds, outputs=list(dict.fromkeys([*own, *values])))
                for norm in norms:
                    sink(norm.key, "x", results[norm.x])
                    sink(norm.key, "y", results[norm.y])
                    if norm.gate is not None:
                        sink(norm.key, "gate", results[norm.gate])
                outputs = {name: results[name] for name in own}
        return outputs

    def _opened(self, model: onnx.ModelProto) -> OnnxSession:
        if self._opener is not None:
            return self._opener(model.SerializeToString(), self._path.parent)
        return open_runner(model.SerializeToString(), self._provider, weights_folder=self._path.parent, **self._options)

    def _cast(self, key: Key, feed: NormFeed) -> NormFeed:
        """The feed in the dtypes of the file."""
        norm = self._graph.norms[key]
        gate = None if norm.gate is None or feed.gate is None else self._as(norm.gate, feed.gate)
        return NormFeed(self._as(norm.operands[0], feed.x), gate)

    def _as(self, name: str, array: Array) -> Array:
        return array.astype(numpy_dtype(self._graph.dtype(name)), copy=False)

    def _fed(
        self, runner: Runner, feeds: Mapping[str, Array], keys: list[Key], store: ActivationStore
    ) -> dict[str, Array]:
        wanted = {info.name: info.dtype for info in runner.inputs()}
        arrays = {name: value for name, value in feeds.items() if name in wanted}
        for norm in (self._graph.norms[key] for key in keys):
            for name, role in ((norm.x, "fed_x"), (norm.y, "fed_y")):
                if fed_name(name) in wanted:
                    value = np.asarray(store.get(norm.key, role))
                    arrays[fed_name(name)] = value.astype(numpy_dtype(wanted[fed_name(name)]), copy=False)
        return arrays
