"""Small models of the families that must work, with random weights, and what their norms are expected to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from rmsnorm_deploy.models.spec import NormSpec

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

LLAMA = NormSpec(eps=1e-6, order="cast_then_scale")
OLMO = NormSpec(eps=1e-5, order="scale_then_cast")
GEMMA = NormSpec(eps=1e-6, scale="one_plus_weight")


@dataclass(frozen=True)
class Family:
    """How to build a small model, and how many norms of which spec it has."""

    model: str
    config: str
    options: dict[str, Any]
    norms: dict[NormSpec, int]
    has_cache: bool = True


# Two layers: two norms each, one at the end; QK norms and post norms add theirs.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _COMMON, {LLAMA: 5}),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**_COMMON, "sliding_window": 16}, {LLAMA: 5}),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _COMMON, {LLAMA: 5}),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**_COMMON, "head_dim": 8}, {LLAMA: 9}),
    "gemma2": Family(
        "Gemma2ForCausalLM", "Gemma2Config",
        {**_COMMON, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}, {GEMMA: 9},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**_COMMON, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}, {GEMMA: 13},
    ),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", _COMMON, {LLAMA.replace(eps=1e-5): 5}),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", _COMMON, {OLMO: 9}),
    "gpt_oss": Family(
        "GptOssForCausalLM", "GptOssConfig",
        {**_COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}, {OLMO: 5},
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        {LLAMA: 12}, has_cache=False,
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM", "Mamba2Config",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
         "state_size": 16, "expand": 2, "n_groups": 2, "chunk_size": 8},
        {
            LLAMA.replace(eps=1e-5): 3,
            LLAMA.replace(eps=1e-5, group_size=32, gate="before", activation="silu"): 2,
        },
        has_cache=False,
    ),
}  # fmt: skip
CACHED = [name for name, family in FAMILIES.items() if family.has_cache]


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The family's small model, in eval mode, with weights that let every norm and every layer show.

    Args:
        name: a key of `FAMILIES`.
        dtype: of the parameters.
        options: entries of the config that differ from the family's.
    """
    transformers.utils.logging.set_verbosity_error()
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, family.config)(**{**family.options, **options})
        model = getattr(transformers, family.model)(config)
    generator = torch.Generator().manual_seed(1)
    center = 0.0 if GEMMA in family.norms else 1.0
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in path.lower():
                parameter.copy_(noise * 0.2 + center)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * 0.15)
    return model.eval().to(dtype)
