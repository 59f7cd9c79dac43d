"""Call a module without side effects on it, on its children or on the random state."""

from __future__ import annotations

import copy
import functools
import random
import types
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .state import UnwatchableError, is_atom, is_plain_object, tidy, vars_of

# A norm's forward changes no tensor with more elements in place; copies share it.
_LARGEST_COPY = 1 << 20
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def stand_in(module: nn.Module) -> nn.Module:
    """A copy of a small module that can be called without changing the original.

    The copy and its children are in eval mode and have no hooks. They share no tensor, no container and no object of
    plain attributes with the original, so a forward that counts its calls or changes a buffer in place does so on the
    copy. Shared are functions, modules that are not children, and tensors too large to belong to a norm; `Snapshot`
    says whether a call changed these.

    Raises:
        UnwatchableError: an object cannot be copied.
    """
    return _stand_in(module, {}, "")


@contextmanager
def untouched_random_state(devices: list[torch.device]) -> Iterator[None]:
    """Restore the random state of torch (on the CPU and `devices`), NumPy and Python when the context closes.

    Inside, all three start from the same seed each time, so that a module that draws random numbers is reproducible.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Run torch on this number of threads; for the small probe inputs, several threads only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_thread() -> AbstractContextManager[None]:
    """Run torch on one thread."""
    return thread_count(1)


def _stand_in(module: nn.Module, memo: dict[int, Any], path: str) -> nn.Module:
    clone: nn.Module = object.__new__(type(module))
    memo[id(module)] = clone
    kept = {name: value for name, value in vars(module).items() if name not in _HOOKS and name != "_modules"}
    state = {name: _unshared(value, memo, f"{path}.{name}") for name, value in kept.items()}
    state |= {name: OrderedDict() for name in _HOOKS if name in vars(module)}
    state["_modules"] = {
        name: child if child is None else memo.get(id(child)) or _stand_in(child, memo, f"{path}.{name}")
        for name, child in module._modules.items()
    }
    state["training"] = False
    object.__setattr__(clone, "__dict__", state)
    return clone


def _unshared(value: Any, memo: dict[int, Any], path: str) -> Any:
    """The value, copied where it is a tensor, a container or an object that a call could change."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        copied: Any = value.detach().clone() if value.numel() <= _LARGEST_COPY else value
        if isinstance(value, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=False)
    elif isinstance(value, dict | list | set | deque | np.ndarray | bytearray):
        copied = copy.copy(value)
    elif type(value) is tuple:
        return tuple(_unshared(item, memo, f"{path}[{index}]") for index, item in enumerate(value))
    elif isinstance(value, types.MethodType) and id(value.__self__) in memo:
        return types.MethodType(value.__func__, memo[id(value.__self__)])
    elif is_atom(value) or isinstance(value, nn.Module | types.FunctionType | types.MethodType | functools.partial):
        return value
    elif isinstance(value, torch.Generator):
        copied = torch.Generator(value.device).set_state(value.get_state())
    elif is_plain_object(value):
        copied = object.__new__(type(value))
        memo[id(value)] = copied
        own = getattr(copied, "__dict__", {})
        for name, item in vars_of(value).items():
            new = _unshared(item, memo, f"{path}.{name}")
            if name in getattr(value, "__dict__", {}):
                own[name] = new
            else:
                object.__setattr__(copied, name, new)
        return copied
    else:
        copied = _deep_copy(value, path)
    memo[id(value)] = copied
    if isinstance(value, dict):
        copied.update((key, _unshared(item, memo, f"{path}[{key!r}]")) for key, item in value.items())
    elif isinstance(value, list | deque):
        items = [_unshared(item, memo, f"{path}[{index}]") for index, item in enumerate(value)]
        copied.clear()
        copied.extend(items)
    return copied


def _deep_copy(value: Any, path: str) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception as error:  # the object's own code decides what it raises
        raise UnwatchableError(
            f"its attribute {tidy(path)} ({type(value).__name__}) cannot be copied, so that a call could change the "
            "model"
        ) from error
