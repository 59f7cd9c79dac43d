"""The number of heads and their size in the inputs of a KV cache whose dims are only named (`cache_sizes`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...models.configs import config_value
from ..runners.base import TensorInfo
from .synthetic import head_dims

if TYPE_CHECKING:
    from torch import nn

# Configs with one of these have caches of other sizes than their heads state.
_OTHER_CACHES = ("kv_lora_rank", "v_head_dim", "global_head_dim")


def cache_sizes(infos: Sequence[TensorInfo], model: nn.Module) -> dict[str, int]:
    """The sizes of the named dims for heads and head size in a cache's inputs, from the model's config.

    A dim whose size the config does not state is absent.
    """
    config = getattr(model, "config", None)
    config = config_value(config, "text_config") or config
    if config is None or any(config_value(config, name) is not None for name in _OTHER_CACHES):
        return {}
    heads, width = (config_value(config, name) for name in ("num_attention_heads", "hidden_size"))
    each = None
    if isinstance(heads, int) and isinstance(width, int) and heads > 0 and width % heads == 0:
        each = width // heads
    known = {
        "num_key_value_heads": config_value(config, "num_key_value_heads") or heads,
        "head_dim": config_value(config, "head_dim") or each,
    }
    sizes: dict[str, int] = {}
    for info in infos:
        for index, field in head_dims(info).items():
            dim, size = (info.shape or ())[index], known[field]
            if isinstance(dim, str) and isinstance(size, int):
                sizes[dim] = size
    return sizes
