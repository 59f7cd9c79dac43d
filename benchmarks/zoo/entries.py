"""What an entry is (`Entry`), small models from transformers' configs, and the norms that are there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["decoder", "hybrid", "encoder-decoder", "vision-language", "encoder", "audio", "diffusion", "state"]
KINDS: tuple[Kind, ...] = (
    "decoder", "hybrid", "encoder-decoder", "vision-language", "encoder", "audio", "diffusion", "state",
)  # fmt: skip
Options = dict[str, Any]
Inputs = Callable[[nn.Module], dict[str, Any]]

VOCABULARY = 97
# What a small model has, wherever its config has a field of this name.
COMMON: Options = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 16, "query_pre_attn_scalar": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 8, "attention_window_size": 16,
}  # fmt: skip
# What the parts of a composed model have besides (vision and audio towers).
_PARTS: Options = {
    **COMMON, "image_size": 28, "patch_size": 7, "depth": 2, "num_heads": 4, "out_hidden_size": 32, "embed_dim": 32,
    "num_position_embeddings": 16, "num_channels": 3, "d_model": 32, "encoder_layers": 2, "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "num_mel_bins": 16, "max_source_positions": 20,
}  # fmt: skip
# RMS norms by the rule: the name of the class contains RMSNorm or RmsNorm, or it is one of these.
_OTHER_NAMES = {
    "Llama4TextL2Norm", "LongT5LayerNorm", "MT5LayerNorm", "Pix2StructLayerNorm", "Pop2PianoLayerNorm",
    "SwitchTransformersLayerNorm", "T5LayerNorm", "UMT5LayerNorm", "UdopLayerNorm",
}  # fmt: skip
# No norms in spite of their names: the second returns 1 / RMS, the others scale or gate the output of a norm inside.
_MISNAMED = {
    "AXK2GatedRMSNorm", "HYV4UnweightedRMSNorm", "LuminaRMSNormZero", "MochiModulatedRMSNorm", "MochiRMSNormZero",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table.

    Attributes:
        name: of the row.
        kind: which steps apply; see `rows.STEPS`.
        make: builds the model, in eval mode, with the same weights each time.
        inputs: keyword arguments of the forward; None for generated tokens.
        norms: the number of norms counted by hand, where the rule by class name does not hold; else None.
        requires: the library that it needs besides transformers; empty for none.
        quick: whether the tests take it through all steps.
    """

    name: str
    kind: Kind
    make: Callable[[], nn.Module]
    inputs: Inputs | None = None
    norms: int | None = None
    requires: str = ""
    quick: bool = False


def small(name: str, kind: Kind, model: str, **options: Any) -> Entry:
    """An entry for a class of transformers with the common small options.

    Args:
        name: of the row.
        kind: of the entry.
        model: name of a model class in transformers.
        options: fields of its config, and the fields `inputs`, `norms` and `quick` of the entry.
    """
    own = {key: options.pop(key) for key in ("inputs", "norms", "quick") if key in options}
    return Entry(name, kind, lambda: small_model(model, options), **own)


def small_model(model: str, options: Mapping[str, Any], config: str = "") -> nn.Module:
    """A small model of transformers with random weights, in eval mode.

    Args:
        model: name of the model class.
        options: fields of the config, in addition to those of `COMMON` that it has.
        config: name of the config class; empty for the model class's own.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model_class = getattr(transformers, model)
    config_class = getattr(transformers, config) if config else model_class.config_class
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = model_class(config_class(**{**common_options(config_class), **_with_parts(config_class, options)}))
    return drawn(built)


def _with_parts(config_class: Any, options: Mapping[str, Any]) -> Options:
    """The options, with those of every part of a composed config that has fields for the common ones."""
    from transformers import CONFIG_MAPPING, AutoConfig

    result = dict(options)
    for name, default in getattr(config_class, "sub_configs", {}).items():
        given = result.get(name, {})
        part = CONFIG_MAPPING[given["model_type"]] if "model_type" in given else default
        if part is AutoConfig:  # any model; the composed config has a default for it
            continue
        result[name] = {**common_options(part, _PARTS), **_with_parts(part, given)}
    return result


def common_options(config_class: type, common: Mapping[str, Any] = COMMON) -> Options:
    """The common options that a config class has fields for."""
    fields = {name for base in config_class.__mro__ for name in inspect.get_annotations(base)}
    fields |= set(inspect.signature(config_class).parameters)
    return {name: value for name, value in common.items() if name in fields}


def drawn(model: nn.Module) -> nn.Module:
    """The model in eval mode, with weights under which every norm and layer shows in the tokens."""
    generator = torch.Generator().manual_seed(1)
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            norm = "norm" in type(module).__name__.lower()
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen or not parameter.is_floating_point():
                    continue
                seen.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if norm and parameter.ndim == 1:
                    parameter.add_(noise * 0.2)
                elif parameter.ndim in (2, 3) and name != "A_log":
                    parameter.copy_(noise * 0.15)
                elif name == "bias":
                    parameter.add_(noise * 0.05)
    return model.eval()


def norms_there(entry: Entry, model: nn.Module) -> int:
    """The number of RMS norms of a model, counted without the package: by class name, or by hand."""
    if entry.norms is not None:
        return entry.norms
    names = [type(module).__name__ for module in model.modules()]
    return sum(("rmsnorm" in name.lower() and name not in _MISNAMED) or name in _OTHER_NAMES for name in names)


def padded_prompt() -> dict[str, Tensor]:
    """A batch of two prompts; the first is padded on the left by three tokens."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 90, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3], ids[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
