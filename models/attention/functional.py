"""Intercept the calls of `torch.nn.functional.scaled_dot_product_attention` that modules make (`functional_calls`)."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .call import FUNCTIONAL, AttentionCall

_NAME = "scaled_dot_product_attention"


@dataclass(frozen=True, slots=True)
class _Registered:
    """The function, called and returning as those of transformers' registry do: `[B, S, H, Dv]`, and no weights.

    Attributes:
        original: the function.
        last: the last result, `[B, H, S, Dv]`, behind the one that was returned in its place.
    """

    original: Callable[..., Tensor]
    last: deque[tuple[Tensor, Tensor]] = field(default_factory=lambda: deque(maxlen=1), compare=False)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        named = {"attn_mask": mask, "dropout_p": options["dropout"], "scale": options["scaling"]}
        named |= {"enable_gqa": True} if options["enable_gqa"] else {}
        causal = options["is_causal"] and (mask is None or options["combined"])
        result = self.original(query, key, value, is_causal=causal, **named)
        turned = result.transpose(1, 2) if result.ndim == 4 else result
        self.last.append((turned, result))
        return turned, None


@contextmanager
def functional_calls(model: nn.Module, handle: Callable[[AttentionCall], tuple[Tensor, Any]]) -> Iterator[None]:
    """Call `handle` for each call of the function by a module of this model while the context is open.

    The module is the innermost one of which a function is running. The function is replaced where modules look it up:
    in `torch.nn.functional`, and under any name in the globals of Python modules outside torch. A reference elsewhere,
    as in an attribute or a default value, is not seen.
    """
    modules = {id(module) for module in model.modules()}
    original = getattr(torch.nn.functional, _NAME)

    @functools.wraps(original)
    def attention(*given: Any, **named: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # it reads this function itself, as in the bodies of control flow
            return original(*given, **named)
        function = _Registered(original)
        call = _call(modules, function, *given, **named)
        if call is None:
            return original(*given, **named)
        result = handle(call)[0]
        turned, own = function.last.pop() if function.last else (None, result)
        # The function's own result is returned as it is, so that nothing changes in the graph of a torch.export.
        return own if result is turned else result.transpose(1, 2)

    places = [(names, name) for names in _globals(model) for name, value in [*names.items()] if value is original]
    for names, name in places:
        names[name] = attention
    try:
        yield
    finally:
        for names, name in places:
            if names.get(name) is attention:
                names[name] = original


def _call(modules: set[int], function: _Registered, *given: Any, **named: Any) -> AttentionCall | None:
    """The call as one of an attention function; None where no module makes it, or where torch refuses its arguments."""
    try:
        found = _arguments(*given, **named)
    except TypeError:
        return None
    query, key, value, mask, options = found
    module = _caller(modules, sys._getframe(2))
    tensors = [query, key, value, *([mask] if mask is not None else [])]
    if module is None or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    options["combined"] = mask is not None and options["is_causal"]
    return AttentionCall(module, FUNCTIONAL, function, query, key, value, mask, options)


def _arguments(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """The arguments, with the names of transformers' registry for the options."""
    causal, shared = bool(is_causal), bool(enable_gqa)
    options = {"dropout": dropout_p, "is_causal": causal, "scaling": scale, "enable_gqa": shared}
    return query, key, value, attn_mask, options


def _caller(modules: set[int], frame: FrameType | None) -> nn.Module | None:
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nn.Module) and id(first) in modules:
                return first
        frame = frame.f_back
    return None


def _globals(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The globals of Python modules and of the classes of a model, each once."""
    found = {id(vars(torch.nn.functional)): vars(torch.nn.functional)}
    for name, module in [*sys.modules.items()]:
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict) and name != "torch" and not name.startswith("torch."):
            found[id(names)] = names
    for cls in {base for module in model.modules() for base in type(module).__mro__}:
        names = getattr(vars(cls).get("forward"), "__globals__", None)
        if isinstance(names, dict) and not cls.__module__.startswith("torch."):
            found[id(names)] = names
    yield from found.values()
