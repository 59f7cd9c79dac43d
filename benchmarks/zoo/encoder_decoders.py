"""Encoder-decoders of transformers that read tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from .entries import COMMON, VOCABULARY, Entry, common_options, drawn, small

_T5: dict[str, Any] = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
_SWITCH: dict[str, Any] = {
    **_T5, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    "expert_capacity": 64,
}  # fmt: skip
_BART: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip


def _t5gemma() -> nn.Module:
    import torch
    import transformers

    module = transformers.T5GemmaModuleConfig
    part = {**common_options(module), "layer_types": ["sliding_attention", "full_attention"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.T5GemmaConfig(
            encoder=module(**part), decoder=module(**part, is_decoder=True), vocab_size=VOCABULARY,
            pad_token_id=COMMON["pad_token_id"], decoder_start_token_id=COMMON["bos_token_id"],
        )  # fmt: skip
        return drawn(transformers.T5GemmaForConditionalGeneration(config))


ENCODER_DECODERS: tuple[Entry, ...] = (
    small("t5", "encoder-decoder", "T5ForConditionalGeneration", **_T5),
    small("t5_gated", "encoder-decoder", "T5ForConditionalGeneration", **_T5, feed_forward_proj="gated-gelu"),
    small("mt5", "encoder-decoder", "MT5ForConditionalGeneration", **_T5),
    small("umt5", "encoder-decoder", "UMT5ForConditionalGeneration", **_T5),
    small("longt5_local", "encoder-decoder", "LongT5ForConditionalGeneration", **_T5, local_radius=4),
    small(
        "longt5_global", "encoder-decoder", "LongT5ForConditionalGeneration", **_T5, local_radius=4,
        encoder_attention_type="transient-global", global_block_size=4,
    ),
    small("switch_transformers", "encoder-decoder", "SwitchTransformersForConditionalGeneration", **_SWITCH),
    Entry("t5gemma", "encoder-decoder", _t5gemma),
    small("bart", "encoder-decoder", "BartForConditionalGeneration", **_BART),
    small("marian", "encoder-decoder", "MarianMTModel", **_BART, decoder_start_token_id=0),
)  # fmt: skip
