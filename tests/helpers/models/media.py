"""Small models that read images or sounds beside text, with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

IMAGE = 90
_TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def _spread(model: nn.Module) -> nn.Module:
    """The model with larger weights, so that its tokens differ from each other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25 + (parameter.ndim == 1))
    return model.eval()


def llava() -> nn.Module:
    """Llama with a CLIP encoder: 16 features of an image of 28 x 28 pixels."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT), vision_config=vision, image_token_index=IMAGE
    )
    return _spread(transformers.LlavaForConditionalGeneration(config))


def qwen2_5_vl(**vision: Any) -> nn.Module:
    """Qwen2.5-VL: 4 features of an image of 4 x 4 patches, with windows of 2 x 2 patches."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {name: value for name, value in _TEXT.items() if name != "head_dim"}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rotary},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 7, "window_size": 28,
            "out_hidden_size": 32, "fullatt_block_indexes": [1], **vision,
        },
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return _spread(transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl() -> nn.Module:
    """Qwen3-VL: 4 features of an image of 4 x 4 patches, and those of 2 inner layers for the decoder's first layers."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen3VLConfig(
        text_config={**_TEXT, "num_hidden_layers": 3, "rope_parameters": rotary},
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 7,
            "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16,
        },
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return _spread(transformers.Qwen3VLForConditionalGeneration(config))


def gemma3() -> nn.Module:
    """Gemma 3: 4 features of an image of 28 x 28 pixels, whose tokens attend to each other in both directions."""
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "sliding_window": 64, "query_pre_attn_scalar": 8},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 7,
        },
        mm_tokens_per_image=4, image_token_index=IMAGE,
    )  # fmt: skip
    return _spread(transformers.Gemma3ForConditionalGeneration(config))


def gemma3_inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    """One image in each row, with the types of the tokens."""
    inputs = llava_inputs(batch)
    ids = torch.cat([inputs["input_ids"][:, :6], inputs["input_ids"][:, 18:]], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": (ids == IMAGE).long()}


def voxtral() -> nn.Module:
    """Voxtral: 4 features of a sound of 32 frames."""
    config = transformers.VoxtralConfig(
        text_config={"model_type": "llama", **_TEXT},
        audio_config={
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_mel_bins": 8, "max_source_positions": 16,
        },
        audio_token_id=IMAGE,
    )  # fmt: skip
    return _spread(transformers.VoxtralForConditionalGeneration(config))


def voxtral_inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    """One sound in each row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 80, (batch, 12), generator=generator)
    ids[:, 2:6] = IMAGE
    features = torch.randn(batch, 8, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": features}


def llava_inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    """One image in each row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 80, (batch, 23), generator=generator)
    ids[:, 2:18] = IMAGE
    pixels = torch.randn(batch, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def qwen_inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    """One image in each row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 80, (batch, 12), generator=generator)
    ids[:, 1], ids[:, 2:6] = 92, IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16 * batch, 3 * 7 * 7 * 2, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }
