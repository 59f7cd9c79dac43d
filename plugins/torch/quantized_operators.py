"""The operators `rmsnorm_deploy::rms_norm_quantized` and `rmsnorm_deploy::add_rms_norm_quantized` of PyTorch.

Importing this module registers them. They are as the operators of `operators`, with y quantized to int8 or e4m3 by the
kernel that computes it. Each has two overloads: `default`, which returns the scale of each row behind y, and `static`,
which requires `scale` and so does not return it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from ...models.errors import UsageError
from .call import FORM, Call, spec_of_form
from .quantize import quantized_name
from .registration import Compute, register

_BY_ROW: Final = f"Tensor? weight=None, float eps=1e-06, *, ScalarType dtype, {FORM}"
_STATIC: Final = f"Tensor? weight, float eps, Tensor scale, *, ScalarType dtype, {FORM}"
_SCHEMAS: Final = (
    f"rms_norm_quantized(Tensor x, {_BY_ROW}) -> (Tensor, Tensor)",
    f"rms_norm_quantized.static(Tensor x, {_STATIC}) -> Tensor",
)
_ADD_SCHEMAS: Final = (
    f"add_rms_norm_quantized(Tensor x, Tensor residual, {_BY_ROW}) -> (Tensor, Tensor, Tensor)",
    f"add_rms_norm_quantized.static(Tensor x, Tensor residual, {_STATIC}) -> (Tensor, Tensor)",
)
# Arguments of `rms_norm` that these operators do not have; `form_of` gives them for every spec.
_LACKING: Final = ("gate", "gate_place", "activation", "group_size")


def rms_norm_quantized(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.int8,
    **form: Any,
) -> tuple[Tensor, Tensor]:
    """`rms_norm`, quantized in the same kernel on CUDA tensors; for inference.

    y is rounded to its own dtype, as `rms_norm` returns it; then y / scale, in float32, is rounded to the nearest value
    of the quantized dtype, ties to even. Out of range it saturates: int8 at -128 and 127, e4m3 at -448 and 448. NaN
    becomes 0 in int8 and stays NaN in e4m3.

    Args:
        x: `[..., width]`, floating, of at least one element a row.
        weight: `[width]`; no scale if None.
        eps: added to the mean of squares.
        scale: one float32 element on x's device, of any shape, by which all of y is divided. None for one of each row:
            its largest absolute value / 127 in int8 or 448 in e4m3, and 1 where all are 0. The largest passes over NaN;
            if it is infinite, so is the scale, and y / scale is NaN where y is infinite and 0 elsewhere.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        form: as of `rms_norm`: `order`, `scale_offset`, `offset_in_float32`, `root` and `statistics`; there are no
            groups and no gate.

    Returns:
        y of x's shape in `dtype`, contiguous, and the scale that was used: the given one, or float32 `[..., 1]`.
        y * scale is near what `rms_norm` returns. Where PyTorch computes, quantization has every bit of the kernel's.

    Raises:
        UsageError: an argument is wrong.
        RmsnormDeployError: an input requires a gradient; or the kernel cannot be compiled or launched.
    """
    operator, form = torch.ops.rmsnorm_deploy.rms_norm_quantized, _checked(dtype, form)
    if scale is None:
        y, rows = operator.default(x, weight, eps, dtype=dtype, **form)
        return y, rows
    return operator.static(x, weight, eps, scale, dtype=dtype, **form), scale


def add_rms_norm_quantized(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.int8,
    **form: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_quantized` of x + residual, and that sum, in one kernel on CUDA tensors.

    Args:
        x: `[..., width]`, floating, of at least one element a row.
        residual: x's shape; the sum has the dtype that PyTorch gives it, and is not quantized.
        weight: as of `rms_norm_quantized`, like the following arguments.
        eps: added to the mean of squares.
        scale: one float32 element, or None for one of each row.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        form: as of `rms_norm_quantized`.

    Returns:
        The quantized y, the scale that was used, and the sum; y and the sum have x's shape.

    Raises:
        UsageError: an argument is wrong.
        RmsnormDeployError: as of `rms_norm_quantized`.
    """
    operator, form = torch.ops.rmsnorm_deploy.add_rms_norm_quantized, _checked(dtype, form)
    if scale is None:
        y, rows, total = operator.default(x, residual, weight, eps, dtype=dtype, **form)
        return y, rows, total
    y, total = operator.static(x, residual, weight, eps, scale, dtype=dtype, **form)
    return y, scale, total


def _checked(dtype: torch.dtype, form: dict[str, Any]) -> dict[str, Any]:
    """The form without what these operators lack."""
    quantized_name(dtype)
    for name in _LACKING:
        value = form.get(name)
        if isinstance(value, Tensor) or value not in (None, "none"):
            got = "a tensor" if isinstance(value, Tensor) else value
            raise UsageError(f"{name}: expected none, as quantized norms have no groups and no gate, got {got}.")
    return {name: value for name, value in form.items() if name not in _LACKING}


def _quantized_by(compute: Compute) -> Callable[..., Any]:
    def rms_norm_quantized(
        x: Tensor,
        weight: Tensor | None = None,
        eps: float = 1e-6,
        scale: Tensor | None = None,
        *,
        dtype: torch.dtype,
        **form: Any,
    ) -> Any:
        spec = spec_of_form(weight is not None, False, eps, form)
        outputs = compute(Call(x, weight, spec, quantized=dtype, scale=scale))
        return outputs if scale is None else outputs[0]

    return rms_norm_quantized


def _add_quantized_by(compute: Compute) -> Callable[..., tuple[Tensor, ...]]:
    def add_rms_norm_quantized(
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None = None,
        eps: float = 1e-6,
        scale: Tensor | None = None,
        *,
        dtype: torch.dtype,
        **form: Any,
    ) -> tuple[Tensor, ...]:
        spec = spec_of_form(weight is not None, False, eps, form)
        y, total, *rows = compute(Call(x, weight, spec, residual, quantized=dtype, scale=scale))
        return (y, *rows, total)

    return add_rms_norm_quantized


for _schema in _SCHEMAS:
    register(_schema, _quantized_by)
for _schema in _ADD_SCHEMAS:
    register(_schema, _add_quantized_by)
