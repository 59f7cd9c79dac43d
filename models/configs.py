"""Read a value of a model's config (`config_value`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def config_value(config: Any, name: str) -> Any:
    """The value of this name in a config, an object or a mapping; None if there is none, or another for each layer.

    transformers raises an error of its own for a value that differs between layers, such as Gemma 4's `head_dim`.
    """
    if isinstance(config, Mapping):
        return config.get(name)
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None
