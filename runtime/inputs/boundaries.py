"""What a model's config says of its inputs: lengths at which it computes differently, and special token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...models.configs import config_value

if TYPE_CHECKING:
    from torch import nn

# Lengths after which a model computes something else: keys of a config, with what they bound.
_LENGTHS = {
    "sliding_window": "the sliding window",
    "attention_window": "the attention window",
    "local_attention": "the local attention window",
    "attention_chunk_size": "the attention chunk",
    "window_size": "the attention window",
    "relative_attention_num_buckets": "the buckets of relative positions",
    "relative_attention_max_distance": "the largest relative position",
    "original_max_position_embeddings": "the original context",
    "max_seq_len_cached": "the cached rotary table",
}
# Types of rotary embedding that change beyond `max_position_embeddings`.
_CHANGING_ROTARY = ("dynamic", "longrope", "yarn")
_PARTS = ("text_config", "encoder", "decoder", "rope_scaling", "rope_parameters")
_NOT_TEXT = ("image", "video", "audio", "vision", "speech")


def lengths_named(model: nn.Module) -> dict[int, str]:
    """The lengths after which the model computes differently, in ascending order, with what they bound.

    They are read from the config of a transformers model, and from attributes of the same names of other models'
    `config`. Windows that the config disables are left out.
    """
    found: dict[int, str] = {}
    for config in _configs(getattr(model, "config", None)):
        windowless = config_value(config, "use_sliding_window") is False
        for key, what in _LENGTHS.items():
            value = config_value(config, key)
            if key == "sliding_window" and windowless:
                continue
            for length in value if isinstance(value, list | tuple) else [value]:
                if isinstance(length, int) and not isinstance(length, bool) and length > 0:
                    found.setdefault(length, f"{what}, {key}")
        if config_value(config, "rope_type") in _CHANGING_ROTARY or config_value(config, "type") in _CHANGING_ROTARY:
            cap = config_value(getattr(model, "config", None), "max_position_embeddings")
            if isinstance(cap, int):
                found.setdefault(cap, "the rotary embedding, max_position_embeddings")
    return dict(sorted(found.items()))


def longest_length(model: nn.Module) -> int | None:
    """The largest number of positions that the config allows; None if it names none."""
    sizes = [
        config_value(config, key)
        for config in _configs(getattr(model, "config", None))
        for key in ("max_position_embeddings", "n_positions", "max_length_positions")
    ]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    return min(known) if known else None


def last_position(model: nn.Module) -> int | None:
    """The last position before which the model computes alike: that of the original context, or of the longest length.

    None if the config names neither.
    """
    lengths = [longest_length(model)]
    lengths += [length for length, what in lengths_named(model).items() if "original_max_position" in what]
    known = [length for length in lengths if length is not None]
    return min(known) - 1 if known else None


def special_ids(model: nn.Module, vocabulary: int) -> list[int]:
    """The token ids that the config names (such as `bos_token_id`), without those of images and sounds."""
    found: set[int] = set()
    for config in _configs(getattr(model, "config", None)):
        for key in config if isinstance(config, Mapping) else dir(config):
            value = config_value(config, str(key)) if str(key).endswith("token_id") else None
            if not str(key).endswith("token_id") or any(word in str(key) for word in _NOT_TEXT):
                continue
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < vocabulary:
                    found.add(item)
    return sorted(found)


def _configs(config: Any) -> Iterator[Any]:
    """The config and those of its parts."""
    if config is None:
        return
    yield config
    for part in _PARTS:
        inner = config_value(config, part)
        if isinstance(inner, Mapping) or hasattr(inner, "__dict__"):
            yield from _configs(inner)
            if isinstance(inner, Mapping):  # the rotary parameters of each kind of layer
                yield from (value for value in inner.values() if isinstance(value, Mapping))
