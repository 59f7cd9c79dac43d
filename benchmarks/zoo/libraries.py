"""Models of diffusers, timm, x-transformers and litgpt, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .entries import Entry, Kind, Options, drawn

Call = Callable[[nn.Module], dict[str, Any]]
_HEADS: Options = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_IMAGE_ROPE: Options = {"axes_dims_rope": (4, 6, 6)}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _tokens(*shape: int) -> Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(7))


def _mask(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, -2:] = 0
    return mask


def _built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return drawn(make())


def _diffusers(name: str, model: str, inputs: Call, *, norms: int | None = None, **options: Any) -> Entry:
    def make() -> nn.Module:
        import diffusers

        return _built(lambda: getattr(diffusers, model)(**options))

    return Entry(name, "diffusion", make, inputs, norms, requires="diffusers")


def _timm(
    name: str, model: str, size: int = 32, norms: int | None = None, layers: bool = False, **options: Any
) -> Entry:
    """An entry for a model of timm; with `layers`, `norm_layer` is the name of a class in `timm.layers`."""

    def make() -> nn.Module:
        import timm
        import timm.layers

        own = dict(options)
        if layers:
            own["norm_layer"] = getattr(timm.layers, own["norm_layer"])
        return _built(lambda: timm.create_model(model, pretrained=False, num_classes=10, **own))

    return Entry(name, "encoder", make, lambda _: {"x": _random(2, 3, size, size)}, norms, requires="timm")


def _x_transformers(name: str, kind: Kind = "encoder", *, norms: int | None = None, encoder: bool = False,
                    **options: Any) -> Entry:  # fmt: skip
    def make() -> nn.Module:
        import x_transformers

        layers = x_transformers.Encoder if encoder else x_transformers.Decoder
        return _built(
            lambda: x_transformers.TransformerWrapper(
                num_tokens=97, max_seq_len=64, attn_layers=layers(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
            )
        )

    return Entry(name, kind, make, lambda _: {"x": _tokens(2, 9)}, norms, requires="x_transformers")


def _litgpt(name: str, config: str, *, norms: int | None = None, **options: Any) -> Entry:
    small: Options = {
        "n_layer": 2, "n_embd": 32, "n_head": 4, "n_query_groups": 2, "head_size": 8, "intermediate_size": 48,
        "padded_vocab_size": 97, "vocab_size": 97, "block_size": 64,
    }  # fmt: skip

    def make() -> nn.Module:
        import litgpt

        return _built(lambda: litgpt.GPT(litgpt.Config.from_name(config, **{**small, **options})))

    return Entry(name, "encoder", make, lambda _: {"idx": _tokens(2, 9)}, norms, requires="litgpt")


def _positions(rows: int, columns: int) -> Tensor:
    """Positions of an image's patches: zero, row, column."""
    grid = torch.zeros(rows, columns, 3)
    grid[..., 1] += torch.arange(rows)[:, None]
    grid[..., 2] += torch.arange(columns)[None, :]
    return grid.reshape(-1, 3)


def _flux(_: nn.Module, *, guidance: bool = False, pooled: bool = True, axes: int = 3) -> dict[str, Any]:
    found = {
        "hidden_states": _random(2, 12, 4), "encoder_hidden_states": _random(2, 5, 16),
        "timestep": torch.tensor([0.25, 0.9]), "img_ids": _positions(3, 4), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    if axes == 4:
        ids = torch.cat([found["img_ids"], torch.arange(12.0)[:, None] * 0], dim=1)
        found |= {"img_ids": ids, "txt_ids": torch.zeros(5, 4)}
    return {
        **found,
        **({"pooled_projections": _random(2, 24)} if pooled else {}),
        **({"guidance": torch.tensor([3.5, 4.0])} if guidance else {}),
    }


def _latents(_: nn.Module, *, shape: tuple[int, ...] = (2, 4, 8, 8), width: int = 16, mask: bool = False,
             timestep: tuple[float, ...] = (3.0, 500.0), pooled: int = 0, **more: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "hidden_states": _random(*shape), "encoder_hidden_states": _random(2, 6, width),
        "timestep": torch.tensor(timestep),
        **({"encoder_attention_mask": _mask(2, 6)} if mask else {}),
        **({"pooled_projections": _random(2, pooled)} if pooled else {}),
        **more,
    }  # fmt: skip


def _qwen(_: nn.Module) -> dict[str, Any]:
    return {
        "hidden_states": _random(2, 12, 16), "encoder_hidden_states": _random(2, 6, 16),
        "encoder_hidden_states_mask": _mask(2, 6).bool(), "timestep": torch.tensor([0.3, 0.9]),
        "img_shapes": [[(1, 3, 4)], [(1, 3, 4)]],
    }  # fmt: skip


def _ltx(_: nn.Module) -> dict[str, Any]:
    return {
        "hidden_states": _random(2, 24, 8), "encoder_hidden_states": _random(2, 6, 16),
        "timestep": torch.tensor([3.0, 500.0]), "encoder_attention_mask": _mask(2, 6), "num_frames": 2, "height": 3,
        "width": 4, "rope_interpolation_scale": (0.32, 32, 32),
    }  # fmt: skip


def _cogvideox(_: nn.Module) -> dict[str, Any]:
    angles = _random(32, 16)
    return {
        "hidden_states": _random(2, 2, 4, 8, 8), "encoder_hidden_states": _random(2, 6, 16),
        "timestep": torch.tensor([3.0, 500.0]), "image_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip


def _cogview(_: nn.Module) -> dict[str, Any]:
    size = torch.tensor([[64.0, 64.0], [32.0, 64.0]])
    return {
        **_latents(_), "original_size": size, "target_size": size, "crop_coords": torch.zeros(2, 2),
    }  # fmt: skip


def _hidream(_: nn.Module) -> dict[str, Any]:
    return {
        "hidden_states": _random(2, 4, 8, 8), "timesteps": torch.tensor([3.0, 500.0]),
        "encoder_hidden_states_t5": _random(2, 6, 16), "encoder_hidden_states_llama3": _random(2, 2, 6, 16),
        "pooled_embeds": _random(2, 24),
    }  # fmt: skip


def _z_image(_: nn.Module) -> dict[str, Any]:
    return {
        "x": [_random(4, 1, 8, 8), _random(4, 1, 8, 8)], "t": torch.tensor([0.3, 0.9]),
        "cap_feats": [_random(6, 16), _random(6, 16)],
    }  # fmt: skip


_VIDEO = partial(_latents, shape=(2, 4, 2, 8, 8))
_DIFFUSERS = (
    _diffusers("flux_transformer", "FluxTransformer2DModel", _flux, in_channels=4, num_single_layers=1,
               joint_attention_dim=16, pooled_projection_dim=24, **_HEADS, **_IMAGE_ROPE),
    _diffusers("flux_transformer_guidance", "FluxTransformer2DModel", partial(_flux, guidance=True), in_channels=4,
               num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=24, guidance_embeds=True, **_HEADS,
               **_IMAGE_ROPE),
    _diffusers("flux2_transformer", "Flux2Transformer2DModel", partial(_flux, guidance=True, pooled=False, axes=4),
               in_channels=4, num_single_layers=1, joint_attention_dim=16, axes_dims_rope=(4, 4, 4, 4), **_HEADS),
    _diffusers("chroma_transformer", "ChromaTransformer2DModel", partial(_flux, pooled=False), in_channels=4,
               num_single_layers=1, joint_attention_dim=16, approximator_num_channels=16, approximator_hidden_dim=32,
               approximator_layers=2, **_HEADS, **_IMAGE_ROPE),
    _diffusers("sd3_transformer", "SD3Transformer2DModel", partial(_latents, pooled=24), sample_size=8, in_channels=4,
               qk_norm="rms_norm", caption_projection_dim=32, joint_attention_dim=16, pooled_projection_dim=24,
               out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,), **_HEADS),
    _diffusers("ltx_transformer", "LTXVideoTransformer3DModel", _ltx, in_channels=8, out_channels=8,
               cross_attention_dim=32, caption_channels=16, **_HEADS),
    _diffusers("wan_transformer", "WanTransformer3DModel", _VIDEO, in_channels=4, out_channels=4, text_dim=16,
               freq_dim=16, ffn_dim=48, rope_max_seq_len=32, **_HEADS),
    _diffusers("wan_vae", "AutoencoderKLWan", lambda _: {"sample": _random(1, 3, 1, 16, 16)}, base_dim=8, z_dim=4,
               dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4,
               latents_std=[1.0] * 4),
    _diffusers("sana_transformer", "SanaTransformer2DModel", partial(_latents, mask=True), sample_size=8,
               in_channels=4, out_channels=4, caption_channels=16, cross_attention_dim=32,
               num_cross_attention_heads=2, cross_attention_head_dim=16, qk_norm="rms_norm_across_heads", **_HEADS),
    _diffusers("qwen_image_transformer", "QwenImageTransformer2DModel", _qwen, in_channels=16, out_channels=4,
               joint_attention_dim=16, **_HEADS, **_IMAGE_ROPE),
    _diffusers("lumina2_transformer", "Lumina2Transformer2DModel", partial(_latents, mask=True, timestep=(0.3, 0.9)),
               sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
               num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16),
               cap_feat_dim=16),
    _diffusers("hunyuan_video_transformer", "HunyuanVideoTransformer3DModel",
               partial(_VIDEO, mask=True, pooled=24, guidance=torch.tensor([1000.0, 6000.0])), in_channels=4,
               out_channels=4, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=24,
               rope_axes_dim=(4, 6, 6), **_HEADS),
    _diffusers("cogvideox_transformer", "CogVideoXTransformer3DModel", _cogvideox, in_channels=4, out_channels=4,
               time_embed_dim=16, text_embed_dim=16, sample_width=8, sample_height=8, sample_frames=5,
               max_text_seq_length=6, use_rotary_positional_embeddings=True, **_HEADS),
    _diffusers("mochi_transformer", "MochiTransformer3DModel", partial(_VIDEO, mask=True), in_channels=4,
               pooled_projection_dim=24, text_embed_dim=16, time_embed_dim=16, max_sequence_length=6,
               **{**_HEADS, "attention_head_dim": 12}),
    _diffusers("auraflow_transformer", "AuraFlowTransformer2DModel", partial(_latents, timestep=(0.3, 0.9)),
               sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
               num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=32, pos_embed_max_size=16),
    _diffusers("hidream_transformer", "HiDreamImageTransformer2DModel", _hidream, patch_size=2, in_channels=4,
               num_single_layers=1, caption_channels=[16, 16], text_emb_dim=24, axes_dims_rope=(8, 4, 4),
               max_resolution=(16, 16), llama_layers=[0, 1, 1], **{**_HEADS, "num_layers": 1}),
    _diffusers("cogview4_transformer", "CogView4Transformer2DModel", _cogview, in_channels=4, out_channels=4,
               text_embed_dim=16, time_embed_dim=16, condition_dim=8, pos_embed_max_size=8, sample_size=8,
               rope_axes_dim=(16, 16), **_HEADS),
    _diffusers("z_image_transformer", "ZImageTransformer2DModel", _z_image, in_channels=4, dim=32, n_layers=2,
               n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6],
               axes_lens=[64, 16, 16]),
    _diffusers("pixart_transformer", "PixArtTransformer2DModel",
               partial(_latents, added_cond_kwargs={"resolution": None, "aspect_ratio": None}), sample_size=8,
               in_channels=4, caption_channels=16, cross_attention_dim=32, **_HEADS),
)  # fmt: skip

_VIT: Options = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}
_TIMM = (
    _timm("timm_vit_rms", "vit_base_patch16_224", patch_size=8, layers=True, norm_layer="RmsNorm", **_VIT),
    _timm("timm_vit_rms_fp32", "vit_base_patch16_224", patch_size=8, layers=True, norm_layer="RmsNormFp32", **_VIT),
    _timm("timm_vit_simple", "vit_base_patch16_224", patch_size=8, layers=True, norm_layer="SimpleNorm", **_VIT),
    _timm("timm_vit_qk", "vit_base_patch16_224", patch_size=8, layers=True, norm_layer="RmsNorm", qk_norm=True, **_VIT),
    _timm("timm_vit_parallel", "vit_large_patch14_xp_224", patch_size=8, **_VIT),
    _timm("timm_aimv2", "aimv2_large_patch14_224", patch_size=8, **_VIT),
    _timm("timm_naflexvit", "naflexvit_base_patch16_gap", patch_size=8, embed_dim=32, depth=2, num_heads=4,
          norm_layer="rmsnorm"),
    _timm("timm_eva", "eva02_tiny_patch14_224", patch_size=8, layers=True, norm_layer="RmsNorm", **_VIT),
    _timm("timm_convnext", "convnext_atto_rms", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), size=64),
    _timm("timm_convnext_simple", "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), size=64,
          norm_layer="simplenorm"),
)  # fmt: skip

_X_TRANSFORMERS = (
    _x_transformers("x_transformers_rms", use_rmsnorm=True),
    _x_transformers("x_transformers_encoder", use_rmsnorm=True, encoder=True, rotary_pos_emb=True),
    _x_transformers("x_transformers_simple", use_simple_rmsnorm=True),
    _x_transformers("x_transformers_qk", use_rmsnorm=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    _x_transformers("x_transformers_sandwich", use_rmsnorm=True, sandwich_norm=True, rotary_pos_emb=True, ff_glu=True),
    _x_transformers("x_transformers_adaptive", use_rmsnorm=True, attn_kv_heads=2, ff_swish=True, ff_glu=True,
                    rotary_pos_emb=True),
)  # fmt: skip

_LITGPT = (
    _litgpt("litgpt_llama", "Llama-3.2-1B"),
    _litgpt("litgpt_gemma", "Gemma-2b"),
    _litgpt("litgpt_gemma2", "Gemma-2-2b", sliding_window_size=4),
    _litgpt("litgpt_gemma3", "Gemma-3-1b-it", sliding_window_size=4),
    _litgpt("litgpt_qwen2", "Qwen2.5-0.5B"),
    _litgpt("litgpt_qwen3", "Qwen3-0.6B"),
    _litgpt("litgpt_olmo2", "OLMo-2-1124-7B", n_query_groups=4),
)

LIBRARIES: tuple[Entry, ...] = (*_DIFFUSERS, *_TIMM, *_X_TRANSFORMERS, *_LITGPT)
