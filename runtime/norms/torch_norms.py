"""`NormAccess` for a PyTorch model (`TorchNorms`), and the norms that a run calls (`survey_norms`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...models.dtypes import numpy_dtype, torch_name
from ...models.recognition.intercept import NormCall, at_norms
from ...models.recognition.site import Recognition
from ...models.reference import reference
from ...models.spec import NormSpec
from ..accuracy.errors import errors_of, row_scale_error
from ..accuracy.float_formats import format_of
from ..runners.base import Array, Runner
from ..runners.torch import to_numpy, to_torch
from .access import CalledNorm, Formula, NormDtypes, NormFeed, NormResult, RecordedNorm, RunNorms, Sink, Sources
from .activation_store import ActivationStore, Key
from .float64_model import exact, wide_array

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Survey:
    """One run of a PyTorch model: the norms that it called, in order of execution, and its outputs."""

    called: dict[Key, CalledNorm]
    outputs: dict[str, Array]


def survey_norms(model: nn.Module, runner: Runner, recognition: Recognition, feeds: Mapping[str, Array]) -> Survey:
    """Run a model once and record every call of a norm.

    Args:
        model: the module, in eval mode.
        runner: a runner of the module.
        recognition: its norms.
        feeds: its inputs.
    """
    called: dict[Key, CalledNorm] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
        x, y = call.x, original()
        forced = 0 not in x.stride() and x.untyped_storage().data_ptr() not in own
        gate = None if call.gate is None else torch_name(call.gate.dtype)
        off = _distance(call.spec, to_numpy(y), exact(call))
        called[path, number] = CalledNorm(
            (path, number), call.spec, tuple(x.shape), torch_name(x.dtype), torch_name(y.dtype), gate, forced, off
        )
        return y

    with at_norms(model, recognition.sites, visit):
        outputs = runner.run(feeds)
    return Survey(called, outputs)


class TorchNorms:
    """The norms of a PyTorch model; see `NormAccess`.

    Args:
        model: the module, in eval mode.
        runner: a runner of the module.
        recognition: its norms.
        called: the norms that `survey_norms` recorded.
        deployed: the same norms in the dtypes of a candidate, to which values at the norms are rounded; `called` if
            None.
    """

    def __init__(
        self,
        model: nn.Module,
        runner: Runner,
        recognition: Recognition,
        called: Mapping[Key, CalledNorm],
        deployed: Mapping[Key, CalledNorm] | None = None,
    ) -> None:
        self._model, self._runner, self._called = model, runner, called
        self.deployed = called if deployed is None else deployed
        self._sites = recognition.sites
        self._by_path = {site.path: site for site in self._sites}
        self._modules = {site.path: model.get_submodule(site.path) for site in self._sites}

    @property
    def keys(self) -> list[Key]:
        """The norms that the survey recorded, in order of execution."""
        return list(self._called)

    @property
    def problems(self) -> Mapping[str, str]:
        """Always empty: every recognized norm can be accessed."""
        return {}

    @property
    def remarks(self) -> list[str]:
        """Always empty: norms run in the model itself."""
        return []

    @property
    def unused(self) -> frozenset[Key]:
        """Always empty: in PyTorch it is unknown which modules read a result."""
        return frozenset()

    @property
    def recorded(self) -> Mapping[Key, RecordedNorm]:
        """Always empty: the norms are modules."""
        return {}

    def formula(self, key: Key) -> Formula:
        """See `NormAccess.formula`."""
        site, module, call = self._by_path[key[0]], self._modules[key[0]], self._called[key]
        names = (site.weight, site.bias)
        weight, bias = (None if name is None else to_numpy(getattr(module, name)) for name in names)
        return Formula(call.spec, call.x_dtype, weight, bias)

    def dtypes(self, key: Key) -> NormDtypes:
        """See `NormAccess.dtypes`."""
        norm = self._called[key]
        return NormDtypes(norm.x_dtype, norm.y_dtype, norm.gate_dtype)

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        """The norm that ran before the end: in PyTorch the actual inputs of a segment are unknown."""
        at = keys.index(end) if not isinstance(end, str) else len(keys)
        return Sources(keys[max(at - 1, 0) : at])

    def trace_reference(self, feeds: Mapping[str, Array], keys: list[Key], sink: Sink) -> dict[str, Array]:
        """Like `trace`, but every norm is replaced by the float64 reference; call it inside `in_float64`."""

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
        """Run in float64, and round each norm's values to the dtypes of the deployed model.

        Call it inside `in_float64`. For each norm the store receives its inputs (`x`, `gate`) and its result (`y`) in
        float64, and all three rounded (`fed_x`, ...). The model continues with the rounded x and y: every segment
        starts from values that the deployment dtype represents exactly, so its reference is exact.

        Returns:
            The outputs, computed from the last norms' rounded values; and for each norm the difference between its own
            code in float64 and the reference, in max(|reference|, row RMS), less what its epsilon could explain.
        """
        disagreements: dict[Key, float] = {}

        def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
            key = (path, number)
            info = self.deployed[key]
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

        modules = {key: self._modules[key[0]] for key in keys}

        def run(feeds: Mapping[Key, NormFeed]) -> dict[Key, NormResult]:
            results = {}
            for key, module in modules.items():
                feed, own = feeds[key], self._called[key]
                same = self.deployed[key] == own
                device = next((t.device for t in module.parameters()), torch.device("cpu"))
                given = ((feed.x, own.x_dtype), (feed.gate, own.gate_dtype))
                arguments = [to_torch(a if same else _cast(a, dtype)).to(device) for a, dtype in given if a is not None]
                with torch.no_grad():
                    results[key] = NormResult(to_numpy(module(*arguments)))
            return results

        yield run

    def between(
        self, feeds: Mapping[str, Array], keys: list[Key], store: ActivationStore, sink: Sink
    ) -> dict[str, Array]:
        """See `NormAccess.between`; a single run is enough for any number of norms."""

        def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
            key = (path, number)
            if key not in keys:
                return original()
            sink(key, "x", to_numpy(call.x))
            if call.gate is not None:
                sink(key, "gate", to_numpy(call.gate))
            _force(call, self._called[key], store)
            return to_torch(_cast(store.get(key, "fed_y"), self._called[key].y_dtype)).to(call.x.device)

        return self._visited(feeds, visit)

    def trace(self, feeds: Mapping[str, Array], keys: list[Key], sink: Sink) -> dict[str, Array]:
        """See `NormAccess.trace`."""

        def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
            key = (path, number)
            if key in keys:
                sink(key, "x", to_numpy(call.x))
                if call.gate is not None:
                    sink(key, "gate", to_numpy(call.gate))
            y = original()
            if key in keys:
                sink(key, "y", to_numpy(y))
            return y

        return self._visited(feeds, visit)

    def _visited(self, feeds: Mapping[str, Array], visit: Any) -> dict[str, Array]:
        with at_norms(self._model, self._sites, visit):
            return self._runner.run(feeds)


def _force(call: NormCall, info: CalledNorm, store: ActivationStore) -> None:
    """Replace x by the store's x, in place, so that the residual stream changes too."""
    if info.forced:
        call.x.copy_(to_torch(store.get(info.key, "fed_x")))


def _rounded(array: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        return array.astype(numpy_dtype(dtype))


def _cast(array: Array, dtype: str | None) -> Array:
    """The array in PyTorch's own dtype, where a candidate has another one."""
    return array if dtype is None else array.astype(numpy_dtype(dtype), copy=False)


def _distance(spec: NormSpec, own: Array, wanted: Array, excused: Array | float = 0.0) -> float:
    """The largest difference in the finite elements of `own`, in eps(own's dtype) x max(|wanted|, row RMS).

    Args:
        spec: specifies how many trailing dims are a row.
        own: a norm's result.
        wanted: the reference, of the same shape.
        excused: a difference in the same units, by row, that is subtracted.
    """
    width = math.prod(own.shape[own.ndim - spec.trailing_dims :])
    units = row_scale_error(errors_of(own, wanted, None), width, format_of(own.dtype)).reshape(own.shape) - excused
    counts = np.isfinite(own) & ~np.isnan(units)
    return max(float(np.max(units, where=counts, initial=0.0)), 0.0)


def _disagreement(call: NormCall, own: Array, wanted: Array) -> float:
    """The difference between a norm's own float64 result and the reference, in max(|wanted|, row RMS).

    Modules may take epsilon from their dtype, so a difference that another epsilon could explain is subtracted.
    """
    spec, eps = call.spec, float(np.finfo(np.float64).eps)
    if not spec.eps:
        return eps * _distance(spec, own, wanted)
    squares = wide_array(call.x) ** 2
    if spec.group_size is not None:
        squares = squares.reshape(*squares.shape[:-1], squares.shape[-1] // spec.group_size, spec.group_size)
    mean = np.mean(squares, axis=tuple(range(-spec.trailing_dims, 0)), keepdims=True)
    if spec.group_size is not None:
        mean = np.min(mean, axis=-2, initial=np.inf)  # epsilon affects the smallest group of a row most
    return eps * _distance(spec, own, wanted, spec.eps / (mean + spec.eps) / eps)
