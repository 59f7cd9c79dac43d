"""Example inputs to capture a model with, where the user gives none."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import UsageError
from ..tensors import to_torch

# At least 2, so that the dims can be dynamic; all different, and not multiples of a common chunk size.
_BATCH, _SEQUENCE, _DECODER_SEQUENCE = 2, 9, 5


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Token inputs for a model that reads token ids, on the model's device.

    Returns:
        `input_ids` and, where the forward takes it, `attention_mask` (int64, `[2, 9]`); `decoder_input_ids` (`[2, 5]`)
        for an encoder-decoder.

    Raises:
        UsageError: the model does not read token ids; the message says how to give inputs.
    """
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        raise UsageError(
            f"{type(model).__name__} does not read input_ids (it reads {', '.join(parameters) or 'nothing'}), so its "
            "example inputs must be given: --inputs FILE.npz, or a factory that returns (model, inputs)."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    size = vocabulary_size(model)
    if size is None:
        raise UsageError(f"{type(model).__name__} has no vocabulary to draw tokens from; give --inputs FILE.npz.")

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(min(3, size - 1), size, (_BATCH, length), generator=generator).to(device)

    inputs = {"input_ids": tokens(_SEQUENCE)}
    if "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens(_DECODER_SEQUENCE)
    return inputs


def as_tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A user's inputs with numpy arrays as tensors, also inside of containers; everything else as it is.

    Raises:
        UsageError: expected a mapping of input name to value.
    """
    if not isinstance(inputs, Mapping):
        raise UsageError(
            f"inputs: expected a mapping of the forward's parameter names to tensors or arrays, got "
            f"{type(inputs).__name__}."
        )
    return {
        name: tree_map(lambda leaf: to_torch(leaf) if isinstance(leaf, np.ndarray) else leaf, value)
        for name, value in inputs.items()
    }


def vocabulary_size(model: nn.Module) -> int | None:
    """The size of the model's vocabulary: from its config, else the size of its first embedding, else None."""
    config = getattr(model, "config", None)
    for owner in (config, getattr(config, "text_config", None)):
        size = getattr(owner, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            return size
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return embedding.num_embeddings if embedding is not None else None
