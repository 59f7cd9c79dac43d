"""Swap every norm of a model for a single node that contains its spec, and restore the model afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...models.eager import eager
from ...models.recognition.intercept import NormCall, replace_forward
from ...models.recognition.site import Recognition, Refusal, Site

# The node of a norm in a captured graph, before lowering. Its inputs are x, weight, bias, gate.
CAPTURE_DOMAIN = "rmsnorm_deploy.capture"
CAPTURE_OP = "Norm"


@dataclass(slots=True)
class SwapReport:
    """Which norms of a swapped model did not follow their spec while it ran.

    Attributes:
        differing: the reason, by module path.
    """

    differing: dict[str, str] = field(default_factory=dict)

    def refusals(self, recognition: Recognition) -> list[Refusal]:
        """A refusal for each site that did not follow its spec."""
        return [
            Refusal(site.path, site.class_name, self.differing[site.path])
            for site in recognition.sites
            if site.path in self.differing
        ]


@contextmanager
def swapped(model: nn.Module, sites: list[Site], *, check: bool = False) -> Iterator[SwapReport]:
    """Replace the forward of every site while the context is open.

    In PyTorch a swapped norm computes `eager(spec, ...)`; under `torch.export` it becomes one node of
    `rmsnorm_deploy.capture`. Parameters, hooks and submodules are not changed.

    Args:
        model: the model in which `sites` were recognized.
        sites: the norms to swap.
        check: also run the original forward of each norm, and record every site whose bits differ.
    """
    report = SwapReport()
    replaced: list[nn.Module] = []
    try:
        for site in sites:
            module = model.get_submodule(site.path)
            _swap(module, site, report, check)
            replaced.append(module)
        yield report
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


def _swap(module: nn.Module, site: Site, report: SwapReport, check: bool) -> None:
    def compute(call: NormCall, original: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_exporting():
            return _node(site, call)
        result = eager(call.spec, call.x, call.weight, call.bias, call.gate)
        if check and not _same(result, original()):
            weight = f", weight {call.weight.dtype}" if call.weight is not None else ""
            report.differing[site.path] = (
                f"as this model calls it (x {tuple(call.x.shape)} {call.x.dtype}{weight}), it differs from its spec"
            )
        return result

    def unknown(names: str) -> None:
        report.differing.setdefault(site.path, f"it is called with {names}, which no spec covers")

    replace_forward(module, site, compute, unknown)


def _node(site: Site, call: NormCall) -> Tensor:
    # The node does not constrain the width of the norm, so this check does.
    x, spec = call.x, call.spec
    for dim, size in zip(x.shape[-len(site.width) :] if site.width else (), site.width or (), strict=True):
        torch._check(dim == size)
    dtype = x.dtype
    if call.weight is not None and spec.follows_weight and call.gate is None:
        dtype = torch.promote_types(x.dtype, call.weight.dtype)
    return torch.onnx.ops.symbolic(
        f"{CAPTURE_DOMAIN}::{CAPTURE_OP}",
        [x, call.weight, call.bias, call.gate],
        {"spec": spec.to_json(), "path": site.path, "width": "x".join(map(str, site.width or ()))},
        dtype=dtype,
        shape=x.shape,
        version=1,
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0.0), b.nan_to_num(0.0)
    )  # fmt: skip
