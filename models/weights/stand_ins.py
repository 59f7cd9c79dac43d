"""Run a model without reading its large weights: matrix products with other values in their place (`unread_weights`).

What a check compares, a model and its graph, or a model with and without swapped norms, then has the same other
weights. A product with such a weight, [K, N], is that with a matrix whose product costs K + N operations for a row:
a cyclic shift of the identity, plus half of an outer product of two random vectors. All three depend on where
the weight is in its file, so that two weights do not become equal. Each element of x changes each element of a result.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .mapped_file import position_of

# Weights of fewer bytes are read. A model whose weights have fewer bytes in all is run with its own values.
_SMALL, _READ = 1 << 20, 512 << 20
_RANDOM = 1 << 18


def unread_weights(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which a model is run without reading its large weights; one that does nothing if they are small."""
    return _StandIns() if unread_bytes(model) else nullcontext()


def unread_bytes(model: nn.Module) -> int:
    """The bytes of the weights that `unread_weights` does not read; 0 if all are read."""
    tensors: Iterable[Tensor] = {id(tensor): tensor for tensor in model.parameters()}.values()
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors if _is_large(tensor)]
    return sum(sizes) if sum(sizes) > _READ else 0


def _is_large(tensor: Tensor) -> bool:
    size = tensor.numel() * tensor.element_size()
    return size > _SMALL and tensor.ndim > 1 and position_of(tensor) is not None


class _StandIns(TorchDispatchMode):
    """Replaces each matrix product whose second factor is a large weight in a mapped file."""

    def __init__(self) -> None:
        super().__init__()
        self._random = torch.randn(_RANDOM, generator=torch.Generator().manual_seed(20_261_127))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = _PRODUCTS.get(func)
        if place is not None and not kwargs and _is_large(args[place]):
            x, weight = args[place - 1], args[place]
            result = self._product(x, weight)
            return result if place == 1 else args[0] + result
        return func(*args, **(kwargs or {}))

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        inputs, outputs = weight.shape[-2:]
        found = position_of(weight)
        assert found is not None
        key = zlib.crc32(found[0].label.encode()) + found[1] // weight.element_size()
        if x.ndim == 3:  # one product for each matrix of a batch
            step = inputs * outputs
            return torch.stack([self._of(rows, key + number * step, outputs) for number, rows in enumerate(x)])
        return self._of(x, key, outputs)

    def _of(self, x: Tensor, key: int, outputs: int) -> Tensor:
        rows, inputs = x.shape
        result, place, shift = x.new_empty(rows, outputs), 0, key * 7919 % inputs
        while place < outputs:
            part = x[:, shift : shift + outputs - place]
            result[:, place : place + part.shape[1]] = part
            place, shift = place + part.shape[1], 0
        scale = x @ (self._vector(key, inputs) / inputs**0.5).to(x.dtype)
        return result.addcmul_(scale[:, None], self._vector(key + 1, outputs).to(x.dtype), value=0.5)

    def _vector(self, key: int, size: int) -> Tensor:
        start = key * 104_729 % _RANDOM
        turned = torch.cat([self._random[start:], self._random[:start]])
        return turned.repeat(-(-size // _RANDOM))[:size]


_aten = torch.ops.aten
# Products by the position of their second factor; those at 2 add their first argument.
_PRODUCTS = {_aten.mm.default: 1, _aten.bmm.default: 1, _aten.addmm.default: 2, _aten.baddbmm.default: 2}
