"""Which dims of a model's inputs vary, and which only together, found by calls of the model (`measured_dims`).

torch makes every dim a symbol of its own and ties two where the model compares their sizes. It does not where the
model divides by one (`mask.view(batch, heads, -1, length)`) or compares one with a number that is an argument
(`height=3`), and the capture fails. There the dims are measured instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Axis = tuple[str, int]
# The other sizes, in the order in which they are tried; a model that cuts patches takes some multiples only.
_LONGER: tuple[Callable[[int], int], ...] = (lambda size: size + 1, lambda size: 2 * size)


@dataclass(slots=True)
class MeasuredDims:
    """The axes of a model's inputs, each as the name of the input and the axis.

    Attributes:
        fixed: axes at which the model fails in other sizes.
        tied: groups of axes of one size that vary together, and at which the model fails if only one varies.
    """

    fixed: list[Axis] = field(default_factory=list)
    tied: list[list[Axis]] = field(default_factory=list)

    def attempts(self) -> Iterator[MeasuredDims]:
        """What to try in a capture: the tied axes as one dim each, then fixed."""
        if self.fixed or self.tied:
            yield self
        if self.tied:
            yield MeasuredDims(sorted({*self.fixed, *(axis for group in self.tied for axis in group)}))

    def dynamic_shapes(self, automatic: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
        """`dynamic_shapes` for torch: the automatic dims of each input, and None for those that are fixed."""
        return {
            name: {axis: None if (name, axis) in self.fixed else dim for axis, dim in dims.items()}
            for name, dims in automatic.items()
        }

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Tell torch, while it traces, that the tied axes have one size; it then has one symbol for them."""
        for (first, axis), *others in self.tied:
            for name, other in others:
                torch._check(tensors[name].shape[other] == tensors[first].shape[axis])


def measured_dims(call: Callable[..., Any], tensors: Mapping[str, Tensor]) -> MeasuredDims:
    """Call a model at other sizes than those of its example inputs.

    Every axis is varied alone. Those of one size that fail are varied together, because a model may tie them: all,
    then the leading ones, then the others.

    Args:
        call: the model, called with the tensors by name.
        tensors: the example inputs.
    """
    by_size: dict[int, list[Axis]] = {}
    for name, tensor in tensors.items():
        for axis, size in enumerate(tensor.shape):
            by_size.setdefault(size, []).append((name, axis))
    found = MeasuredDims()
    for axes in by_size.values():
        left = axes
        for longer in _LONGER:
            left = [axis for axis in left if not _runs(call, tensors, [axis], longer)]
            for group in (axes, [axis for axis in axes if axis[1] == 0], [axis for axis in axes if axis[1]]):
                tied = [axis for axis in group if axis in left]
                if len(tied) > 1 and _runs(call, tensors, tied, longer):
                    found.tied.append(tied)
                    left = [axis for axis in left if axis not in tied]
        found.fixed += left
    return found


def _runs(
    call: Callable[..., Any], tensors: Mapping[str, Tensor], axes: list[Axis], longer: Callable[[int], int]
) -> bool:
    """Whether the model runs with these axes longer; their contents are repeated."""
    resized = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, axis in axes:
        old = resized[name].shape[axis]
        index = torch.arange(longer(old), device=resized[name].device) % max(1, old)
        resized[name] = resized[name].index_select(axis, index)
    try:
        with torch.no_grad():
            call(**resized)
    except Exception:  # the model's own code decides what it raises
        return False
    return True


def fixed_note(tensors: Mapping[str, Tensor], fixed: list[Axis]) -> str:
    """A note for the manifest on the axes that are fixed."""
    shown = ", ".join(f"{name} dim {axis} ({tensors[name].shape[axis]})" for name, axis in fixed)
    return f"these dims have the sizes of the example inputs, because the model does not take others: {shown}"
