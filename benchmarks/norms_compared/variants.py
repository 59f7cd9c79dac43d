"""The readable decoder in four variants that differ in their norms alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from rmsnorm_deploy.models.builtin.decoder import Block, Decoder, DecoderConfig, random_decoder
from rmsnorm_deploy.models.builtin.train_addition import CONFIG as ADDITION

CONFIG = dataclasses.replace(ADDITION, norm="torch")
WIDE = DecoderConfig(
    vocab_size=1024, hidden_size=1024, num_layers=4, num_heads=16, num_kv_heads=8, intermediate_size=2816, norm="torch"
)


@dataclass(frozen=True, slots=True)
class Variant:
    """Which norm, and whether it is before the attention and the MLP or behind their residual adds."""

    norm: Literal["LayerNorm", "RMSNorm"]
    place: Literal["pre-norm", "post-norm"]

    def __str__(self) -> str:
        return f"{self.norm}, {self.place}"


VARIANTS = tuple(Variant(norm, place) for place in ("pre-norm", "post-norm") for norm in ("LayerNorm", "RMSNorm"))


class PostNormBlock(Block):
    """The decoder's block with its norms behind the residual adds (Vaswani et al., 2017, arXiv:1706.03762)."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """As `Block.forward`."""
        x = self.attention_norm(x + self.attention(x, cos, sin, mask))
        return self.mlp_norm(x + self.mlp(x))


def build(variant: Variant, config: DecoderConfig, seed: int) -> Decoder:
    """The decoder in a variant; all variants of a seed have the same matrices, and norms that scale by 1.

    Behind the block, the last block's norm takes the place of the final one. LayerNorm has weight and bias, and the
    config's epsilon.
    """
    model = random_decoder(config, seed, norm_spread=0.0)
    if variant.place == "post-norm":
        for index, block in enumerate(model.layers):
            behind = PostNormBlock(config)
            behind.load_state_dict(block.state_dict())
            model.layers[index] = behind
        model.norm = nn.Identity()
    if variant.norm == "LayerNorm":
        for path, _ in norms_of(model):
            model.set_submodule(path, nn.LayerNorm(config.hidden_size, config.eps))
    return model.eval()


def norms_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The norms with their module paths."""
    return [(path, one) for path, one in model.named_modules() if isinstance(one, nn.RMSNorm | nn.LayerNorm)]
