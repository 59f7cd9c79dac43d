"""Models as `torch.onnx.export` writes them at its default settings, with no help from this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.families import build


class Logits(nn.Module):
    """The model without its cache: what people wrap around a model before they export it."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, values, strict=True)), use_cache=False).logits


def plain_export(name: str, dtype: torch.dtype, path: Path, **options: Any) -> nn.Module:
    """Export a family's small model; `options` are those of `torch.onnx.export`. Returns the model."""
    model = build(name, dtype)
    if name == "gpt_oss":  # its experts' loop over tokens cannot be exported
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        feeds["decoder_input_ids"] = ids.clone()
    if name == "mamba2":
        del feeds["attention_mask"]
    with torch.no_grad():
        torch.onnx.export(
            Logits(model, tuple(feeds)).eval(),
            tuple(feeds.values()),
            path,
            input_names=list(feeds),
            verbose=False,
            **options,
        )
    return model
