"""Load a transformers model with its weights at rest (`load_at_rest`)."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .checkpoint import stored_tensors, weight_files_of
from .mapped_file import is_mapped, release_pages
from .side_file import SideFile

# Computed tensors of fewer bytes stay in memory.
_SMALL = 1 << 20


def can_stay_at_rest(cls: Any, config: Any, folder: Path) -> bool:
    """Whether `load_at_rest` can load a checkpoint: not with adapters, quantized weights or weights in other files.

    Args:
        cls: the model's class.
        config: its config.
        folder: the checkpoint's folder.

    Raises:
        UsageError: the checkpoint's index is damaged, or names files that do not exist.
    """
    named = getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None)
    if named or getattr(config, "quantization_config", None) or (folder / "adapter_config.json").exists():
        return False
    return hasattr(cls, "config_class") and bool(weight_files_of(folder))


def load_at_rest(
    cls: Any, config: Any, folder: Path, dtype: str | None, side_folder: Path | None = None
) -> tuple[Any, dict[str, Any]]:
    """Load a model as `cls.from_pretrained(folder)` does, without reading the weights that it uses as they are stored.

    transformers maps the keys and computes what it computes (experts in one tensor, another dtype); these results are
    written to a side file one by one.

    Args:
        cls: a class of transformers, not an auto class.
        config: the checkpoint's config.
        folder: the checkpoint's folder.
        dtype: see `load_model`.
        side_folder: where the side file is created, if one is needed.

    Returns:
        The model, and what `from_pretrained(..., output_loading_info=True)` returns beside it.
    """
    tensors = stored_tensors(weight_files_of(folder))
    with _computed_weights_at_rest(side_folder), mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}):
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _read_generation_config(model, folder)
    return model, info


@contextmanager
def _computed_weights_at_rest(folder: Path | None) -> Iterator[None]:
    """transformers with a loader that writes each large tensor that it computed to a side file."""
    from transformers import core_model_loading

    original = getattr(core_model_loading, "set_param_for_module", None)
    if original is None:  # another version: what is computed stays in memory
        yield
        return
    side: list[SideFile] = []

    @functools.wraps(original)
    def set_param(model: Any, name: str, value: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if value.numel() * value.element_size() > _SMALL and not is_mapped(value):
            side[:] = side or [SideFile(folder)]
            stored = side[0].add(value)
            value = torch.nn.Parameter(stored, value.requires_grad) if isinstance(value, torch.nn.Parameter) else stored
            release_pages()
        return original(model, name, value, *arguments, **keywords)

    with mock.patch.object(core_model_loading, "set_param_for_module", set_param):
        yield


def _read_generation_config(model: Any, folder: Path) -> None:
    """What `from_pretrained` reads beside the weights."""
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
