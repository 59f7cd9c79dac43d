"""Intercept the attention functions that a model calls (`intercepted`)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from .call import AttentionCall
from .functional import functional_calls

Handle = Callable[[AttentionCall], tuple[Tensor, Any]]
# Whether a function of the registry is running, which may call torch's own function.
_registered: ContextVar[bool] = ContextVar("registered", default=False)


@contextmanager
def intercepted(model: nn.Module, handle: Handle) -> Iterator[None]:
    """Call `handle` for each attention of a model while the context is open.

    These are the calls of the functions in transformers' registry, by any module, and the calls of
    `torch.nn.functional.scaled_dot_product_attention` that modules of the model make themselves.
    """

    def outside(call: AttentionCall) -> tuple[Tensor, Any]:
        return call.original() if _registered.get() else handle(call)

    with ExitStack() as stack:
        registry = _registry()
        if registry is not None:
            stack.enter_context(_registry_calls(registry, handle))
        stack.enter_context(functional_calls(model, outside))
        yield


def _registry() -> Any:
    """transformers' registry of attention functions; None without one, or without a model of transformers."""
    registry = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    return registry if hasattr(registry, "get_interface") else None


@contextmanager
def _registry_calls(registry: Any, handle: Handle) -> Iterator[None]:
    original = registry.get_interface

    def get_interface(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = original(implementation, default)

        @functools.wraps(function)
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *given: Any, **options: Any) -> Any:
            token = _registered.set(True)
            try:
                if len(given) > 1 or (given and "attention_mask" in options):
                    return function(module, query, key, value, *given, **options)
                mask = given[0] if given else options.pop("attention_mask", None)
                return handle(AttentionCall(module, implementation, function, query, key, value, mask, options))
            finally:
                _registered.reset(token)

        return attention

    registry.get_interface = get_interface
    try:
        yield
    finally:
        del registry.get_interface
