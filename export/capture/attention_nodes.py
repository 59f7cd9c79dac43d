"""Capture each attention of a transformers model as one node (`attention_nodes`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ...models.attention.attend import attend
from ...models.attention.find_attention import AttentionRecognition, bias_of, is_causal, obstacle, spec_of
from ...models.attention.intercept import AttentionCall, intercepted
from ..graph.captured_nodes import ATTENTION_OP, CAPTURE_DOMAIN

_by_spec: ContextVar[bool] = ContextVar("by_spec", default=False)


@contextmanager
def attentions_by_spec() -> Iterator[None]:
    """In PyTorch too, these attentions compute their spec while the context is open, as a captured graph does.

    The results of a half type's own kernel differ by roundings, which grow from layer to layer.
    """
    token = _by_spec.set(True)
    try:
        yield
    finally:
        _by_spec.reset(token)


@contextmanager
def attention_nodes(model: nn.Module, found: AttentionRecognition) -> Iterator[None]:
    """Under `torch.export`, each of these attentions becomes one node; in PyTorch, nothing changes.

    A call with other arguments than those that were checked stays as it is.
    """
    if not found.sites:
        yield
        return
    paths = {module: path for path, module in model.named_modules()}
    biases: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def handle(call: AttentionCall) -> tuple[Tensor, Any]:
        path = paths.get(call.module)
        spec = found.spec(path) if torch.compiler.is_exporting() or _by_spec.get() else None
        if path is None or spec is None or obstacle(call) is not None or spec_of(call) != spec:
            return call.original()
        if not torch.compiler.is_exporting():
            own = replace(spec, causal=is_causal(call))
            return attend(own, call.query, call.key, call.value, bias_of(call), call.option("s_aux")), None
        return _node(call, path, biases), None

    with intercepted(handle):
        yield


def _check_sizes(call: AttentionCall, bias: Tensor | None) -> None:
    """State the equal sizes of the inputs: the operators of the function would, and the node does not."""
    batch, _, length, width = call.query.shape
    int(call.value.shape[3])  # a fixed number, as the layer behind the attention requires
    equal = [(call.key.shape[0], batch), (call.value.shape[0], batch), (call.value.shape[2], call.key.shape[2])]
    equal += [(call.value.shape[1], call.key.shape[1]), (call.key.shape[3], width)]
    if bias is not None and bias.ndim == 4:
        equal += zip(bias.shape, (batch, call.query.shape[1], length, call.key.shape[2]), strict=True)
    for got, wanted in equal:
        if not (isinstance(got, int) and got == 1):
            torch._check(got == wanted)


def _node(call: AttentionCall, path: str, biases: dict[tuple[int, ...], tuple[Any, ...]]) -> Tensor:
    position, trace = call.option("position_bias"), get_proxy_mode()
    key = (id(call.mask), id(position), id(trace))
    if key not in biases:  # one for all layers of a trace; the objects are kept, so that their ids stay theirs
        biases[key] = (bias_of(call), call.mask, position, trace)
    bias, sink = biases[key][0], call.option("s_aux")
    spec = replace(spec_of(call), causal=is_causal(call))
    batch, heads, length, _ = call.query.shape
    _check_sizes(call, bias)
    return torch.onnx.ops.symbolic(
        f"{CAPTURE_DOMAIN}::{ATTENTION_OP}",
        [call.query, call.key, call.value, bias, sink],
        {"spec": spec.to_json(), "path": path, "heads": int(heads), "groups": int(call.key.shape[1])},
        dtype=call.query.dtype,
        shape=(batch, length, heads, call.value.shape[3]),
        version=1,
    )
