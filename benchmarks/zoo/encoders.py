"""Models of transformers without a causal head: text encoders, vision towers, forecasters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .entries import Entry, small


def pixels(*shape: int) -> Callable[[nn.Module], dict[str, Any]]:
    """Images of a shape."""
    return lambda _: {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(3))}


def _text(name: str, model: str, **options: Any) -> Entry:
    return small(name, "encoder", model, **options)


_VISION: dict[str, Any] = {"image_size": 28, "patch_size": 7, "num_channels": 3}

ENCODERS: tuple[Entry, ...] = (
    _text("eurobert", "EuroBertForMaskedLM"),
    _text("esmc", "EsmcForMaskedLM", num_key_value_heads=4),
    _text("ultrabert", "UltrabertForMaskedLM"),
    _text("neomme", "NeoMMEForMaskedLM", head_dim=16),
    _text("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification"),
    _text("llama_classifier", "LlamaForSequenceClassification"),
    _text("gemma2_token_classifier", "Gemma2ForTokenClassification"),
    _text("qwen3_backbone", "Qwen3Model"),
    _text("mistral_backbone", "MistralModel"),
    _text("t5_encoder", "T5EncoderModel", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, quick=True),
    _text("umt5_encoder", "UMT5EncoderModel", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    _text("bert", "BertForMaskedLM"),
    _text("modernbert", "ModernBertForMaskedLM"),
    _text("aimv2_vision", "Aimv2VisionModel", **_VISION, inputs=pixels(2, 3, 28, 28)),
    _text("siglip_vision", "SiglipVisionModel", **_VISION, inputs=pixels(2, 3, 28, 28)),
    _text("vit", "ViTModel", **_VISION, inputs=pixels(2, 3, 28, 28)),
    _text("internvl_vision_rms", "InternVLVisionModel", image_size=[28, 28], patch_size=[7, 7],
          norm_type="rms_norm", use_qk_norm=True, inputs=pixels(2, 3, 28, 28)),
    _text("sapiens2", "Sapiens2Model", image_size=32, patch_size=8, num_key_value_attention_heads=2,
          num_first_full_attention_layers=1, num_last_full_attention_layers=1, inputs=pixels(2, 3, 32, 32)),
    _text("timesfm", "TimesFmModel", patch_length=8, context_length=32, horizon_length=8, inputs=lambda _: {
        "past_values": torch.randn(2, 32, generator=torch.Generator().manual_seed(3)),
        "past_values_padding": torch.zeros(2, 32, dtype=torch.int64), "freq": torch.zeros(2, 1, dtype=torch.int64),
    }),
)  # fmt: skip
