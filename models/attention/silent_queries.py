"""Whether a model reads what queries get that attend to nothing (`reads_silent_queries`).

They are those of padding on the left. Where attention alone mixes tokens, nothing reads their results. A recurrence or
a convolution that does not leave out padding does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .call import AttentionCall
from .find_attention import attending
from .intercept import intercepted

_MASK = "attention_mask"
_PADDING = 2
# A result that differs by more than this, relative to the largest value, was read.
_READ = 1e-4


def reads_silent_queries(model: nn.Module, run: Callable[[Mapping[str, Any]], Any], feeds: Mapping[str, Any]) -> bool:
    """Run a model on padded inputs twice, the second time with other results for queries that attend to nothing.

    Args:
        model: a model in eval mode.
        run: runs it on keyword arguments.
        feeds: example inputs; without `attention_mask`, `[B, S]`, there is no padding.

    Returns:
        Whether the outputs of other tokens differ.
    """
    mask = feeds.get(_MASK)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < 2 * _PADDING or mask.is_floating_point():
        return False
    padded = torch.ones_like(mask)
    padded[-1, :_PADDING] = 0
    silent = False

    def outputs(change: float) -> list[Tensor]:
        def handle(call: AttentionCall) -> tuple[Tensor, Any]:
            nonlocal silent
            y, weights = call.original()
            shown = attending(call, of_registry=True)
            if shown is None or bool(shown.all()):
                return y, weights
            silent = True
            return torch.where(shown, y, y + change), weights

        with torch.no_grad(), intercepted(model, handle):
            leaves = torch.utils._pytree.tree_leaves(run({**feeds, _MASK: padded}))
        kept = padded.bool()
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return [leaf[kept].float() for leaf in tensors if leaf.ndim > 2 and leaf.shape[:2] == kept.shape]

    first = outputs(0.0)
    if not silent:
        return False
    for one, other in zip(first, outputs(1.0), strict=True):
        largest = float(one.abs().max()) if one.numel() else 0.0
        if one.numel() and not float((one - other).abs().max()) <= _READ * largest:
            return True
    return False
