"""The attentions that a PyTorch model calls (`recorded_attentions`): their inputs, and what they compute."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...models.attention.attend import attend
from ...models.attention.call import AttentionCall
from ...models.attention.find_attention import bias_of, is_causal, lowest, obstacle, spec_of
from ...models.attention.intercept import intercepted
from ...models.attention.spec import AttentionSpec
from ...models.dtypes import torch_name
from ..norms.activation_store import Key
from ..runners.base import Array
from ..runners.torch import to_numpy, to_torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class AttentionFeed:
    """The inputs of one attention, in one floating dtype.

    Attributes:
        query: `[B, H, S, D]`.
        key: `[B, Hk, T, D]`.
        value: `[B, Hk, T, Dv]`.
        bias: broadcastable to `[B, H, S, T]`, or None.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None

    def cast(self, dtype: Any) -> AttentionFeed:
        """The same inputs in another dtype."""
        query, key, value = (array.astype(dtype, copy=False) for array in (self.query, self.key, self.value))
        return AttentionFeed(query, key, value, None if self.bias is None else self.bias.astype(dtype, copy=False))

    @property
    def attended(self) -> Array:
        """Which queries attend to a key in every head, bool `[B, S]`."""
        batch, length = self.query.shape[0], self.query.shape[2]
        if self.bias is None:
            return np.ones((batch, length), dtype=bool)
        shown: Array = self.bias.astype(np.float64) > np.finfo(np.float16).min / 2
        return np.broadcast_to(np.all(np.any(shown, axis=-1), axis=1), (batch, length))


@dataclass(frozen=True, slots=True, eq=False)
class CalledAttention:
    """One call of an attention function in PyTorch.

    Attributes:
        key: module path and number of the call.
        call: the call, with copies of its tensors.
        spec: what it computes; causal only if the call has no mask.
    """

    key: Key
    call: AttentionCall
    spec: AttentionSpec

    @property
    def dtype(self) -> str:
        """numpy's name of the dtype of the query."""
        return torch_name(self.call.query.dtype)

    @property
    def sink(self) -> Tensor | None:
        """The sinks, `[H]`, or None."""
        found: Tensor | None = self.call.option("s_aux")
        return found

    def feed(self, *, masked: bool) -> tuple[AttentionSpec, AttentionFeed]:
        """The spec and the inputs as the model runs; with `masked`, a bias hides the keys that are not attended to."""
        bias, spec, call = bias_of(self.call), self.spec, self.call
        if masked and bias is None:
            shown = torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool, device=call.query.device)
            shown = shown.tril() if spec.causal else shown
            zero = torch.zeros((), dtype=call.query.dtype, device=call.query.device)
            bias = torch.where(shown, zero, zero + lowest(zero.dtype))[None, None]
        spec = dataclasses.replace(spec, causal=spec.causal and bias is None)
        query, key, value = (to_numpy(tensor) for tensor in (call.query, call.key, call.value))
        return spec, AttentionFeed(query, key, value, None if bias is None else to_numpy(bias))

    def exact(self, spec: AttentionSpec, feed: AttentionFeed) -> Array:
        """The result of the spec in float64, `[B, S, H, Dv]`."""
        with torch.no_grad():
            return to_numpy(attend(spec, *self._tensors(feed.cast(np.float64)), self.sink, wide=torch.float64))

    def own(self, spec: AttentionSpec, feed: AttentionFeed) -> Array:
        """The result of the module's own function in the dtype of the feed, else of `attend`, `[B, S, H, Dv]`."""
        query, key, value, bias = self._tensors(feed)
        options = {name: None if name == "position_bias" else v for name, v in self.call.options.items()}
        sink = self.sink
        if sink is not None:
            options["s_aux"] = sink.to(query.dtype)
        call = dataclasses.replace(self.call, query=query, key=key, value=value, mask=bias, options=options)
        with torch.no_grad():
            try:
                if is_causal(call) == spec.causal:
                    return to_numpy(call.original()[0])
            except Exception:  # a function that takes only the masks of its model
                pass
            return to_numpy(attend(spec, query, key, value, bias, sink))

    def step_by_step(self, spec: AttentionSpec, feed: AttentionFeed) -> Array:
        """The result of PyTorch's operators with scores in the dtype of the feed, as eager attention computes them."""
        query, key, value, bias = self._tensors(feed)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        with torch.no_grad():
            scores = (query * spec.scale) @ key.transpose(-1, -2)
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            if bias is not None:
                scores = scores + bias
            if spec.causal:
                hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
                scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
            wide = torch.promote_types(scores.dtype, torch.float32)
            scores = scores.to(wide)
            if self.sink is not None:
                column = self.sink.to(wide).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
                scores = torch.cat([scores, column], -1)
            weights = torch.softmax(scores, -1)[..., : key.shape[2]].to(query.dtype)
            return to_numpy((weights @ value).transpose(1, 2).contiguous())

    def _tensors(self, feed: AttentionFeed) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        device = self.call.query.device
        query, key, value = (to_torch(a).to(device) for a in (feed.query, feed.key, feed.value))
        return query, key, value, None if feed.bias is None else to_torch(feed.bias).to(device)


@contextmanager
def recorded_attentions(
    model: nn.Module, paths: Container[str], found: dict[Key, CalledAttention | str]
) -> Iterator[None]:
    """Record the calls of these attention modules while the context is open.

    Args:
        model: the model that runs.
        paths: paths of its attention modules.
        found: receives each call, or why no spec describes it.
    """
    names = {module: path for path, module in model.named_modules() if path in paths}
    numbers: Counter[str] = Counter()

    def handle(call: AttentionCall) -> tuple[Tensor, Any]:
        path = names.get(call.module)
        if path is not None:
            key = (path, numbers[path])
            numbers[path] += 1
            found[key] = obstacle(call) or CalledAttention(key, _copied(call), _spec(call))
        return call.original()

    with intercepted(model, handle):
        yield


def _spec(call: AttentionCall) -> AttentionSpec:
    return dataclasses.replace(spec_of(call), causal=is_causal(call))


def _copied(call: AttentionCall) -> AttentionCall:
    query, key, value = (tensor.detach().clone() for tensor in (call.query, call.key, call.value))
    mask = None if call.mask is None else call.mask.detach().clone()
    return dataclasses.replace(call, query=query, key=key, value=value, mask=mask)
