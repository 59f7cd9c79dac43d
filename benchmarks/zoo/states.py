"""States of one model: dtypes, ties, positions, and wrappers, some of libraries that may not be installed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .entries import Entry, Kind, drawn, small_model

_LLAMA, _QWEN3, _GEMMA2 = "LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"
_SHORT = [1.0, 1.1, 1.2, 1.3]
_LONG = [2.0, 2.5, 3.0, 4.0]


def _state(name: str, make: Callable[[], nn.Module], *, norms: int | None = None, quick: bool = False) -> Entry:
    return Entry(name, "state", make, norms=norms, quick=quick)


def _options(name: str, model: str = _LLAMA, *, quick: bool = False, **options: Any) -> Entry:
    return _state(name, lambda: small_model(model, options), quick=quick)


def _rope(name: str, *, quick: bool = False, **parameters: Any) -> Entry:
    return _options(name, rope_parameters={"rope_theta": 10000.0, **parameters}, quick=quick)


def _changed(name: str, change: Callable[[Any], nn.Module], model: str = _LLAMA, **options: Any) -> Entry:
    return _state(name, lambda: change(small_model(model, options)))


def _half_with_full_norms(model: nn.Module) -> nn.Module:
    model.half()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.float()
    return model


def _reloaded(dtype: torch.dtype) -> Callable[[Any], nn.Module]:
    def change(model: Any) -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return type(model).from_pretrained(folder, dtype=dtype).eval()

    return change


def _checkpointing(model: Any) -> nn.Module:
    model.train()
    model.gradient_checkpointing_enable()
    return model.eval()


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _shared_norms(model: Any) -> nn.Module:
    """One norm module at two places of each layer: it counts once."""
    for layer in model.model.layers:
        layer.post_attention_layernorm = layer.input_layernorm
    return model


def _torch_norms(model: Any) -> nn.Module:
    """The norms of a layer replaced with torch.nn.RMSNorm."""
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            old = getattr(layer, name)
            new = nn.RMSNorm(old.weight.shape[0], eps=old.variance_epsilon)
            new.weight = old.weight
            setattr(layer, name, new)
    return model


class _LowRank(nn.Module):
    """A linear layer with a low-rank update, as LoRA adds it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _low_rank(model: Any) -> nn.Module:
    for layer in model.model.layers:
        layer.self_attn.q_proj = _LowRank(layer.self_attn.q_proj, 4)
    return drawn(model)


class _LastToken(nn.Module):
    """A wrapper of a user: the logits of the last token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, -1:]


def _peft(merged: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import peft

        model = peft.get_peft_model(small_model(_LLAMA, {}), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        drawn(model)
        return model.merge_and_unload().eval() if merged else model.eval()

    return make


def _accelerate() -> nn.Module:
    import accelerate

    return accelerate.cpu_offload(small_model(_LLAMA, {}), torch.device("cpu")).eval()


_OTHER_LIBRARIES: tuple[tuple[str, Kind, str, Callable[[], nn.Module], Any], ...] = (
    ("peft_lora_unmerged", "state", "peft", _peft(merged=False), None),
    ("peft_lora_merged", "state", "peft", _peft(merged=True), None),
    ("accelerate_offloaded", "state", "accelerate", _accelerate, None),
)  # fmt: skip

STATES: tuple[Entry, ...] = (
    _changed("llama_fp16", lambda model: model.half()),
    _changed("llama_bf16", lambda model: model.bfloat16()),
    _changed("llama_fp64", lambda model: model.double()),
    _changed("gemma2_fp16", lambda model: model.half(), _GEMMA2),
    _changed("qwen3_bf16", lambda model: model.bfloat16(), _QWEN3),
    _changed("half_fp32_norms", _half_with_full_norms),
    _changed("reloaded", _reloaded(torch.float32)),
    _changed("reloaded_fp16", _reloaded(torch.float16)),
    _changed("reloaded_tied", _reloaded(torch.float32), tie_word_embeddings=True),
    _changed("checkpointing_flag", _checkpointing),
    _changed("training_mode", lambda model: model.train()),
    _changed("frozen", _frozen),
    _changed("shared_norms", _shared_norms),
    _changed("torch_rmsnorm", _torch_norms),
    _changed("low_rank_update", _low_rank),
    _changed("last_token_wrapper", _LastToken),
    _changed("data_parallel", nn.DataParallel),
    _changed("torch_compile", torch.compile),
    _changed("compiled_layers", lambda model: model.compile() or model),
    _options("tied", tie_word_embeddings=True),
    _options("mqa", num_key_value_heads=1),
    _options("mha", num_key_value_heads=4),
    _options("one_layer", num_hidden_layers=1),
    _options("attention_bias", attention_bias=True, mlp_bias=True),
    _options("wide_head", head_dim=16),
    _options("large_eps", rms_norm_eps=1e-2),
    _options("zero_eps", rms_norm_eps=0.0),
    _options("odd_width", hidden_size=36, num_attention_heads=3, num_key_value_heads=1, head_dim=12),
    _options("eager_attention", attn_implementation="eager"),
    _options("sliding_4", "MistralForCausalLM", sliding_window=4, quick=True),
    _options("sliding_none", "MistralForCausalLM", sliding_window=None),
    _options("qwen2_sliding", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    _options("qwen3_sliding", _QWEN3, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    _options("gemma3_window_4", "Gemma3ForCausalLM", sliding_window=4),
    _options("gemma2_softcap", _GEMMA2, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    _options("phi3_longrope", "Phi3ForCausalLM", original_max_position_embeddings=16, rope_parameters={
        "rope_type": "longrope", "short_factor": _SHORT, "long_factor": _LONG, "rope_theta": 10000.0,
        "original_max_position_embeddings": 16}),
    _options("phi3_partial_rotary", "Phi3ForCausalLM", rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    _rope("rope_linear", rope_type="linear", factor=4.0),
    _rope("rope_dynamic", rope_type="dynamic", factor=4.0),
    _rope("rope_yarn", rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    _rope("rope_llama3", rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
          original_max_position_embeddings=16),
    _rope("rope_longrope", rope_type="longrope", factor=4.0, short_factor=_SHORT, long_factor=_LONG,
          original_max_position_embeddings=16),
    _options("moe_top1", "MixtralForCausalLM", num_experts_per_tok=1),
    _options("moe_top4", "Qwen3MoeForCausalLM", num_experts_per_tok=4),
    _options("moe_sparse_step", "Qwen3MoeForCausalLM", decoder_sparse_step=2),
    *(
        Entry(name, kind, make, inputs, requires=library)
        for name, kind, library, make, inputs in _OTHER_LIBRARIES
    ),
)  # fmt: skip
