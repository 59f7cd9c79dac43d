"""The float64 truth of a model: the model itself, computing in float64 from end to end while a context is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.calls import NormCall, replace_forward
from ..models.experts import experts
from ..models.reference import reference
from ..models.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .runner import Array

_WIDE: dict[torch.dtype, torch.dtype] = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}

Visit = Callable[[str, int, NormCall, Callable[[], "Tensor"]], "Tensor"]


class _NoNarrowing(TorchDispatchMode):
    """Every request for a narrower floating-point dtype becomes one for float64.

    Models cast to float32 wherever they fear for half types (softmax, rotary embedding, routers, logits); in a widened
    copy these casts would throw away what the truth is for.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = tuple(_WIDE.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        named = {k: _WIDE.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named)


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Let `model` compute in float64 while the context is open; afterwards it holds its own tensors again.

    Parameters and buffers are widened in place, so the peak is the model and its float64 values, not a second model
    beside them. Casts to narrower dtypes inside the model stay in float64. Norms still run their own code: see
    `at_norms` and `exactly`.

    Args:
        model: in the deployment dtype, in eval mode.
    """
    owners: list[tuple[Tensor, Tensor]] = []
    widened: dict[tuple[Any, ...], Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(experts(model, "eager"))  # grouped products exist in float32 only
        try:
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.dtype in _WIDE:
                    held = tensor.data
                    key = (held.data_ptr(), tuple(held.shape), held.stride(), held.dtype)
                    if key not in widened or not held.numel():
                        widened[key] = held.to(_WIDE[held.dtype])
                    owners.append((tensor, held))
                    tensor.data = widened[key]
            widened.clear()
            stack.enter_context(_NoNarrowing())
            yield
        finally:
            for tensor, held in owners:
                tensor.data = held


@contextmanager
def at_norms(model: nn.Module, sites: Sequence[Site], visit: Visit) -> Iterator[None]:
    """Let `visit` answer for every norm while the context is open.

    Args:
        model: where the sites were recognised.
        sites: the norms.
        visit: called with the module's path, how often this norm was called before in the context, the call, and a
            function that runs the module's own code; returns the norm's result. A call that no spec covers goes to
            the module and is not visited.
    """
    modules = {site.path: model.get_submodule(site.path) for site in sites}
    counts = dict.fromkeys(modules, 0)

    def visiting(path: str) -> Callable[[NormCall, Callable[[], Tensor]], Tensor]:
        def compute(call: NormCall, original: Callable[[], Tensor]) -> Tensor:
            number = counts[path]
            counts[path] += 1
            return visit(path, number, call, original)

        return compute

    try:
        for site in sites:
            replace_forward(modules[site.path], site, visiting(site.path), _ignore)
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)


def exact(call: NormCall) -> Array:
    """The float64 reference of one call: float64 of x's shape, from the values that the call holds."""
    gate, weight, bias = (None if t is None else wide_array(t) for t in (call.gate, call.weight, call.bias))
    return reference(call.spec, wide_array(call.x), weight, bias, gate)


def exactly(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
    """A visit in which every norm computes the float64 reference, which shares no code with any lowering."""
    del path, number, original
    return torch.from_numpy(exact(call)).to(call.x.device)


def wide_array(tensor: Tensor) -> Array:
    """A tensor's values in float64, in host memory."""
    return tensor.detach().to("cpu", torch.float64).numpy()


def _ignore(names: str) -> None:
    """A call that no spec covers runs the module's own code."""
