"""The operators `rmsnorm_deploy::rms_norm` and `rmsnorm_deploy::add_rms_norm` of PyTorch.

Importing this module registers them. On CUDA tensors they run the fused kernel; for dtypes that it does not have, and
on other devices, they compute `eager` in PyTorch. They work in `torch.compile`, which sees one node, and in CUDA
graphs. They have no gradient. Autocast does not change what they compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, get_args

import torch
from torch import Tensor

from ...models.eager import eager, result_dtype
from ...models.errors import RmsnormDeployError, UsageError
from ...models.spec import Activation, Gate, NormSpec, Scale
from .. import contract
from .device_kernels import run_on_device
from .kernel_choice import CASTS_FIRST, RowStrides, has_too_many_rows, kernel_for

# The form of a norm, as arguments of the operators: fields of NormSpec, and `scale_offset` for the kind of scale.
_FORM: Final = (
    "str order='scale_then_cast', float scale_offset=0.0, bool offset_in_float32=True, "
    "str root='rsqrt', str statistics='float32', int? group_size=None"
)
_RMS_NORM: Final = (
    f"rms_norm(Tensor x, Tensor? weight=None, float eps=1e-06, Tensor? gate=None, *, {_FORM}, "
    "str gate_place='none', str activation='none') -> Tensor"
)
_ADD_RMS_NORM: Final = (
    f"add_rms_norm(Tensor x, Tensor residual, Tensor? weight=None, float eps=1e-06, *, {_FORM}) -> (Tensor, Tensor)"
)
_LIBRARY: Final = torch.library.Library(contract.DOMAIN, "DEF")


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


@dataclass(frozen=True)
class _Call:
    """The tensors of a call, and what it computes.

    Raises:
        UsageError: the tensors and the form do not fit together.
    """

    x: Tensor
    weight: Tensor | None
    spec: NormSpec
    residual: Tensor | None = None
    gate: Tensor | None = None

    def __post_init__(self) -> None:
        x, weight = self.x, self.weight
        if x.ndim < 1 or not x.is_floating_point():
            raise UsageError(f"x: expected a floating tensor of at least one dim, got {_described(x)}.")
        for name, tensor in (("residual", self.residual), ("gate", self.gate)):
            if tensor is not None and (tensor.shape != x.shape or not tensor.is_floating_point()):
                raise UsageError(
                    f"{name}: expected a floating tensor like x, {_described(x)}, got {_described(tensor)}."
                )
        if weight is not None and (
            weight.ndim != 1 or weight.shape[0] != x.shape[-1] or not weight.is_floating_point()
        ):
            raise UsageError(f"weight: expected a floating tensor of shape [{x.shape[-1]}], got {_described(weight)}.")
        for name, tensor in (("residual", self.residual), ("weight", weight), ("gate", self.gate)):
            if tensor is not None and tensor.device != x.device:
                raise UsageError(f"{name}: expected a tensor on x's device, {x.device}, got one on {tensor.device}.")
        group = self.spec.group_size
        if group is not None and x.shape[-1] % group:
            raise UsageError(f"group_size: expected a divisor of x's last dim, {x.shape[-1]}, got {group}.")

    @property
    def groups(self) -> int:
        """Parts of x's last dim that are each normalized alone."""
        return 1 if self.spec.group_size is None else self.x.shape[-1] // self.spec.group_size

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of what is normalized: x, or its sum with the residual."""
        return self.x.dtype if self.residual is None else torch.promote_types(self.x.dtype, self.residual.dtype)


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


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _eager(call: _Call) -> tuple[Tensor, ...]:
    """Contiguous y, and the sum where there is a residual."""
    with _without_autocast(call.x.device):
        total = call.x if call.residual is None else call.x + call.residual
        y = eager(call.spec, total, call.weight, gate=call.gate).contiguous()
        return (y,) if call.residual is None else (y, total.contiguous())


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


def _fused(call: _Call) -> tuple[Tensor, ...]:
    """The same by the kernel, where it has these dtypes."""
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
    )
    if kernel is None or has_too_many_rows(x, size) or torch.version.cuda is None:
        return _eager(call)
    count = 1 if call.residual is None else 2
    outputs = [torch.empty(x.shape, dtype=call.sum_dtype, device=x.device) for _ in range(count)]
    run_on_device(kernel, rows, None if weight is None else weight.contiguous(), outputs)
    return tuple(outputs)


def _fake(call: _Call) -> tuple[Tensor, ...]:
    y = call.x.new_empty(call.x.shape, dtype=result_dtype(call.spec, call.sum_dtype, call.weight))
    return (y,) if call.residual is None else (y, call.x.new_empty(call.x.shape, dtype=call.sum_dtype))


_Compute = Callable[[_Call], tuple[Tensor, ...]]


def _rms_norm_by(compute: _Compute) -> Callable[..., Tensor]:
    def rms_norm(
        x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, gate: Tensor | None = None, **form: Any
    ) -> Tensor:
        spec = _spec(weight is not None, gate is not None, eps, **{**_DEFAULTS, **form})
        return compute(_Call(x, weight, spec, gate=gate))[0]

    return rms_norm


def _add_rms_norm_by(compute: _Compute) -> Callable[..., tuple[Tensor, ...]]:
    def add_rms_norm(
        x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **form: Any
    ) -> tuple[Tensor, ...]:
        spec = _spec(weight is not None, False, eps, **{**_DEFAULTS, **form})
        return compute(_Call(x, weight, spec, residual=residual))

    return add_rms_norm


# What the dispatcher leaves out where an argument has its default.
_DEFAULTS: Final = {
    "order": "scale_then_cast", "scale_offset": 0.0, "offset_in_float32": True, "root": "rsqrt",
    "statistics": "float32", "group_size": None, "gate_place": "none", "activation": "none",
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
