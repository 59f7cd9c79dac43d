"""A small T5 whose greedy tokens vary, and its exported folder with an encoder and a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rmsnorm_deploy.export.from_torch.export_model import export_model

PROMPTS = ([5, 17, 40, 8, 33, 2, 61], [9, 9, 50])


def t5(seed: int = 15) -> Any:
    """An encoder-decoder of one layer each, in eval mode; its weights are large enough that tokens differ."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3 if "shared" in name else 1.5 / parameter.shape[1] ** 0.5)
    return model


def export_t5(folder: Path) -> Path:
    """The exported folder of `t5()`, with the files of its configuration."""
    checkpoint = folder / "checkpoint"
    t5().save_pretrained(checkpoint)
    export_model(str(checkpoint), folder / "out", with_past=True, weights="pack")  # onnx refuses hard links
    return folder / "out"
