"""The readable reference model: a plain pre-norm decoder-only transformer in the style of Llama.

RMSNorm, rotary position embedding, grouped-query attention, SwiGLU; no cache and no dropout. Every residual add is
written explicitly right before the norm that reads it, and one export serves any batch and any sequence length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError

NormKind = Literal["torch", "llama", "olmo", "gemma", "none"]


# ---------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a `Decoder`.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        num_layers: number of transformer blocks.
        num_heads: number of query heads; the head size is `hidden_size / num_heads` and must be even.
        num_kv_heads: number of key and value heads, a divisor of `num_heads`.
        intermediate_size: width inside the SwiGLU MLP.
        rope_theta: base of the rotary frequencies.
        eps: epsilon of every norm, inside the root.
        norm: which norm is used everywhere, see `NORMS`.
        qk_norm: normalize every head of the queries and the keys, before the rotary embedding.
        tie_embeddings: the output projection is the embedding table.
        task: what the weights were trained for (`addition`), or None.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    eps: float = 1e-6
    norm: NormKind = "llama"
    qk_norm: bool = False
    tie_embeddings: bool = False
    task: str | None = None

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"DecoderConfig.{field} is {value!r}; it must be a whole number of at least 1.")
        for field in ("qk_norm", "tie_embeddings"):
            if not isinstance(getattr(self, field), bool):
                raise UsageError(f"DecoderConfig.{field} is {getattr(self, field)!r}; it must be true or false.")
        if not isinstance(self.rope_theta, int | float) or not self.rope_theta > 0:
            raise UsageError(f"DecoderConfig.rope_theta is {self.rope_theta!r}; it must be a number above 0.")
        if not isinstance(self.eps, int | float) or not self.eps >= 0:
            raise UsageError(f"DecoderConfig.eps is {self.eps!r}; it must be a number of at least 0.")
        if self.norm not in get_args(NormKind):
            raise UsageError(f"DecoderConfig.norm is {self.norm!r}; it must be one of {', '.join(get_args(NormKind))}.")
        if self.task is not None and not isinstance(self.task, str):
            raise UsageError(f"DecoderConfig.task is {self.task!r}; it must be a name or null.")
        if self.hidden_size % (2 * self.num_heads):
            raise UsageError(
                f"DecoderConfig.hidden_size {self.hidden_size} does not split into {self.num_heads} heads of an even "
                f"size; make it a multiple of {2 * self.num_heads}."
            )
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"DecoderConfig.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "every key and value head serves the same number of query heads."
            )

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """The config written by `to_dict`.

        Raises:
            UsageError: a field is unknown, is missing, or has an invalid value.
        """
        fields = dataclasses.fields(cls)
        unknown = sorted(values.keys() - {f.name for f in fields})
        if unknown:
            raise UsageError(f"unknown DecoderConfig fields: {', '.join(unknown)}; remove them.")
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise UsageError(f"missing DecoderConfig fields: {', '.join(missing)}; add them.")
        return cls(**values)


# ------------------------------------------------------------------------------------------------------------ norms


def _normalize(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps)` over the last dim, always computed and returned in float32."""
    h = x.to(torch.float32)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


class LlamaNorm(nn.Module):
    """RMSNorm of Llama: normalized in float32, cast back, and only then scaled by the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Floating [..., size] to the same shape, in the wider of the dtypes of x and the weight."""
        return self.weight * _normalize(x, self.eps).to(x.dtype)


class OlmoNorm(nn.Module):
    """RMSNorm of OLMo 2: scaled by the weight while still in float32, then cast back once."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Floating [..., size] to the same shape and dtype."""
        return (self.weight * _normalize(x, self.eps)).to(x.dtype)


class GemmaNorm(nn.Module):
    """RMSNorm of Gemma: the parameter is the distance from 1; scaled by 1 + weight in float32, then cast back once."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Floating [..., size] to the same shape and dtype."""
        return (_normalize(x, self.eps) * (1.0 + self.weight.to(torch.float32))).to(x.dtype)


class UnweightedNorm(nn.Module):
    """RMSNorm without a weight: normalized in float32, then cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size = size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Floating [..., size] to the same shape and dtype."""
        return _normalize(x, self.eps).to(x.dtype)


NORMS: dict[NormKind, Callable[[int, float], nn.Module]] = {
    "torch": nn.RMSNorm,
    "llama": LlamaNorm,
    "olmo": OlmoNorm,
    "gemma": GemmaNorm,
    "none": UnweightedNorm,
}


# ------------------------------------------------------------------------------------------------------ transformer


def rotary_table(seq: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, for positions 0 to seq - 1.

    Computed in float32 on every call and cast at the end: as a buffer, `model.half()` would round the frequencies.

    Args:
        seq: sequence length.
        head_dim: even size of one head.
        theta: base of the frequencies, `theta ** (-2 i / head_dim)` radians per position for pair i.
        like: gives the device and the dtype of the result.

    Returns:
        Two tensors [seq, head_dim / 2].
    """
    pairs = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32)
    frequencies = torch.pow(theta, -pairs / head_dim)
    positions = torch.arange(seq, device=like.device, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its position's angle (Su et al., 2021, arXiv:2104.09864).

    Args:
        x: [batch, heads, seq, head_dim].
        cos: [seq, head_dim / 2], in x's dtype.
        sin: [seq, head_dim / 2], in x's dtype.

    Returns:
        [batch, heads, seq, head_dim], in x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def causal_mask(seq: int, like: Tensor) -> Tensor:
    """The mask added to the attention scores: 0 where a query may attend, -inf at every later position.

    Explicit, because with is_causal each version of the exporter builds it differently at a dynamic length; additive,
    because a boolean mask becomes two Where nodes per layer in ONNX.

    Args:
        seq: sequence length.
        like: gives the device and the dtype of the result.

    Returns:
        [seq, seq], queries by keys.
    """
    positions = torch.arange(seq, device=like.device)
    later = positions[None, :] > positions[:, None]
    return torch.zeros_like(later, dtype=like.dtype).masked_fill(later, float("-inf"))


class Attention(nn.Module):
    """Causal grouped-query self-attention (Ainslie et al., 2023, arXiv:2305.13245)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_kv = config.num_heads // config.num_kv_heads
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = NORMS[config.norm](config.head_dim, config.eps) if config.qk_norm else None
        self.k_norm = NORMS[config.norm](config.head_dim, config.eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[batch, seq, hidden] to the same; cos and sin as in `rotate`; mask as in `causal_mask`."""
        query, key, value = (self._split_heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        # enable_gqa, which would repeat the key and value heads, has no ONNX form below opset 23.
        key, value = (h.repeat_interleave(self.queries_per_kv, dim=1) for h in (key, value))
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """[batch, seq, heads * head_dim] to [batch, heads, seq, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same shape and dtype."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and MLP, each behind its own norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = NORMS[config.norm](config.hidden_size, config.eps)
        self.attention = Attention(config)
        self.mlp_norm = NORMS[config.norm](config.hidden_size, config.eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[batch, seq, hidden] to the same; the other arguments are those of `Attention`."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        x = x + self.mlp(self.mlp_norm(x))
        return x  # noqa: RET504 - the residual stream reads best as one name


class Decoder(nn.Module):
    """The whole decoder, from token ids to logits; see `DecoderConfig` for its shape.

    Attributes:
        config: the config it was built from.
    """

    output_names = ("logits",)

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = NORMS[config.norm](config.hidden_size, config.eps)
        # A tied model has one name for the table, so that a checkpoint holds every tensor once.
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token at every position.

        Args:
            input_ids: int64 [batch, seq], each in 0 to vocab_size - 1.

        Returns:
            [batch, seq, vocab_size] in the dtype of the parameters.
        """
        x = self.embedding(input_ids)
        seq = input_ids.shape[1]
        cos, sin = rotary_table(seq, self.config.head_dim, self.config.rope_theta, like=x)
        mask = causal_mask(seq, like=x)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.lm_head is None else self.lm_head(x)


# -------------------------------------------------------------------------------------------------- built-in models


def random_decoder(config: DecoderConfig, seed: int, norm_spread: float = 0.2) -> Decoder:
    """A float32 decoder with random weights; the same config and seed give the same bits.

    Matrices are normal with variance 1 / fan-in, so that every block adds activations of the order of 1. The embedding
    has variance 1 / hidden_size: at variance 1 it dominates what the blocks add, and the decoder trains badly. torch's
    global random state is neither read nor changed.

    Args:
        config: the shape.
        seed: seed of the random weights.
        norm_spread: standard deviation of the norm scales around 1. In an untrained norm all are 1, and a lost or
            swapped norm weight would not change the result.
    """
    with torch.device("meta"):  # no default initialization, which would draw from the global generator
        model = Decoder(config)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, module.embedding_dim**-0.5, generator=generator)
            elif isinstance(module, GemmaNorm):
                module.weight.normal_(0.0, norm_spread, generator=generator)
            elif isinstance(module, nn.RMSNorm | LlamaNorm | OlmoNorm):
                module.weight.normal_(1.0, norm_spread, generator=generator)
    return model.eval()


def small_decoder(norm: NormKind = "llama", seed: int = 0, **changes: Any) -> Decoder:
    """A float32 decoder small enough for tests and examples, with random weights as in `random_decoder`.

    Args:
        norm: which norm, see `NORMS`.
        seed: seed of the random weights.
        **changes: other fields of `DecoderConfig`; they replace the defaults here.

    Raises:
        UsageError: a field is unknown or has an invalid value.
    """
    fields = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 128,
    }
    return random_decoder(DecoderConfig.from_dict({**fields, "norm": norm, **changes}), seed)
