"""Decoders of transformers with recurrent layers: state spaces, linear attention, short convolutions."""

from __future__ import annotations

from typing import Any

from .entries import Entry, small

_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8,
}  # fmt: skip
_BOTH = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR: dict[str, Any] = {
    **_BOTH, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_ZAMBA: dict[str, Any] = {
    "num_hidden_layers": 5, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    "use_mamba_kernels": False, "mamba_d_state": 8,
}  # fmt: skip

HYBRIDS: tuple[Entry, ...] = (
    small("bailing_hybrid", "hybrid", "BailingHybridForCausalLM", num_key_value_heads=4, layer_group_size=2),
    small("bamba", "hybrid", "BambaForCausalLM", **_MAMBA, attn_layer_indices=[1]),
    small("falcon_h1", "hybrid", "FalconH1ForCausalLM", **_MAMBA, mamba_d_ssm=64),
    small("falcon_h1_rms", "hybrid", "FalconH1ForCausalLM", **_MAMBA, mamba_d_ssm=64, mamba_rms_norm=True),
    small("falcon_mamba", "hybrid", "FalconMambaForCausalLM"),
    small(
        "granitemoehybrid", "hybrid", "GraniteMoeHybridForCausalLM", **_MAMBA, **_BOTH, shared_intermediate_size=24
    ),
    small(
        "jamba", "hybrid", "JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
        mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    small(
        "kimi_linear", "hybrid", "KimiLinearForCausalLM", **_BOTH, num_key_value_heads=4, linear_head_dim=8,
        linear_num_heads=4,
    ),
    small("lfm2", "hybrid", "Lfm2ForCausalLM", **_CONVOLUTION),
    small("lfm2_moe", "hybrid", "Lfm2MoeForCausalLM", **_CONVOLUTION, num_dense_layers=1),
    small("lfm3", "hybrid", "Lfm3ForCausalLM", **_CONVOLUTION),
    small("mamba", "hybrid", "MambaForCausalLM"),
    small(
        "mamba2", "hybrid", "Mamba2ForCausalLM", num_heads=8, head_dim=8, state_size=16, n_groups=2, chunk_size=8,
    ),
    small("minimax", "hybrid", "MiniMaxForCausalLM", **_BOTH, block_size=8),
    small(
        "nemotron_h", "hybrid", "NemotronHForCausalLM", layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=16, n_groups=2, chunk_size=8,
        moe_shared_expert_intermediate_size=24, use_mamba_kernels=False,
    ),
    small("olmo_hybrid", "hybrid", "OlmoHybridForCausalLM", **_LINEAR),
    small("qwen3_5_text", "hybrid", "Qwen3_5ForCausalLM", **_LINEAR),
    small("qwen3_5_moe_text", "hybrid", "Qwen3_5MoeForCausalLM", **_LINEAR),
    small("qwen3_next", "hybrid", "Qwen3NextForCausalLM", **_LINEAR),
    small(
        "qwen4_exp_text", "hybrid", "Qwen4ExpForCausalLM", **_LINEAR, ngram_vocab_size_base=100, hc_lowrank=8,
        indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2,
    ),
    small(
        "recurrent_gemma", "hybrid", "RecurrentGemmaForCausalLM", block_types=["recurrent", "attention"],
        lru_width=32,
    ),
    small("xlstm", "hybrid", "xLSTMForCausalLM", num_heads=4, num_blocks=2, chunk_size=8, qk_dim_factor=1.0),
    small("zamba", "hybrid", "ZambaForCausalLM", **{
        **_ZAMBA, "num_hidden_layers": 6, "mamba_dt_rank": 4, "attention_head_dim": 16,
    }),
    small("zamba2", "hybrid", "Zamba2ForCausalLM", **{
        **_ZAMBA, "num_hidden_layers": 6, "mamba_d_state": 16, "n_mamba_heads": 8, "chunk_size": 8, "adapter_rank": 8,
    }),
    small("zaya", "hybrid", "ZayaForCausalLM", num_experts_per_tok=1, router_hidden_size=16),
)  # fmt: skip
