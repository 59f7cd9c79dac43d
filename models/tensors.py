"""Arrays as PyTorch's tensors and back, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def to_torch(array: NDArray[Any]) -> torch.Tensor:
    """A tensor with a copy of the array's values; bfloat16 goes over bit for bit."""
    import torch

    # A copy of our own: the array may be read-only, strided backwards or in use elsewhere.
    own = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
    if own.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(own)


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """An array with a copy of the tensor's values, from any device; bfloat16 goes over bit for bit.

    Raises:
        TypeError: numpy has no such dtype or layout (float8, quantized, sparse).
    """
    import torch

    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
