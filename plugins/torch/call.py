"""A call of the operators: its checks, and its result in PyTorch, by the kernel, and without values.

All operators compute these three, which return y, the sum where there is a residual, and the scale of each row where y
is quantized by them: the kernel's order.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, get_args

import torch
from torch import Tensor

from ...models.eager import eager, result_dtype
from ...models.errors import UsageError
from ...models.spec import Activation, Gate, NormSpec, Scale
from .. import contract
from ..kernel.norm_kernel import Quantization, Quantized
from .device_kernels import LaunchTensors, run_on_device
from .kernel_choice import CASTS_FIRST, RowStrides, has_too_many_rows, kernel_for
from .quantize import quantize, quantized_name

# The form of a norm, as arguments of every operator: fields of NormSpec, and `scale_offset` for the kind of scale.
FORM: Final = (
    "str order='scale_then_cast', float scale_offset=0.0, bool offset_in_float32=True, str root='rsqrt', "
    "str statistics='float32'"
)
# What the dispatcher leaves out where an argument has its default, and what only some operators have.
_DEFAULTS: Final = {
    "order": "scale_then_cast", "scale_offset": 0.0, "offset_in_float32": True, "root": "rsqrt",
    "statistics": "float32", "group_size": None, "gate_place": "none", "activation": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """The tensors of a call, and what it computes.

    Attributes:
        x: `[..., width]`.
        weight: `[width]`, or None.
        spec: what to compute.
        residual: x's shape, or None.
        gate: x's shape, or None.
        quantized: dtype of a quantized y; None if y keeps its dtype.
        scale: of a quantized y, one float32 element; None for one of each row, which is an output.

    Raises:
        UsageError: the tensors and the form do not fit together.
    """

    x: Tensor
    weight: Tensor | None
    spec: NormSpec
    residual: Tensor | None = None
    gate: Tensor | None = None
    quantized: torch.dtype | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        x, weight = self.x, self.weight
        if x.ndim < 1 or not x.is_floating_point():
            raise UsageError(f"x: expected a floating tensor of at least one dim, got {described(x)}.")
        for name, tensor in (("residual", self.residual), ("gate", self.gate)):
            if tensor is not None and (tensor.shape != x.shape or not tensor.is_floating_point()):
                raise UsageError(f"{name}: expected a floating tensor like x, {described(x)}, got {described(tensor)}.")
        if weight is not None and (
            weight.ndim != 1 or weight.shape[0] != x.shape[-1] or not weight.is_floating_point()
        ):
            raise UsageError(f"weight: expected a floating tensor of shape [{x.shape[-1]}], got {described(weight)}.")
        for name, tensor in (
            ("residual", self.residual),
            ("weight", weight),
            ("gate", self.gate),
            ("scale", self.scale),
        ):
            if tensor is not None and tensor.device != x.device:
                raise UsageError(f"{name}: expected a tensor on x's device, {x.device}, got one on {tensor.device}.")
        group = self.spec.group_size
        if group is not None and x.shape[-1] % group:
            raise UsageError(f"group_size: expected a divisor of x's last dim, {x.shape[-1]}, got {group}.")
        self._check_quantization()

    def _check_quantization(self) -> None:
        if self.quantized is None:
            return
        quantized_name(self.quantized)
        if self.x.shape[-1] == 0:
            raise UsageError(f"x: expected at least one element a row to quantize, got {described(self.x)}.")
        scale = self.scale
        if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
            raise UsageError(f"scale: expected one float32 element, got {described(scale)}.")

    @property
    def groups(self) -> int:
        """Parts of x's last dim that are each normalized alone."""
        return 1 if self.spec.group_size is None else self.x.shape[-1] // self.spec.group_size

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of what is normalized: x, or its sum with the residual."""
        return self.x.dtype if self.residual is None else torch.promote_types(self.x.dtype, self.residual.dtype)

    @property
    def quantization(self) -> tuple[Quantized, Quantization]:
        """Dtype and scale of a quantized y, as the kernel names them."""
        if self.quantized is None:
            return "none", "none"
        return quantized_name(self.quantized), "per_row" if self.scale is None else "static"

    def outputs(self, y: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every output in the kernel's order, where a y that is not quantized has this dtype."""
        shape = tuple(self.x.shape)
        found = [(shape, self.quantized or y)]
        if self.residual is not None:
            found.append((shape, self.sum_dtype))
        if self.quantized is not None and self.scale is None:
            found.append(((*shape[:-1], 1), torch.float32))
        return found


def spec_of_form(has_weight: bool, has_gate: bool, eps: float, form: dict[str, Any]) -> NormSpec:
    """The spec of a call.

    Args:
        has_weight: whether there is a weight.
        has_gate: whether there is a gate.
        eps: added to the mean of squares.
        form: arguments of the operator by name; those that are missing have their default.

    Raises:
        UsageError: the operators do not have this form.
    """
    return _spec(has_weight, has_gate, eps, **{**_DEFAULTS, **form})


@functools.lru_cache(maxsize=1024)
def _spec(
    has_weight: bool,
    has_gate: bool,
    eps: float,
    scale_offset: float,
    gate_place: Gate,
    activation: Activation,
    **form: Any,
) -> NormSpec:
    if scale_offset not in contract.SCALE_OFFSETS:
        raise UsageError(f"scale_offset: expected 0 or 1, got {scale_offset}.")
    if scale_offset and not has_weight:
        raise UsageError("scale_offset: expected 0 for a norm without a weight, got 1. Give a weight.")
    for name, given, members in (("gate_place", gate_place, Gate), ("activation", activation, Activation)):
        expected = get_args(members)[1:] if has_gate else ("none",)
        if given not in expected:
            problem = f"{name}: expected {' or '.join(expected)} for a norm with{'' if has_gate else 'out'} a gate"
            raise UsageError(f"{problem}, got {given}.")
    scale: Scale = "one_plus_weight" if scale_offset else "weight" if has_weight else "none"
    spec = NormSpec(eps, scale=scale, gate=gate_place, activation=activation, **form)
    if CASTS_FIRST[spec.order] is None:
        expected = tuple(order for order, first in CASTS_FIRST.items() if first is not None)
        raise UsageError(f"order: expected {' or '.join(expected)}, got {spec.order}.")
    return spec


def described(tensor: Tensor) -> str:
    """Shape and dtype, for messages."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def eager_result(call: Call) -> tuple[Tensor, ...]:
    """The result in PyTorch, contiguous."""
    with _without_autocast(call.x.device):
        total = call.x if call.residual is None else call.x + call.residual
        y = eager(call.spec, total, call.weight, gate=call.gate).contiguous()
        sums = () if call.residual is None else (total.contiguous(),)
        if call.quantized is None:
            return (y, *sums)
        y, scale = quantize(y, call.quantized, call.scale)
        return (y, *sums, *(() if call.scale is not None else (scale,)))


def _with_rows(tensor: Tensor, groups: int = 1) -> tuple[Tensor, RowStrides]:
    """The tensor, copied if the kernel could not find the groups of its rows, and where they begin."""
    size = tensor.shape[-1] // groups
    found = RowStrides.of(tensor)
    in_groups = found and found.in_groups(groups, size)
    return (tensor, in_groups) if in_groups else (tensor.contiguous(), RowStrides(1, size, 0))


def _in_equal_heads(rows: list[tuple[Tensor, RowStrides]]) -> list[tuple[Tensor, RowStrides]]:
    """The same rows, all counted in the same number of heads, as the kernel does."""
    heads = max(strides.heads for _, strides in rows)
    return [(tensor, strides.with_heads(heads)) for tensor, strides in rows]


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def fused_result(call: Call) -> tuple[Tensor, ...]:
    """The result by the kernel, where it has these dtypes; else in PyTorch."""
    x, weight, gate, size = call.x, call.weight, call.gate, call.x.shape[-1] // call.groups
    if gate is not None and torch.promote_types(x.dtype, gate.dtype) == x.dtype:
        gate = gate.to(x.dtype)  # a narrower gate has the same values in float32
    rows = _in_equal_heads([_with_rows(t, call.groups) for t in (x, call.residual, gate) if t is not None])
    contiguous = all(strides.is_contiguous(size) for _, strides in rows)
    kernel = kernel_for(
        call.spec,
        x.shape[-1],
        x.dtype,
        _dtype(weight),
        _dtype(call.residual),
        _dtype(gate),
        None if contiguous else rows[0][1].heads,
        *call.quantization,
    )
    if kernel is None or has_too_many_rows(x, size) or torch.version.cuda is None:
        return eager_result(call)
    outputs = tuple(torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in call.outputs(call.sum_dtype))
    weight = None if weight is None else weight.contiguous()
    run_on_device(kernel, LaunchTensors(rows, weight, call.scale, outputs))
    return outputs


def fake_result(call: Call) -> tuple[Tensor, ...]:
    """Tensors of the result's shapes and dtypes."""
    outputs = call.outputs(result_dtype(call.spec, call.sum_dtype, call.weight))
    return tuple(call.x.new_empty(shape, dtype=dtype) for shape, dtype in outputs)
