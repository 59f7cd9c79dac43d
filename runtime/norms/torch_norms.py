"""The norms of a PyTorch model while it runs: seen, fed, and run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...models.dtypes import numpy_dtype, torch_name
from ...models.recognition.intercept import NormCall, at_norms
from ...models.recognition.site import Recognition
from ...models.reference import reference
from ...models.spec import NormSpec
from ..accuracy.float_formats import format_of
from ..runners.base import Array
from ..runners.torch import TorchRunner, to_numpy, to_torch
from .access import CalledNorm, NormFeed, NormResult, RunNorms, Sink
from .activation_store import ActivationStore
from .float64_model import exact, wide_array
from .graph_norms import Key

if TYPE_CHECKING:
    from torch import Tensor, nn


class TorchNorms:
    """A PyTorch model opened at its norms; see `NormAccess`.

    Args:
        model: the module, in eval mode.
        runner: runs it.
        recognition: its norms.
    """

    def __init__(self, model: nn.Module, runner: TorchRunner, recognition: Recognition) -> None:
        self._model, self._runner = model, runner
        self._sites = recognition.sites
        self._by_path = {site.path: site for site in self._sites}
        self._modules = {site.path: model.get_submodule(site.path) for site in self._sites}
        self._own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._called: dict[Key, CalledNorm] = {}

    @property
    def keys(self) -> list[Key]:
        """The norms that the last survey met, in order of execution."""
        return list(self._called)

    @property
    def problems(self) -> dict[str, str]:
        """None: every recognized norm can be opened."""
        return {}

    @property
    def remarks(self) -> list[str]:
        """None: norms run in the model itself."""
        return []

    def unused(self) -> list[Key]:
        """None are known: PyTorch does not tell who reads a result."""
        return []

    def survey(self, feeds: Mapping[str, Array]) -> tuple[dict[Key, CalledNorm], dict[str, Array]]:
        """Run once; the norms that were called, in order of execution, and the outputs."""
        called: dict[Key, CalledNorm] = {}

        def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
            x, y = call.x, original()
            forced = 0 not in x.stride() and x.untyped_storage().data_ptr() not in self._own
            gate = None if call.gate is None else torch_name(call.gate.dtype)
            off = _distance(call.spec, to_numpy(y), exact(call)) / format_of(numpy_dtype(torch_name(y.dtype))).eps
            called[path, number] = CalledNorm(
                (path, number), call.spec, tuple(x.shape), torch_name(x.dtype), torch_name(y.dtype), gate, forced, off
            )
            return y

        outputs = self._visited(feeds, visit)
        self._called = called
        return called, outputs

    def trace_reference(self, feeds: Mapping[str, Array], keys: list[Key], sink: Sink) -> dict[str, Array]:
        """As `trace`, with the float64 reference in the place of every norm; to be called inside `in_float64`."""

        def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
            y = exact(call)
            if (path, number) in keys:
                sink((path, number), "x", wide_array(call.x))
                sink((path, number), "y", y)
            return torch.from_numpy(y).to(call.x.device)

        return self._visited(feeds, visit)

    def write_reference(
        self, feeds: Mapping[str, Array], store: ActivationStore
    ) -> tuple[dict[str, Array], dict[Key, float]]:
        """Run in float64, rounding at every norm to what the deployed model can hold there.

        To be called inside `in_float64`, after `survey`. The store gets, for each norm, what arrives (`x`, `gate`) and
        what it computes (`y`) in float64, and all three as rounded (`fed_x`, ...). The model goes on with the rounded
        x and y: every segment starts from values that the deployment dtype holds exactly, so its truth is exact.

        Returns:
            The outputs, computed from the last norms' rounded values; and how far each norm's own code in float64 is
            from the reference, in max(|truth|, row RMS), beyond what its epsilon could account for.
        """
        disagreements: dict[Key, float] = {}

        def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
            key = (path, number)
            info = self._called[key]
            for role, tensor, dtype in (("x", call.x, info.x_dtype), ("gate", call.gate, info.gate_dtype)):
                if tensor is not None and dtype is not None:
                    store.put(key, role, wide_array(tensor))
                    store.put(key, f"fed_{role}", _rounded(wide_array(tensor), dtype))
            _force(call, info, store)
            y = exact(call)
            disagreements[key] = _disagreement(call, wide_array(original()), y)
            store.put(key, "y", y)
            store.put(key, "fed_y", _rounded(y, info.y_dtype))
            return to_torch(store.get(key, "fed_y")).to(call.x.device, torch.float64)

        return self._visited(feeds, visit), disagreements

    def exact(self, key: Key, feed: NormFeed) -> Array:
        """The float64 reference of one norm on these inputs, with the module's own weight and bias."""
        site, module = self._by_path[key[0]], self._modules[key[0]]
        names = (site.weight, site.bias)
        weight, bias = (None if name is None else wide_array(getattr(module, name)) for name in names)
        gate = None if feed.gate is None else feed.gate.astype(np.float64)
        return reference(self._called[key].spec, feed.x.astype(np.float64), weight, bias, gate)

    @contextmanager
    def alone(self, keys: Iterable[Key]) -> Iterator[RunNorms]:
        """See `NormAccess.alone`."""

        def run(feeds: Mapping[Key, NormFeed]) -> dict[Key, NormResult]:
            results = {}
            for key, feed in feeds.items():
                module = self._modules[key[0]]
                device = next((t.device for t in module.parameters()), torch.device("cpu"))
                arguments = [to_torch(a).to(device) for a in (feed.x, feed.gate) if a is not None]
                with torch.no_grad():
                    results[key] = NormResult(to_numpy(module(*arguments)))
            return results

        del keys
        yield run

    def between(
        self, feeds: Mapping[str, Array], keys: list[Key], store: ActivationStore, sink: Sink, window: int | None
    ) -> dict[str, Array]:
        """See `NormAccess.between`; one run does for any number of norms, so the window is not needed."""
        del window

        def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
            key = (path, number)
            if key not in keys:
                return original()
            sink(key, "x", to_numpy(call.x))
            if call.gate is not None:
                sink(key, "gate", to_numpy(call.gate))
            _force(call, self._called[key], store)
            return to_torch(store.get(key, "fed_y")).to(call.x.device)

        return self._visited(feeds, visit)

    def trace(self, feeds: Mapping[str, Array], keys: list[Key], sink: Sink, window: int | None) -> dict[str, Array]:
        """See `NormAccess.trace`."""
        del window

        def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
            key = (path, number)
            if key in keys:
                sink(key, "x", to_numpy(call.x))
            y = original()
            if key in keys:
                sink(key, "y", to_numpy(y))
            return y

        return self._visited(feeds, visit)

    def _visited(self, feeds: Mapping[str, Array], visit: Any) -> dict[str, Array]:
        with at_norms(self._model, self._sites, visit):
            return self._runner.run(feeds)


def _force(call: NormCall, info: CalledNorm, store: ActivationStore) -> None:
    """Let the model go on with the store's x: in place, so that a residual stream goes on with it too."""
    if info.forced:
        call.x.copy_(to_torch(store.get(info.key, "fed_x")))


def _rounded(array: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        return array.astype(numpy_dtype(dtype))


def _distance(spec: NormSpec, own: Array, wanted: Array, excused: Array | float = 0.0) -> float:
    """The largest difference, in max(|wanted|, row RMS), of what is finite; less what is excused in its row."""
    axes = tuple(range(-spec.trailing_dims, 0))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scale = np.maximum(np.abs(wanted), np.sqrt(np.mean(wanted**2, axis=axes, keepdims=True)))
        off = np.abs(own.astype(np.float64) - wanted) / np.where(scale == 0.0, 1.0, scale) - excused
    return max(float(np.max(off, where=np.isfinite(off), initial=0.0)), 0.0)


def _disagreement(call: NormCall, own: Array, wanted: Array) -> float:
    """How far a norm's own code is from the reference; modules may resolve epsilon by the dtype, so that is let be."""
    spec = call.spec
    if not spec.eps:
        return _distance(spec, own, wanted)
    squares = wide_array(call.x) ** 2
    if spec.group_size is not None:
        squares = squares.reshape(*squares.shape[:-1], squares.shape[-1] // spec.group_size, spec.group_size)
    mean = np.mean(squares, axis=tuple(range(-spec.trailing_dims, 0)), keepdims=True)
    if spec.group_size is not None:
        mean = np.min(mean, axis=-2, initial=np.inf)  # the smallest group of a row feels epsilon most
    return _distance(spec, own, wanted, spec.eps / (mean + spec.eps))
