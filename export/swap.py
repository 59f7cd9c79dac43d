"""Swap every norm of a model for one node that carries its spec, and put everything back afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.eager import eager
from ..models.site import Recognition, Refusal, Site
from ..models.spec import NormSpec

# The node in a captured graph, before it is lowered. Its inputs are x, weight, bias, gate.
CAPTURE_DOMAIN = "rmsnorm_deploy.capture"
CAPTURE_OP = "Norm"


@dataclass(slots=True)
class SwapReport:
    """What happened while a swapped model ran.

    Attributes:
        differing: why the original forward was used at a module path after all.
    """

    differing: dict[str, str] = field(default_factory=dict)

    def refusals(self, recognition: Recognition) -> list[Refusal]:
        """The sites that turned out not to follow their spec in this model."""
        return [
            Refusal(site.path, site.class_name, self.differing[site.path])
            for site in recognition.sites
            if site.path in self.differing
        ]


@contextmanager
def swapped(model: nn.Module, sites: list[Site], *, check: bool = False) -> Iterator[SwapReport]:
    """Replace the forward of every site while the context is open.

    In PyTorch a swapped norm computes `eager(spec, ...)`; under `torch.export` it becomes one node of
    `rmsnorm_deploy.capture`. Parameters, hooks and submodules stay where they are.

    Args:
        model: the model that `sites` were recognised in.
        sites: the norms to swap.
        check: run the original forward beside each swapped one and record every site whose bits differ.
    """
    report = SwapReport()
    replaced: list[nn.Module] = []
    try:
        for site in sites:
            module = model.get_submodule(site.path)
            object.__setattr__(module, "forward", _replacement(module, site, report, check))
            replaced.append(module)
        yield report
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


def _replacement(module: nn.Module, site: Site, report: SwapReport, check: bool) -> Callable[..., Tensor]:
    original = module.forward
    signature = inspect.signature(original)
    names = list(signature.parameters)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        x = given.pop(names[0])
        gate = given.pop(names[1], None) if site.spec.gate != "none" else None
        others = sorted(name for name, value in given.items() if value is not None)
        if others or not isinstance(x, Tensor):
            report.differing.setdefault(site.path, f"it is called with {', '.join(others)}, which no spec covers")
            return original(*args, **kwargs)
        spec = site.spec if gate is not None else site.spec.replace(gate="none", activation="none")
        weight = getattr(module, site.weight) if site.weight else None
        bias = getattr(module, site.bias) if site.bias else None
        if torch.compiler.is_exporting():
            return _node(site, spec, x, weight, bias, gate)
        result = eager(spec, x, weight, bias, gate)
        if check and not _same(result, original(*args, **kwargs)):
            report.differing[site.path] = (
                f"as this model calls it (x {tuple(x.shape)} {x.dtype}"
                f"{f', weight {weight.dtype}' if weight is not None else ''}), its result is not the spec's"
            )
        return result

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _node(
    site: Site, spec: NormSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None
) -> Tensor:
    # The node says nothing of the width that the norm wants, so the capture has to be told.
    for dim, size in zip(x.shape[-len(site.width) :] if site.width else (), site.width or (), strict=True):
        torch._check(dim == size)
    dtype = x.dtype
    if weight is not None and spec.order != "scale_then_cast" and gate is None:
        dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.onnx.ops.symbolic(
        f"{CAPTURE_DOMAIN}::{CAPTURE_OP}",
        [x, weight, bias, gate],
        {"spec": spec.to_json(), "path": site.path},
        dtype=dtype,
        shape=x.shape,
        version=1,
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0.0), b.nan_to_num(0.0)
    )  # fmt: skip
