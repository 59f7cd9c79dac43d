"""Capture each attention of a model as one node (`attention_nodes`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...models.attention.attend import attend
from ...models.attention.call import FUNCTIONAL, AttentionCall
from ...models.attention.find_attention import (
    AttentionRecognition,
    AttentionRefusal,
    attending,
    bias_of,
    is_causal,
    known_size,
    lowest,
    obstacle,
    spec_of,
)
from ...models.attention.intercept import intercepted
from ...models.attention.spec import AttentionSpec
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

    A call with other arguments than those that were checked stays as it is, and its reason is added to the refusals.
    """
    if not found.sites:
        yield
        return
    paths = {module: path for path, module in model.named_modules()}
    biases: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    weighted = any(True for _ in model.parameters())

    def handle(call: AttentionCall) -> tuple[Tensor, Any]:
        path = paths.get(call.module)
        spec = found.spec(path) if torch.compiler.is_exporting() or _by_spec.get() else None
        if path is None or spec is None:
            return call.original()
        reason = _varying(call, weighted) or obstacle(call) or _other(spec_of(call), spec)
        if reason is not None:
            if torch.compiler.is_exporting() and all(refusal.path != path for refusal in found.refusals):
                found.refusals.append(
                    AttentionRefusal(path, type(call.module).__name__, f"under torch.export, {reason}")
                )
            return call.original()
        if not torch.compiler.is_exporting():
            own = replace(spec, causal=is_causal(call))
            y = attend(own, call.query, call.key, call.value, bias_of(call), call.option("s_aux"))
            return _without_silent_rows(y, attending(call, of_registry=found.reads_silent)), None
        return _node(call, path, biases, found.reads_silent), None

    with intercepted(model, handle):
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


def _varying(call: AttentionCall, weighted: bool) -> str | None:
    """Why the sizes of heads, which a node states as numbers, are not known to be fixed; or None.

    Weights fix those of queries, also where torch has a quotient of an input's width for them. The sizes of keys and
    values may come from other inputs, such as a cache, and follow from those of queries.
    """
    given = [call.query] if weighted else [call.query, call.key, call.value]
    sizes = [tensor.shape[axis] for tensor in given for axis in (1, 3) if tensor.ndim == 4]
    varies = [size for size in sizes if known_size(size) is None and not (weighted and _is_quotient(size))]
    return "the number or the size of its heads varies with the inputs" if varies else None


def _is_quotient(size: Any) -> bool:
    """Whether a symbolic size is what splitting a dim into heads gives."""
    return type(size.node.expr).__name__ in ("FloorDiv", "CleanDiv")


def _other(got: AttentionSpec, wanted: AttentionSpec) -> str | None:
    return None if got == wanted else f"expected {wanted.describe()}, got {got.describe()}"


def _without_silent_rows(y: Tensor, attending: Tensor | None) -> Tensor:
    """The result with zeros for the queries that attend to nothing."""
    return y if attending is None else torch.where(attending, y, torch.zeros((), dtype=y.dtype, device=y.device))


def _top_left(call: AttentionCall) -> Tensor:
    """The bias of a causal attention whose queries may be fewer or more than its keys: runtimes align these apart."""
    length, keys, like = call.query.shape[2], call.key.shape[2], call.query
    shown = torch.ones(length, keys, dtype=torch.bool, device=like.device).tril()
    bias = torch.where(shown, 0.0, lowest(like.dtype)).to(like.dtype)
    return bias[None, None]


def _node(call: AttentionCall, path: str, biases: dict[tuple[Any, ...], tuple[Any, ...]], reads_silent: bool) -> Tensor:
    position, trace, causal = call.option("position_bias"), get_proxy_mode(), is_causal(call)
    batch, heads, length, _ = call.query.shape
    keys = call.key.shape[2]
    aligned = call.implementation == FUNCTIONAL and causal and not statically_known_true(length == keys)
    key = (id(call.mask), id(position), id(trace), str(length), str(keys), aligned)
    if key not in biases:  # one for all layers of a trace; the objects are kept, so that their ids stay theirs
        bias = _top_left(call) if aligned else bias_of(call)
        biases[key] = (bias, attending(call, of_registry=reads_silent), call.mask, position, trace)
    (bias, shown), sink = biases[key][:2], call.option("s_aux")
    spec = replace(spec_of(call), causal=causal and not aligned)
    _check_sizes(call, bias)
    y = torch.onnx.ops.symbolic(
        f"{CAPTURE_DOMAIN}::{ATTENTION_OP}",
        [call.query, call.key, call.value, bias, sink],
        {"spec": spec.to_json(), "path": path, "heads": int(heads), "groups": int(call.key.shape[1])},
        dtype=call.query.dtype,
        shape=(batch, length, heads, call.value.shape[3]),
        version=1,
    )
    return _without_silent_rows(y, shown)
