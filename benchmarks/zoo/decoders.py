"""Decoders of transformers with attention in every layer."""

from __future__ import annotations

from typing import Any

from .entries import Entry, small

# Multi-head latent attention has as many keys as queries.
_LATENT: dict[str, Any] = {"num_key_value_heads": 4}
# Many heads: with few, several tokens score exactly 0, and PyTorch does not define which of them are selected.
_INDEXED: dict[str, Any] = {**_LATENT, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 8}
_LONGCAT: dict[str, Any] = {
    **_LATENT, "num_layers": 1, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "zero_expert_num": 2,
}  # fmt: skip
GEMMA3N: dict[str, Any] = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": 97, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip

# Row, class (without ForCausalLM), and options beyond the common ones.
_ARCHITECTURES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("afmoe", "Afmoe", {}),
    ("apertus", "Apertus", {}),
    ("arcee", "Arcee", {}),
    ("aria_text", "AriaText", {}),
    ("axk1", "AXK1", _LATENT),
    ("axk2", "AXK2", _LATENT),
    ("beam", "Beam", {}),
    ("bitnet", "BitNet", {}),
    ("cohere2_moe", "Cohere2Moe", {}),
    ("cwm", "Cwm", {}),
    ("deepseek_v2", "DeepseekV2", _LATENT),
    ("deepseek_v3", "DeepseekV3", _LATENT),
    ("deepseek_v32", "DeepseekV32", _INDEXED),
    ("deepseek_v4", "DeepseekV4", {}),
    ("diffllama", "DiffLlama", {}),
    ("doge", "Doge", {}),
    ("dots1", "Dots1", {}),
    ("dots3_note", "Dots3Note", _LATENT),
    ("emu3_text", "Emu3", {}),
    ("ernie4_5", "Ernie4_5", {}),
    ("ernie4_5_moe", "Ernie4_5_Moe", {}),
    ("exaone4", "Exaone4", {}),
    ("exaone_moe", "ExaoneMoe", {}),
    ("flex_olmo", "FlexOlmo", {}),
    ("flint", "Flint", {}),
    ("gemma", "Gemma", {}),
    ("gemma2", "Gemma2", {}),
    ("gemma3_text", "Gemma3", {}),
    ("gemma3n_text", "Gemma3n", GEMMA3N),
    ("gemma4_text", "Gemma4", _GEMMA4),
    ("gemma4_unified_text", "Gemma4Unified", {}),
    ("glm", "Glm", {}),
    ("glm4", "Glm4", {}),
    ("glm4_moe", "Glm4Moe", {}),
    ("glm4_moe_lite", "Glm4MoeLite", _LATENT),
    ("glm_moe_dsa", "GlmMoeDsa", _INDEXED),
    ("gpt_oss", "GptOss", {}),
    ("granite", "Granite", {}),
    ("granite_swa", "GraniteSWA", {}),
    ("granitemoe", "GraniteMoe", {}),
    ("granitemoe_swa", "GraniteMoeSWA", {}),
    ("granitemoeshared", "GraniteMoeShared", {}),
    ("helium", "Helium", {}),
    ("hrm_text", "HrmText", {}),
    ("hunyuan_v1_dense", "HunYuanDenseV1", {}),
    ("hunyuan_v1_moe", "HunYuanMoEV1", {}),
    ("hy_v3", "HYV3", {}),
    ("hy_v4", "HYV4", {}),
    ("hyperclovax", "HyperCLOVAX", {}),
    ("inkling_text", "Inkling", {}),
    ("inkling2_text", "Inkling2", {}),
    ("jetmoe", "JetMoe", {"kv_channels": 8}),
    ("kolibri1", "Kolibri1", {}),
    ("laguna", "Laguna", {}),
    ("llama", "Llama", {}),
    ("llama4_text", "Llama4", {"intermediate_size_mlp": 48}),
    ("longcat_flash", "LongcatFlash", _LONGCAT),
    ("mellum", "Mellum", {}),
    ("mimo_v2_flash", "MiMoV2Flash", {}),
    ("minicpm3", "MiniCPM3", _LATENT),
    ("minimax_m2", "MiniMaxM2", {}),
    ("minimax_m3_text", "MiniMaxM3VL", {}),
    ("ministral", "Ministral", {}),
    ("ministral3", "Ministral3", {}),
    ("mistral", "Mistral", {}),
    ("mistral4", "Mistral4", _LATENT),
    ("mixtral", "Mixtral", {}),
    ("mllama_text", "Mllama", {"cross_attention_layers": []}),
    ("moshi_text", "Moshi", {"ffn_dim": 96, "audio_vocab_size": 32}),
    ("nanochat", "NanoChat", {}),
    ("olmo2", "Olmo2", {}),
    ("olmo3", "Olmo3", {}),
    ("olmoe", "Olmoe", {}),
    ("phi3", "Phi3", {}),
    ("qwen2", "Qwen2", {}),
    ("qwen2_moe", "Qwen2Moe", {}),
    ("qwen3", "Qwen3", {}),
    ("qwen3_moe", "Qwen3Moe", {}),
    ("seed_oss", "SeedOss", {}),
    ("smollm3", "SmolLM3", {}),
    ("solar_open", "SolarOpen", {}),
    ("vaultgemma", "VaultGemma", {}),
    ("youtu", "Youtu", _LATENT),
)
# These have no RMS norm: nothing may be found in them.
_WITHOUT_NORMS = (
    ("bloom", "BloomForCausalLM", {}),
    ("falcon", "FalconForCausalLM", {}),
    ("gpt2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    ("gpt_neox", "GPTNeoXForCausalLM", {}),
    ("olmo", "OlmoForCausalLM", {}),
    ("opt", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("phi", "PhiForCausalLM", {}),
    ("stablelm", "StableLmForCausalLM", {}),
)
_QUICK = {"cwm", "exaone4"}

DECODERS: tuple[Entry, ...] = (
    *(
        small(name, "decoder", f"{model}ForCausalLM", quick=name in _QUICK, **options)
        for name, model, options in _ARCHITECTURES
    ),
    *(small(name, "decoder", model, **options) for name, model, options in _WITHOUT_NORMS),
)
