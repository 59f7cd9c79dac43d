"""The names of a cache's tensors in exported files (`cache_name`), from where transformers keeps them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from .metadata import PAST, PRESENT

Value = TypeVar("Value")

# What transformers calls the argument and the output that are a cache: `cache` is the name from 5.24 on.
_CACHES = re.compile(r"^(?:past_key_values|cache_params|cache)\.")
_LAYER = re.compile(r"^(?:(self|cross)_attention_cache\.)?layers\.(\d+)\.(\w+)(?:\.(\d+))?$")
# The two caches of an encoder-decoder, as other exporters call them.
_SIDES = {None: "", "self": "decoder.", "cross": "encoder."}
_CROSS = ".encoder."
_TENSORS = {"keys": "key", "values": "value", "conv_states": "conv_state", "recurrent_states": "recurrent_state"}


def cache_name(path: str) -> str | None:
    """The name of a cache's tensor, without `past_key_values.` or `present.`; None if the path is not in a cache.

    Args:
        path: where transformers keeps it, such as `past_key_values.layers.0.keys`. The result is `0.key`, and likewise
            `0.value`, `0.conv_state` and `0.recurrent_state` (with `.1` for a second one), and `0.decoder.key` and
            `0.encoder.key` for the caches of self-attention and cross-attention. Other tensors keep their path.
    """
    rest = _CACHES.sub("", path, count=1)
    if rest == path:
        return None
    match = _LAYER.match(rest)
    if match is None:
        return rest
    side, layer, tensor, number = match.groups()
    suffix = f".{number}" if number not in (None, "0") else ""
    if tensor not in _TENSORS and number is not None:
        suffix = f".{number}"
    return f"{layer}.{_SIDES[side]}{_TENSORS.get(tensor, tensor)}{suffix}"


def past_name(path: str) -> str | None:
    """The name of a file's input for a cache's tensor; None if the path is not in a cache."""
    name = cache_name(path)
    return None if name is None else PAST + name


def present_name(path: str) -> str | None:
    """The name of a file's output for a cache's tensor; None if the path is not in a cache."""
    name = cache_name(path)
    return None if name is None else PRESENT + name


def is_past(name: str) -> bool:
    """Whether an input is part of a cache that a step changes: not a cross-attention cache, which stays the same."""
    return name.startswith(PAST) and _CROSS not in name


def is_cross(name: str) -> bool:
    """Whether an input is part of a cross-attention cache."""
    return name.startswith(PAST) and _CROSS in name


def is_present(name: str) -> bool:
    """Whether an output is part of a cache that a step changes; see `is_past`."""
    return name.startswith(PRESENT) and _CROSS not in name


def past_to_present(name: str) -> str:
    """The output that is the next run's input of this name."""
    return PRESENT + name.removeprefix(PAST)


def present_to_past(outputs: Mapping[str, Value]) -> dict[str, Value]:
    """The cache among the outputs of a run, arrays or tensors, under the names of the inputs of the next run."""
    return {PAST + name.removeprefix(PRESENT): value for name, value in outputs.items() if is_present(name)}
