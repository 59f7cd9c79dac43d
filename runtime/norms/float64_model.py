"""The float64 reference of a model: `in_float64`, a context in which the model computes in float64 from end to end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ...models.calling.experts import experts
from ...models.recognition.intercept import NormCall
from ...models.reference import reference

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    Array = NDArray[Any]

_WIDE: dict[torch.dtype, torch.dtype] = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}

# Smaller tensors are converted into newly allocated memory.
_SMALL = 1 << 16


class _InFloat64(TorchDispatchMode):
    """Makes every operator compute in float64, for any dtype of its operands and any dtype that is requested.

    Weights are not changed; they are converted to float64 one operator at a time, into memory that is reused: a copy
    of the model in float64 would take twice or four times its memory, and more time to make than a forward pass.
    Models also cast to float32 where half types are not accurate enough (softmax, rotary embedding, routers, logits);
    in a float64 copy of the model these casts would lose the precision of the reference.
    """

    def __init__(self) -> None:
        super().__init__()
        self._spare: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {k: _WIDE.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        if any(value.alias_info is not None for value in func._schema.returns):
            return func(*args, **named)  # a view, or a write in place, which computes in the target's dtype
        if func is torch.ops.aten.embedding.default:
            return _wide_tensor(func(*args, **named))  # the rows that are read, not the whole table
        used = 0

        def widened(value: Any) -> Any:
            nonlocal used
            if isinstance(value, torch.dtype):
                return _WIDE.get(value, value)
            if not isinstance(value, torch.Tensor) or value.dtype not in _WIDE:
                return value
            if value.dtype.is_complex or value.numel() < _SMALL or value.device.type != "cpu":
                return _wide_tensor(value)
            used += 1
            return self._borrowed(used - 1, value)

        # Operators without operands and without a dtype return tensors of the default dtype.
        result = tree_map(_wide_tensor, func(*tree_map(widened, args), **tree_map(widened, named)))
        return tree_map(self._own, result) if used else result

    def _own(self, value: Any) -> Any:
        """The value, copied out of reused memory: some operators return a view that their schema does not declare."""
        borrowed = {tensor.untyped_storage().data_ptr() for tensor in self._spare}
        is_view = isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in borrowed
        return value.clone() if is_view else value

    def _borrowed(self, slot: int, value: Tensor) -> Tensor:
        """The values in float64, in memory that is reused after the operator."""
        if slot == len(self._spare):
            self._spare.append(torch.empty(0, dtype=torch.float64))
        if self._spare[slot].numel() < value.numel():
            self._spare[slot] = torch.empty(value.numel(), dtype=torch.float64)
        dense = torch.ops.aten.is_non_overlapping_and_dense(value)
        flat = self._spare[slot][: value.numel()]
        return (flat.as_strided(value.shape, value.stride()) if dense else flat.view(value.shape)).copy_(value)


class _Retried(TorchFunctionMode):
    """Retries functions that reject operands of different dtypes (such as convolutions) with float64 operands."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        try:
            return func(*args, **named)
        except RuntimeError:
            if getattr(func, "__name__", "_").endswith("_"):
                raise  # a write in place must not go to a copy
            return func(*tree_map(_wide_tensor, args), **tree_map(_wide_tensor, named))


def _wide_tensor(value: Any) -> Any:
    is_narrow = isinstance(value, torch.Tensor) and value.dtype in _WIDE
    return value.to(_WIDE[value.dtype]) if is_narrow else value


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Make `model` compute in float64 while the context is open. Its tensors are not changed.

    Norms still run their own code: see `exactly`.

    Args:
        model: in the deployment dtype, in eval mode.
    """
    with warnings.catch_warnings(), experts(model, "eager"), _Retried(), _InFloat64():
        # Experts run eagerly because grouped products exist in float32 only. Weights keep their dtype on purpose.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


def exact(call: NormCall) -> Array:
    """The float64 reference of one call: float64 of x's shape, computed from the call's tensors."""
    gate, weight, bias = (None if t is None else wide_array(t) for t in (call.gate, call.weight, call.bias))
    return reference(call.spec, wide_array(call.x), weight, bias, gate)


def exactly(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
    """A visitor for `at_norms` that replaces every norm by the float64 reference."""
    del path, number, original
    return torch.from_numpy(exact(call)).to(call.x.device)


def wide_array(tensor: Tensor) -> Array:
    """A tensor's values in float64, in host memory."""
    return tensor.detach().to("cpu", torch.float64).numpy()
