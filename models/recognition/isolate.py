"""Call a module without side effects on it, on its children or on the random state."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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

    The copy and its children are in eval mode and have no hooks. They share no tensor and no container with the
    original, so a forward that counts its calls or changes a buffer in place does so on the copy. Objects of other
    types are shared, and so are tensors too large to belong to a norm.
    """
    return _stand_in(module, {})


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
def one_thread() -> Iterator[None]:
    """Run torch on one thread: for the small probe inputs, several threads only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _stand_in(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    clone: nn.Module = object.__new__(type(module))
    state = {name: _unshared(value, memo) for name, value in vars(module).items() if name not in _HOOKS}
    state |= {name: OrderedDict() for name in _HOOKS if name in vars(module)}
    state["_modules"] = {
        name: child if child is None else _stand_in(child, memo) for name, child in module._modules.items()
    }
    state["training"] = False
    object.__setattr__(clone, "__dict__", state)
    return clone


def _unshared(value: Any, memo: dict[int, Any]) -> Any:
    """The value, copied where it is a tensor or a container; other objects are shared."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        copied: Any = value.detach().clone() if value.numel() <= _LARGEST_COPY else value
        if isinstance(value, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=False)
    elif isinstance(value, dict | list | set | deque | np.ndarray | bytearray):
        copied = copy.copy(value)
    else:
        return value
    memo[id(value)] = copied
    if isinstance(value, dict):
        copied.update((key, _unshared(item, memo)) for key, item in value.items())
    elif isinstance(value, list):
        copied[:] = [_unshared(item, memo) for item in value]
    return copied
