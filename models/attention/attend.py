"""Attention in PyTorch, operation by operation (`attend`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import AttentionSpec


def attend(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    *,
    wide: torch.dtype | None = None,
) -> Tensor:
    """The attention of a spec.

    Args:
        spec: what to compute.
        query: `[B, H, S, D]`, any floating dtype.
        key: `[B, Hk, T, D]`.
        value: `[B, Hk, T, Dv]`.
        bias: broadcastable to `[B, H, S, T]`, added to the scores; None for none.
        sink: `[H]`, required exactly when `spec.sink`.
        wide: the dtype to compute in; float32, or the query's if that is wider, when None.

    Returns:
        `[B, S, H, Dv]` in the dtype of the query, or in `wide` if given.
    """
    result = wide or query.dtype
    wide = wide or torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    q, k, v = (t.to(wide) for t in (query, key, value))
    scores = (q * spec.scale).reshape(batch, groups, heads // groups * length, width) @ k.transpose(-1, -2)
    scores = scores.reshape(batch, heads, length, key.shape[2])
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if spec.causal:
        later = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, torch.finfo(wide).min)
    most = scores.amax(-1, keepdim=True)
    if sink is not None:
        most = torch.maximum(most, sink.to(wide).reshape(1, -1, 1, 1))
    parts = torch.exp(scores - most)
    total = parts.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink.to(wide).reshape(1, -1, 1, 1) - most)
    weights = (parts / total).reshape(batch, groups, heads // groups * length, key.shape[2])
    return (weights @ v).reshape(batch, heads, length, value.shape[3]).transpose(1, 2).contiguous().to(result)
