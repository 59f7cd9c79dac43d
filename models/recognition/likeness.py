"""What two modules have in common that differ in the values of their tensors only (`likeness`)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

_TENSORS = ("_parameters", "_buffers")
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def likeness(module: nn.Module) -> Hashable | None:
    """A key that is equal for two modules of one class with equal attributes, and tensors of equal shapes and dtypes.

    None for a module with other than plain attributes, such as an object, a list or a child module: two of these may
    differ where this cannot see it.
    """
    attributes: list[Hashable] = []
    for name, value in sorted(vars(module).items()):
        if name in _TENSORS:
            forms = [_form(key, tensor) for key, tensor in value.items()]
            if None in forms:
                return None
            attributes.append((name, tuple(forms)))
            continue
        plain = _plain(value)
        if plain is None:
            return None
        attributes.append((name, plain))
    return (type(module), tuple(attributes))


def _form(name: str, tensor: Any) -> Hashable | None:
    if tensor is None:
        return (name, None)
    more = tuple((key, _plain(value)) for key, value in sorted(getattr(tensor, "__dict__", {}).items()))
    if any(value is None for _, value in more):
        return None
    form = (type(tensor), tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad, tensor.stride())
    return (name, *form, more)


def _plain(value: Any) -> Hashable | None:
    """The value with its type, for a plain one or a tuple of these; its type for an empty container."""
    if type(value) in _PLAIN:
        return (type(value), repr(value))
    if isinstance(value, tuple):
        items = tuple(_plain(item) for item in value)
        return None if None in items else (type(value), items)
    if isinstance(value, dict | set | frozenset | list) and not value:
        return (type(value), ())
    return None
