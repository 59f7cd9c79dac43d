"""The operators `rmsnorm_deploy::rms_norm` and `rmsnorm_deploy::add_rms_norm` of PyTorch.

Importing this module registers them. On CUDA tensors they run the fused kernel; for dtypes that it does not have, and
on other devices, they compute `eager` in PyTorch. They work in `torch.compile`, which sees one node, and in CUDA
graphs. They have no gradient. Autocast does not change what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from ...models.spec import NormSpec
from .call import FORM, Call, spec_of_form
from .registration import Compute, register

_FORM: Final = f"{FORM}, int? group_size=None"
_RMS_NORM: Final = (
    f"rms_norm(Tensor x, Tensor? weight=None, float eps=1e-06, Tensor? gate=None, *, {_FORM}, "
    "str gate_place='none', str activation='none') -> Tensor"
)
_ADD_RMS_NORM: Final = (
    f"add_rms_norm(Tensor x, Tensor residual, Tensor? weight=None, float eps=1e-06, *, {_FORM}) -> (Tensor, Tensor)"
)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, gate: Tensor | None = None, **form: Any
) -> Tensor:
    """RMSNorm over the last dim, by the fused kernel on CUDA tensors; for inference.

    On CUDA the kernel is compiled with NVRTC at the first call for a width, its dtypes and its strides, which takes
    seconds; call it once before the capture of a CUDA graph. Rows may be strided, heads within a token too; other
    strides are copied first.

    Args:
        x: `[..., width]`, floating.
        weight: `[width]`; no scale if None.
        eps: added to the mean of squares.
        gate: x's shape, floating; no gate if None. PyTorch computes what has one of a wider dtype than x.
        form: fields of NormSpec by name: `order` (`scale_then_cast` or `cast_then_scale`), `offset_in_float32`, `root`,
            `statistics`, `group_size` (a divisor of the width: each group is normalized alone); `scale_offset`, 1.0
            for norms that multiply by 1 + weight; and with a gate `gate_place` (whether it multiplies `before` or
            `after` the norm) and `activation` (`silu` or `sigmoid`).

    Returns:
        A contiguous tensor of x's shape. Where PyTorch computes, it has every bit of `eager`; the kernel rounds at the
        same places, and its float32 statistics may differ in the last bits.

    Raises:
        UsageError: an argument is wrong.
        RmsnormDeployError: an input requires a gradient; or the kernel cannot be compiled or launched.
    """
    return torch.ops.rmsnorm_deploy.rms_norm(x, weight, eps, gate, **form)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **form: Any
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum, in one kernel on CUDA tensors.

    Args:
        x: `[..., width]`, floating.
        residual: x's shape; the sum has the dtype that PyTorch gives it.
        weight: as of `rms_norm`, like the following arguments.
        eps: added to the mean of squares.
        form: as of `rms_norm`, without a gate.

    Returns:
        The normalized sum and the sum, both contiguous and of x's shape.

    Raises:
        UsageError: an argument is wrong.
        RmsnormDeployError: as of `rms_norm`.
    """
    return torch.ops.rmsnorm_deploy.add_rms_norm(x, residual, weight, eps, **form)


def form_of(spec: NormSpec) -> dict[str, Any]:
    """The arguments `form` with which the operators compute `spec`; its eps is an argument of its own."""
    names = ("order", "offset_in_float32", "root", "statistics", "group_size")
    gate = {"gate_place": spec.gate, "activation": spec.activation} if spec.has_gate else {}
    return {**{name: getattr(spec, name) for name in names}, "scale_offset": spec.scale_offset, **gate}


def _rms_norm_by(compute: Compute) -> Callable[..., Tensor]:
    def rms_norm(
        x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, gate: Tensor | None = None, **form: Any
    ) -> Tensor:
        spec = spec_of_form(weight is not None, gate is not None, eps, form)
        return compute(Call(x, weight, spec, gate=gate))[0]

    return rms_norm


def _add_rms_norm_by(compute: Compute) -> Callable[..., tuple[Tensor, ...]]:
    def add_rms_norm(
        x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **form: Any
    ) -> tuple[Tensor, ...]:
        spec = spec_of_form(weight is not None, False, eps, form)
        return compute(Call(x, weight, spec, residual=residual))

    return add_rms_norm


register(_RMS_NORM, _rms_norm_by)
register(_ADD_RMS_NORM, _add_rms_norm_by)
