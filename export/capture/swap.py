"""Swap every norm of a model for a single node that contains its spec, and restore the model afterwards."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...models.eager import eager, result_dtype
from ...models.recognition.conditions import call_conditions, changed_in_place, differs
from ...models.recognition.intercept import NormCall, replace_forward
from ...models.recognition.likeness import likeness
from ...models.recognition.site import Recognition, Refusal, Site
from ...models.recognition.state import Snapshot, UnwatchableError
from ..graph.captured_nodes import CAPTURE_DOMAIN, NORM_OP


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

    In PyTorch a swapped norm computes `eager(spec, ...)`, or with `check` its own forward once it differed. Under
    `torch.export` it becomes one node of
    `rmsnorm_deploy.capture`. Parameters, hooks and submodules are not changed.

    Args:
        model: the model in which `sites` were recognized.
        sites: the norms to swap.
        check: also run the original forward of each norm, and record every site whose bits differ, that changes its
            input or its state, or that differs when its input comes in other shapes, strides or grad modes.
    """
    report, variations = SwapReport(), _Variations()
    replaced: list[nn.Module] = []
    try:
        for site in sites:
            module = model.get_submodule(site.path)
            _swap(module, site, report, variations if check else None)
            replaced.append(module)
        yield report
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


class _Variations:
    """What norms do in other shapes and modes than those of their calls; equal calls of equal modules are run once."""

    def __init__(self) -> None:
        self._reasons: dict[Hashable, str | None] = {}

    def reason(self, module: nn.Module, site: Site, call: NormCall) -> str | None:
        """What differs from the spec when the module, unswapped, is called with x in other shapes and modes."""
        alike = likeness(module)
        tensors = [t for t in (call.x, call.weight, call.bias, call.gate) if t is not None]
        layout = tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors)
        key = (id(module), call.spec) if alike is None else (alike, call.spec, layout)
        if key not in self._reasons:
            self._reasons[key] = _checked_variations(module, site, call)
        return self._reasons[key]


def _swap(module: nn.Module, site: Site, report: SwapReport, variations: _Variations | None) -> None:
    def compute(call: NormCall, original: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_exporting():
            return _node(site, call)
        if site.path in report.differing:
            return _own_result(module, original)
        result = eager(call.spec, call.x, call.weight, call.bias, call.gate)
        if variations is not None:
            with _unswapped(module):
                reason, result = _checked_call(module, call, result, original)
                if reason is None:
                    reason = variations.reason(module, site, call)
            if reason is not None:
                report.differing[site.path] = reason
                return _own_result(module, original)
        return result

    def unknown(names: str) -> None:
        report.differing.setdefault(site.path, f"it is called with {names}, which no spec covers")

    replace_forward(module, site, compute, unknown)


@contextmanager
def _unswapped(module: nn.Module) -> Iterator[None]:
    """The module as it is without the swap, while the context is open."""
    forward = vars(module).pop("forward")
    try:
        yield
    finally:
        object.__setattr__(module, "forward", forward)


def _own_result(module: nn.Module, original: Callable[[], Tensor]) -> Tensor:
    """What the module itself returns, in its own dtype, which the modules after it may require; its state is kept."""
    with _unswapped(module):
        try:
            state = Snapshot(module)
        except UnwatchableError:
            return original()
        result = original()
        state.restore()
        return result


def _checked_call(
    module: nn.Module, call: NormCall, result: Tensor, original: Callable[[], Tensor]
) -> tuple[str | None, Tensor]:
    """What the original forward does otherwise than its spec in this call, or None; it runs, and is then undone.

    The tensor is the result with the strides that the forward gives it: later operators may round by these.
    """
    inputs = [t for t in (call.x, call.gate) if t is not None]
    before = [t.detach().clone() for t in inputs]
    try:
        state = Snapshot(module)
    except UnwatchableError as error:
        return str(error), result
    wanted = original()
    changed = [index for index, t in enumerate(inputs) if changed_in_place(before[index], t)]
    with torch.no_grad():
        for index in changed:
            inputs[index].data.copy_(before[index])
    name = state.changed()
    state.restore()
    if changed:
        return "it changes its input in place", result
    if name is not None:
        return f"its forward changes the state of the module ({name})", result
    if _same(result, wanted):
        return None, torch.empty_like(wanted).copy_(result)
    weight = f", weight {call.weight.dtype}" if call.weight is not None else ""
    return f"as this model calls it (x {tuple(call.x.shape)} {call.x.dtype}{weight}), it differs from its spec", result


def _checked_variations(module: nn.Module, site: Site, call: NormCall) -> str | None:
    """What differs from the spec when the norm is called with this input in other shapes, strides and grad modes."""
    forward = type(module).forward
    trailing = max(len(site.width or (0,)), call.weight.ndim if call.weight is not None else 0)
    weight, bias = (None if t is None else t.detach() for t in (call.weight, call.bias))
    for condition in call_conditions(call.x, trailing):
        x = condition.x.detach()
        # A gate has the shape of x; its values do not matter here.
        gates = []
        if call.gate is not None:
            gates = [torch.linspace(-3, 3, x.numel(), device=x.device).to(call.gate.dtype).reshape(x.shape)]
        state = Snapshot(module)
        reason = differs(
            condition,
            lambda x, gates=gates: forward(module, x, *gates),  # type: ignore[misc]
            lambda x, gates=gates: eager(call.spec, x, weight, bias, *gates),  # type: ignore[misc]
        )
        name = state.changed()
        state.restore()
        if name is not None:
            return f"{condition.name}, its forward changes the state of the module ({name})"
        if reason is not None:
            return reason
    return None


def _node(site: Site, call: NormCall) -> Tensor:
    # The node does not constrain the width of the norm, so this check does.
    x, spec = call.x, call.spec
    for dim, size in zip(x.shape[-len(site.width) :] if site.width else (), site.width or (), strict=True):
        torch._check(dim == size)
    return torch.onnx.ops.symbolic(
        f"{CAPTURE_DOMAIN}::{NORM_OP}",
        [x, call.weight, call.bias, call.gate],
        {"spec": spec.to_json(), "path": site.path, "width": "x".join(map(str, site.width or ()))},
        dtype=result_dtype(spec, x.dtype, call.weight, call.bias),
        shape=x.shape,
        version=1,
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0.0), b.nan_to_num(0.0)
    )  # fmt: skip
