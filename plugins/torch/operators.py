"""The operators `rmsnorm_deploy::rms_norm` and `rmsnorm_deploy::add_rms_norm` of PyTorch.

Importing this module registers them. On CUDA tensors they run the fused kernel; for dtypes that it does not have, and
on other devices, they compute `eager` in PyTorch. They work in `torch.compile`, which sees one node, and in CUDA
graphs. They have no gradient. Autocast does not change what they compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

from ...models.eager import eager, result_dtype
from ...models.errors import RmsnormDeployError, UsageError
from ...models.spec import NormSpec
from .. import contract
from .device_kernels import run_on_device
from .kernel_choice import CASTS_FIRST, RowStrides, has_too_many_rows, kernel_for

# The form of a norm, as arguments of the operators: fields of NormSpec, and `scale_offset` for the kind of scale.
_FORM: Final = (
    "float eps=1e-06, *, str order='scale_then_cast', float scale_offset=0.0, bool offset_in_float32=True, "
    "str root='rsqrt', str statistics='float32'"
)
_RMS_NORM: Final = f"rms_norm(Tensor x, Tensor? weight=None, {_FORM}) -> Tensor"
_ADD_RMS_NORM: Final = f"add_rms_norm(Tensor x, Tensor residual, Tensor? weight=None, {_FORM}) -> (Tensor, Tensor)"
_LIBRARY: Final = torch.library.Library(contract.DOMAIN, "DEF")


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **form: Any) -> Tensor:
    """RMSNorm over the last dim, by the fused kernel on CUDA tensors; for inference.

    On CUDA the kernel is compiled with NVRTC at the first call for a width, its dtypes and its strides, which takes
    seconds; call it once before the capture of a CUDA graph. Rows may be strided, heads within a token too; other
    strides are copied first.

    Args:
        x: `[..., width]`, floating.
        weight: `[width]`; no scale if None.
        eps: added to the mean of squares.
        form: fields of NormSpec by name: `order` (`scale_then_cast` or `cast_then_scale`), `offset_in_float32`, `root`,
            `statistics`; and `scale_offset`, 1.0 for norms that multiply by 1 + weight.

    Returns:
        A contiguous tensor of x's shape. Where PyTorch computes, it has every bit of `eager`; the kernel rounds at the
        same places, and its float32 statistics may differ in the last bits.

    Raises:
        UsageError: an argument is wrong.
        RmsnormDeployError: an input requires a gradient; or the kernel cannot be compiled or launched.
    """
    return torch.ops.rmsnorm_deploy.rms_norm(x, weight, eps, **form)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **form: Any
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum, in one kernel on CUDA tensors.

    Args:
        x: `[..., width]`, floating.
        residual: x's shape; the sum has the dtype that PyTorch gives it.
        weight: as of `rms_norm`, like the following arguments.
        eps: added to the mean of squares.
        form: as of `rms_norm`.

    Returns:
        The normalized sum and the sum, both contiguous and of x's shape.

    Raises:
        UsageError: an argument is wrong.
        RmsnormDeployError: as of `rms_norm`.
    """
    return torch.ops.rmsnorm_deploy.add_rms_norm(x, residual, weight, eps, **form)


def form_of(spec: NormSpec) -> dict[str, Any]:
    """The arguments `form` with which the operators compute `spec`; its eps is an argument of its own."""
    names = ("order", "offset_in_float32", "root", "statistics")
    return {**{name: getattr(spec, name) for name in names}, "scale_offset": spec.scale_offset}


@functools.lru_cache(maxsize=1024)
def _spec(has_weight: bool, eps: float, scale_offset: float, **form: Any) -> NormSpec:
    if scale_offset not in contract.SCALE_OFFSETS:
        raise UsageError(f"scale_offset: expected 0 or 1, got {scale_offset}.")
    if scale_offset and not has_weight:
        raise UsageError("scale_offset: expected 0 for a norm without a weight, got 1. Give a weight.")
    spec = NormSpec(eps, scale="one_plus_weight" if scale_offset else "weight" if has_weight else "none", **form)
    if CASTS_FIRST[spec.order] is None:
        expected = " or ".join(order for order, first in CASTS_FIRST.items() if first is not None)
        raise UsageError(f"order: expected {expected}, got {spec.order}.")
    return spec


def _checked_spec(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, **form: Any) -> NormSpec:
    """The spec of a call, whose tensors must fit together."""
    if x.ndim < 1 or not x.is_floating_point():
        raise UsageError(f"x: expected a floating tensor of at least one dim, got {_described(x)}.")
    if residual is not None and (residual.shape != x.shape or not residual.is_floating_point()):
        raise UsageError(f"residual: expected a floating tensor like x, {_described(x)}, got {_described(residual)}.")
    if weight is not None and (weight.ndim != 1 or weight.shape[0] != x.shape[-1] or not weight.is_floating_point()):
        raise UsageError(f"weight: expected a floating tensor of shape [{x.shape[-1]}], got {_described(weight)}.")
    for name, tensor in (("residual", residual), ("weight", weight)):
        if tensor is not None and tensor.device != x.device:
            raise UsageError(f"{name}: expected a tensor on x's device, {x.device}, got one on {tensor.device}.")
    return _spec(weight is not None, eps, **form)


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _eager(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: NormSpec) -> tuple[Tensor, ...]:
    """Contiguous y, and the sum where there is a residual."""
    with _without_autocast(x.device):
        if residual is None:
            return (eager(spec, x, weight).contiguous(),)
        total = x + residual
        return eager(spec, total, weight).contiguous(), total.contiguous()


def _with_rows(tensor: Tensor) -> tuple[Tensor, RowStrides]:
    """The tensor, copied if the kernel could not find its rows."""
    found = RowStrides.of(tensor)
    return (tensor, found) if found else (tensor.contiguous(), RowStrides(1, tensor.shape[-1], 0))


def _in_equal_heads(rows: list[tuple[Tensor, RowStrides]]) -> list[tuple[Tensor, RowStrides]]:
    """The same rows, all counted in the same number of heads, as the kernel does."""
    heads = max(strides.heads for _, strides in rows)
    return [(tensor, strides.with_heads(heads)) for tensor, strides in rows]


def _fused(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: NormSpec) -> tuple[Tensor, ...]:
    """The same by the kernel, where it has these dtypes."""
    rows = _in_equal_heads([_with_rows(tensor) for tensor in (x, residual) if tensor is not None])
    kernel = kernel_for(
        spec,
        x.shape[-1],
        x.dtype,
        None if weight is None else weight.dtype,
        None if residual is None else residual.dtype,
        None if all(strides.is_contiguous(x.shape[-1]) for _, strides in rows) else rows[0][1].heads,
    )
    if kernel is None or has_too_many_rows(x) or torch.version.cuda is None:
        return _eager(x, residual, weight, spec)
    dtype = x.dtype if residual is None else residual.dtype
    outputs = [torch.empty(x.shape, dtype=dtype, device=x.device) for _ in rows]
    run_on_device(kernel, rows, None if weight is None else weight.contiguous(), outputs)
    return tuple(outputs)


def _fake(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: NormSpec) -> tuple[Tensor, ...]:
    total = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=result_dtype(spec, total, weight))
    return (y,) if residual is None else (y, x.new_empty(x.shape, dtype=total))


_Compute = Callable[[Tensor, Tensor | None, Tensor | None, NormSpec], tuple[Tensor, ...]]


def _rms_norm_by(compute: _Compute) -> Callable[..., Tensor]:
    def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **form: Any) -> Tensor:
        return compute(x, None, weight, _checked_spec(x, None, weight, eps, **{**_DEFAULTS, **form}))[0]

    return rms_norm


def _add_rms_norm_by(compute: _Compute) -> Callable[..., tuple[Tensor, ...]]:
    def add_rms_norm(
        x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **form: Any
    ) -> tuple[Tensor, ...]:
        return compute(x, residual, weight, _checked_spec(x, residual, weight, eps, **{**_DEFAULTS, **form}))

    return add_rms_norm


# What the dispatcher leaves out where an argument has its default.
_DEFAULTS: Final = {
    "order": "scale_then_cast", "scale_offset": 0.0, "offset_in_float32": True, "root": "rsqrt",
    "statistics": "float32",
}  # fmt: skip


def _no_gradient(name: str) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise RmsnormDeployError(
            f"rmsnorm_deploy::{name} is for inference and has no gradient, but an input requires one. Call the model "
            "under torch.no_grad() or torch.inference_mode()."
        )

    return refuse


def _register(schema: str, by: Callable[[_Compute], Callable[..., Any]]) -> None:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    qualified = f"{contract.DOMAIN}::{name}"
    _LIBRARY.impl(name, by(_eager), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, by(_fused), "CUDA")
    torch.library.register_fake(qualified, by(_fake), lib=_LIBRARY)
    refuse = _no_gradient(name)
    # The dispatcher sets the context up, and so refuses, exactly where a gradient is required.
    torch.library.register_autograd(qualified, refuse, setup_context=refuse, lib=_LIBRARY)


_register(_RMS_NORM, _rms_norm_by)
_register(_ADD_RMS_NORM, _add_rms_norm_by)
