"""Intercept the calls of recognized norms: read the arguments of forward, and run other code in its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..spec import NormSpec
from .site import Site


@dataclass(frozen=True, slots=True)
class NormCall:
    """One call of a norm.

    Attributes:
        spec: what this call computes: the site's spec, without the gate where the call passes none.
        x: the tensor to normalize.
        weight: the module's weight, or None.
        bias: the module's bias, or None.
        gate: the gate, or None.
    """

    spec: NormSpec
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None


def replace_forward(
    module: nn.Module,
    site: Site,
    compute: Callable[[NormCall, Callable[[], Tensor]], Tensor],
    unknown: Callable[[str], None],
) -> None:
    """Replace the module's forward by `compute`, under the same signature.

    `vars(module).pop("forward")` restores the original. Hooks, parameters and submodules are not changed.

    Args:
        module: the module of `site`.
        site: which tensors the norm reads, and what it computes.
        compute: gets the call and a function that runs the original forward on the same arguments.
        unknown: called with the names of arguments that no spec covers; the original forward runs then.
    """
    original = module.forward
    signature = inspect.signature(original)
    first, second = [*signature.parameters, "", ""][:2]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        x = given.pop(first)
        gate = given.pop(second, None) if site.spec.has_gate else None
        others = sorted(name for name, value in given.items() if value is not None)
        if others or not isinstance(x, Tensor):
            unknown(", ".join(others) or type(x).__name__)
            return original(*args, **kwargs)
        spec = site.spec if gate is not None else site.spec.replace(gate="none", activation="none")
        weight = getattr(module, site.weight) if site.weight else None
        bias = getattr(module, site.bias) if site.bias else None
        return compute(NormCall(spec, x, weight, bias, gate), lambda: original(*args, **kwargs))

    forward.__signature__ = signature  # type: ignore[attr-defined]
    object.__setattr__(module, "forward", forward)


# Called with a module's path, the number of earlier calls, the call, and a function that runs the original forward.
Visit = Callable[[str, int, NormCall, Callable[[], Tensor]], Tensor]


@contextmanager
def at_norms(
    model: nn.Module, sites: Sequence[Site], visit: Visit, unknown: Callable[[str, str], None] | None = None
) -> Iterator[None]:
    """Call `visit` in place of every norm while the context is open.

    Args:
        model: where the sites were recognized.
        sites: the norms.
        visit: returns the norm's result. A call that no spec covers runs the module itself and is not visited.
        unknown: called with the module's path and the names of arguments that no spec covers.
    """
    modules = {site.path: model.get_submodule(site.path) for site in sites}
    counts = dict.fromkeys(modules, 0)

    def visiting(path: str) -> Callable[[NormCall, Callable[[], Tensor]], Tensor]:
        def compute(call: NormCall, original: Callable[[], Tensor]) -> Tensor:
            number = counts[path]
            counts[path] += 1
            return visit(path, number, call, original)

        return compute

    def reporting(path: str) -> Callable[[str], None]:
        return lambda names: unknown(path, names) if unknown is not None else None

    try:
        for site in sites:
            replace_forward(modules[site.path], site, visiting(site.path), reporting(site.path))
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)
