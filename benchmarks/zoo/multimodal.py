"""Models of transformers that read images or sound beside tokens; without `_image`, with tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .decoders import GEMMA3N
from .entries import Entry, small

_IMAGE_TOKEN = 90
_SIGLIP: dict[str, Any] = {"model_type": "siglip_vision_model"}
_CLIP: dict[str, Any] = {"model_type": "clip_vision_model"}
_LLAMA: dict[str, Any] = {"model_type": "llama"}
_QWEN2: dict[str, Any] = {"model_type": "qwen2"}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_QWEN_IDS: dict[str, Any] = {
    "image_token_id": _IMAGE_TOKEN, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
}  # fmt: skip
_QWEN_TOWER: dict[str, Any] = {"in_channels": 3, "fullatt_block_indexes": [1], "window_size": 28}
_DEEP: dict[str, Any] = {"deepstack_visual_indexes": [0]}
_INTERN: dict[str, Any] = {"vision_config": {"image_size": [28, 28], "patch_size": [7, 7]}}


def image_inputs(tokens: int, *shape: int, **more: Any) -> Callable[[nn.Module], dict[str, Any]]:
    """Inputs of two rows with one image each: so many image tokens, then text; and pixels of a shape."""

    def make(_: nn.Module) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(3, 80, (2, tokens + 7), generator=generator)
        ids[:, 2 : 2 + tokens] = _IMAGE_TOKEN
        pixels = torch.randn(shape, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **more}

    return make


def grid_inputs(model: Any) -> dict[str, Any]:
    """Inputs of two rows with one image of 4 x 4 patches each, which are 4 image tokens."""
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = image_inputs(4, 32, width, image_grid_thw=torch.tensor([[1, 4, 4]] * 2))(model)
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == _IMAGE_TOKEN).long()}


def typed_inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs of two rows with one image of 4 tokens each, with the types of the tokens."""
    inputs = image_inputs(4, 2, 3, 28, 28)(model)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == _IMAGE_TOKEN).long()}


def sound_inputs(model: Any) -> dict[str, Any]:
    """Inputs of two rows with one sound each, of the longest length."""
    audio = model.config.audio_config
    frames = 2 * audio.max_source_positions
    tokens = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
    inputs = image_inputs(tokens, 2, audio.num_mel_bins, frames)(model)
    return {"input_features": inputs.pop("pixel_values"), **inputs}


def _vision(name: str, model: str, **options: Any) -> Entry:
    return small(name, "vision-language", model, **options)


_LLAVA: dict[str, Any] = {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_index": _IMAGE_TOKEN}
_GEMMA3: dict[str, Any] = {"vision_config": _SIGLIP, "mm_tokens_per_image": 4, "image_token_index": _IMAGE_TOKEN}
_IDEFICS: dict[str, Any] = {"image_token_id": _IMAGE_TOKEN, "text_config": _LLAMA}

MULTIMODAL: tuple[Entry, ...] = (
    _vision("gemma3", "Gemma3ForConditionalGeneration", **_GEMMA3),
    _vision("gemma3_image", "Gemma3ForConditionalGeneration", **_GEMMA3, inputs=typed_inputs),
    _vision("llava", "LlavaForConditionalGeneration", **_LLAVA),
    _vision("llava_image", "LlavaForConditionalGeneration", **_LLAVA, inputs=image_inputs(16, 2, 3, 28, 28)),
    _vision(
        "llava_onevision", "LlavaOnevisionForConditionalGeneration", text_config=_QWEN2, vision_config=_SIGLIP,
        image_token_index=_IMAGE_TOKEN, video_token_index=91,
    ),
    _vision("pixtral", "LlavaForConditionalGeneration", text_config={"model_type": "mistral"},
            vision_config={"model_type": "pixtral"}, image_token_index=_IMAGE_TOKEN),
    _vision("mistral3", "Mistral3ForConditionalGeneration", image_token_index=_IMAGE_TOKEN,
            text_config={"model_type": "mistral"}, vision_config={"model_type": "pixtral"}),
    _vision("qwen2_vl", "Qwen2VLForConditionalGeneration", **_QWEN_IDS, text_config=_MROPE),
    _vision("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", **_QWEN_IDS, text_config=_MROPE,
            vision_config=_QWEN_TOWER),
    _vision("qwen2_5_vl_image", "Qwen2_5_VLForConditionalGeneration", **_QWEN_IDS, text_config=_MROPE,
            vision_config=_QWEN_TOWER, inputs=grid_inputs),
    _vision("qwen3_vl_image", "Qwen3VLForConditionalGeneration", **_QWEN_IDS, text_config=_MROPE, vision_config=_DEEP,
            inputs=grid_inputs),
    _vision("qwen3_vl", "Qwen3VLForConditionalGeneration", **_QWEN_IDS, text_config=_MROPE, vision_config=_DEEP),
    _vision("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", **_QWEN_IDS, text_config=_MROPE,
            vision_config=_DEEP),
    _vision("glm4v", "Glm4vForConditionalGeneration", **_QWEN_IDS, text_config=_MROPE),
    _vision("idefics2", "Idefics2ForConditionalGeneration", image_token_id=_IMAGE_TOKEN,
            text_config={"model_type": "mistral"},
            perceiver_config={"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1,
                              "resampler_n_heads": 4, "resampler_head_dim": 8}),
    _vision("idefics3", "Idefics3ForConditionalGeneration", **_IDEFICS),
    _vision("idefics3_image", "Idefics3ForConditionalGeneration", **_IDEFICS,
            inputs=image_inputs(4, 2, 1, 3, 28, 28)),
    _vision("smolvlm", "SmolVLMForConditionalGeneration", **_IDEFICS),
    _vision("smolvlm_image", "SmolVLMForConditionalGeneration", **_IDEFICS, inputs=image_inputs(4, 2, 1, 3, 28, 28)),
    _vision("internvl", "InternVLForConditionalGeneration", **_INTERN, text_config=_QWEN2,
            image_token_id=_IMAGE_TOKEN),
    _vision("internvl_image", "InternVLForConditionalGeneration", **_INTERN, text_config=_QWEN2,
            image_token_id=_IMAGE_TOKEN, inputs=image_inputs(4, 2, 3, 28, 28)),
    _vision("internvl_rms", "InternVLForConditionalGeneration", text_config=_QWEN2, image_token_id=_IMAGE_TOKEN,
            vision_config={**_INTERN["vision_config"], "norm_type": "rms_norm", "use_qk_norm": True}),
    _vision("mllama", "MllamaForConditionalGeneration", image_token_index=_IMAGE_TOKEN,
            text_config={"cross_attention_layers": [1]},
            vision_config={"intermediate_layers_indices": [0], "num_global_layers": 1, "attention_heads": 4,
                           "vision_output_dim": 64}),
    _vision("aria", "AriaForConditionalGeneration", image_token_index=_IMAGE_TOKEN,
            vision_config={"model_type": "idefics3_vision"}, projector_patch_to_query_dict={16: 4}),
    _vision("chameleon", "ChameleonForConditionalGeneration",
            vocabulary_map={"<image>": _IMAGE_TOKEN, "IMGIMGAZ": 91, "IMGIMGBZ": 92},
            vq_config={"embed_dim": 8, "num_embeddings": 8, "base_channels": 32, "channel_multiplier": [1],
                       "latent_channels": 8, "resolution": 16, "num_res_blocks": 1}),
    _vision("ovis2", "Ovis2ForConditionalGeneration", hidden_size=32, text_config=_QWEN2,
            image_token_id=_IMAGE_TOKEN, visual_indicator_token_ids=[91, 92, 93, 94, 95]),
    _vision("paligemma", "PaliGemmaForConditionalGeneration", text_config={"model_type": "gemma"},
            vision_config=_SIGLIP, image_token_index=_IMAGE_TOKEN, projection_dim=32),
    _vision("gemma3n", "Gemma3nForConditionalGeneration", text_config=GEMMA3N),
    small("qwen2_audio", "audio", "Qwen2AudioForConditionalGeneration", text_config=_QWEN2,
          audio_config={"model_type": "qwen2_audio_encoder"}, audio_token_index=_IMAGE_TOKEN),
    small("voxtral", "audio", "VoxtralForConditionalGeneration", text_config=_LLAMA, audio_token_id=_IMAGE_TOKEN,
          audio_config={"model_type": "voxtral_encoder"}),
    small("voxtral_sound", "audio", "VoxtralForConditionalGeneration", text_config=_LLAMA, audio_token_id=_IMAGE_TOKEN,
          audio_config={"model_type": "voxtral_encoder", "hidden_size": 16, "intermediate_size": 64,
                        "num_attention_heads": 4}, inputs=sound_inputs),
)  # fmt: skip
