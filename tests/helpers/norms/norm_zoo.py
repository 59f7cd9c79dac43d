"""One table of norms and what each computes; the tests are generated from it.

Every expectation is written out here by hand, from reading the module's code. Nothing in it is taken from what
recognition says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmsnorm_deploy.models.spec import NormSpec

FLOAT32_EPS = 2.0**-23
FLOAT64_EPS = 2.0**-52
HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF_DTYPES)


def hub_class(family: str, name: str) -> type[nn.Module]:
    """A class of transformers; the test is skipped where this transformers does not have the family."""
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name)


def hub(family: str, name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """What builds a norm of transformers."""
    return lambda: hub_class(family, name)(*args, **options)


@dataclass(frozen=True)
class ZooNorm:
    """One norm.

    Attributes:
        make: builds the module, with the weights it starts with.
        spec: what it computes.
        tail: trailing dims of an x that it takes.
        width: the width its site states; the last dims of `tail` unless said otherwise.
        weight: attribute with the weight, `""` for none.
        bias: attribute with the bias, `""` for none.
        float64: the spec when the module itself is in float64: `same`, `eps` (it follows the dtype) or `refused`
            (what it computes then, no spec can say).
    """

    make: Callable[[], nn.Module]
    spec: NormSpec
    tail: tuple[int, ...] = (64,)
    width: tuple[int, ...] | str | None = "tail"
    weight: str = "weight"
    bias: str = ""
    float64: str = "same"

    @property
    def site_width(self) -> tuple[int, ...] | None:
        """The width that recognition is to state."""
        return self.tail if isinstance(self.width, str) else self.width

    @property
    def gated(self) -> bool:
        """Whether it takes a second input."""
        return self.spec.gate != "none"

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The module in eval mode with random weights: both signs, no ones, no zeros."""
        return randomized(self.make(), seed).to(dtype).eval()

    def tensors(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """The module's weight and bias."""
        weight = getattr(module, self.weight).detach() if self.weight else None
        bias = getattr(module, self.bias).detach() if self.bias else None
        return weight, bias


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random floating parameters and buffers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.6 + 0.3)
    return module


# Norms written by hand ------------------------------------------------------------------------------------------------


def factor(x: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def normalized(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x normalized in float32 and cast back."""
    h = x.float()
    return (h * factor(h, eps)).to(x.dtype)


class Weighted(nn.Module):
    """Cast, then scale."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape or (64,)))

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x) * self.weight


class Biased(Weighted):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * factor(h, 3e-6)
        return (h * self.weight.float() + self.bias.float()).to(x.dtype)


class BiasedAfterCast(Biased):
    def forward(self, x: Tensor) -> Tensor:
        return normalized(x) * self.weight + self.bias


class NoUpcast(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.g


class NoUpcastRsqrt(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return x * factor(x, 1e-5) * self.weight


class Divided(Weighted):
    """x / sqrt(.) in float32."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class Reciprocal(Weighted):
    """x * (1 / sqrt(.)) in float32."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * (1 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype) * self.weight


class L2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5)


class L2Weighted(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 1e-6)
        return (h * self.weight).to(x.dtype)


class BufferWeight(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * normalized(x)


class OnePlusAfterCast(Weighted):
    """(1 + weight) in the weight's own dtype, after the cast."""

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x) * (1 + self.weight)


class OnePlusWideAfterCast(Weighted):
    """(1 + weight) in float32, multiplied after the cast, the result in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x) * (1.0 + self.weight.float())


class FactorWeighted(Weighted):
    """Only the factor is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return x * factor(x.float()).to(x.dtype) * self.weight


class Grouped(nn.Module):
    """No weight, groups of 16."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float().unflatten(-1, (-1, 16))
        return (h * factor(h)).flatten(-2).to(x.dtype)


class SigmoidBefore(Weighted):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = x.float() * torch.sigmoid(gate.float())
        return (h * factor(h) * self.weight.float()).to(x.dtype)


class SiluAfter(nn.Module):
    """No weight; runs without its gate too."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        h = x.float()
        h = h * factor(h)
        return (h if gate is None else h * F.silu(gate.float())).to(x.dtype)


class TakesMore(Weighted):
    """A second input that it does not use."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return normalized(x) * self.weight


class OverridesLayerNorm(nn.LayerNorm):
    """A LayerNorm by name and parameters, an RMS norm by what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x, self.eps) * self.weight


class EvalOnlyDropout(Weighted):
    """Dropout behind the norm, as function and as child: in eval mode, which is what is deployed, it is not there."""

    def __init__(self) -> None:
        super().__init__(64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.dropout(normalized(x) * self.weight, 0.5, self.training))


CAST_FIRST = NormSpec(eps=1e-6, order="cast_then_scale")
SCALE_FIRST = NormSpec(eps=1e-6, order="scale_then_cast")
ONE_PLUS = SCALE_FIRST.replace(scale="one_plus_weight")
BARE = SCALE_FIRST.replace(scale="none")
TORCH = SCALE_FIRST.replace(statistics="promoted")
NO_UPCAST = NormSpec(eps=1e-6, order="no_upcast", statistics="input")
MAMBA = CAST_FIRST.replace(group_size=16, gate="before", activation="silu")
FALCON = SCALE_FIRST.replace(group_size=16, gate="after", activation="silu")

ZOO: dict[str, ZooNorm] = {
    # torch.nn.RMSNorm
    "torch": ZooNorm(lambda: nn.RMSNorm(64, eps=1e-6), TORCH),
    "torch_eps_none": ZooNorm(lambda: nn.RMSNorm(64), TORCH.replace(eps=FLOAT32_EPS), float64="eps"),
    "torch_no_affine": ZooNorm(
        lambda: nn.RMSNorm(64, eps=1e-5, elementwise_affine=False), TORCH.replace(eps=1e-5, scale="none"), weight=""
    ),
    "torch_two_dims": ZooNorm(lambda: nn.RMSNorm((4, 8), eps=1e-6), TORCH.replace(trailing_dims=2), (4, 8)),
    "torch_two_dims_no_affine": ZooNorm(
        lambda: nn.RMSNorm((4, 8), elementwise_affine=False),
        TORCH.replace(eps=FLOAT32_EPS, scale="none", trailing_dims=2), (4, 8), weight="", float64="eps",
    ),
    "torch_three_dims": ZooNorm(lambda: nn.RMSNorm((2, 3, 5), eps=1e-6), TORCH.replace(trailing_dims=3), (2, 3, 5)),
    "torch_width_1": ZooNorm(lambda: nn.RMSNorm(1, eps=1e-6), TORCH, (1,)),
    "torch_width_1_tiny_eps": ZooNorm(lambda: nn.RMSNorm(1, eps=1e-12), TORCH.replace(eps=1e-12), (1,)),
    "torch_width_2": ZooNorm(lambda: nn.RMSNorm(2, eps=1e-6), TORCH, (2,)),
    "torch_width_7": ZooNorm(lambda: nn.RMSNorm(7, eps=1e-6), TORCH, (7,)),
    "torch_width_33": ZooNorm(lambda: nn.RMSNorm(33, eps=1e-6), TORCH, (33,)),
    "torch_width_1000": ZooNorm(lambda: nn.RMSNorm(1000, eps=1e-6), TORCH, (1000,)),
    "torch_eps_0": ZooNorm(lambda: nn.RMSNorm(33, eps=0.0), TORCH.replace(eps=0.0), (33,)),
    "torch_eps_half": ZooNorm(lambda: nn.RMSNorm(33, eps=0.5), TORCH.replace(eps=0.5), (33,)),
    # transformers: cast, then scale
    "llama": ZooNorm(hub("llama", "LlamaRMSNorm", 64), CAST_FIRST),
    "llama_width_7": ZooNorm(hub("llama", "LlamaRMSNorm", 7, eps=1e-5), CAST_FIRST.replace(eps=1e-5), (7,)),
    "llama4": ZooNorm(hub("llama4", "Llama4TextRMSNorm", 64), CAST_FIRST.replace(eps=1e-5)),
    # T5 multiplies a float64 x, not its float32 copy
    "t5": ZooNorm(hub("t5", "T5LayerNorm", 64), CAST_FIRST, float64="refused"),
    "idefics": ZooNorm(hub("idefics", "IdeficsRMSNorm", 64), CAST_FIRST, float64="refused"),
    # transformers: scale, then cast; the four that cast the weight to float32 lose bits of a float64 weight
    "olmo2": ZooNorm(hub("olmo2", "Olmo2RMSNorm", 64), SCALE_FIRST),
    "gpt_oss": ZooNorm(hub("gpt_oss", "GptOssRMSNorm", 64, eps=1e-5), SCALE_FIRST.replace(eps=1e-5)),
    "nemotron_h": ZooNorm(hub("nemotron_h", "NemotronHRMSNorm", 64), SCALE_FIRST, float64="refused"),
    "helium": ZooNorm(hub("helium", "HeliumRMSNorm", 64), SCALE_FIRST, float64="refused"),
    "moshi": ZooNorm(hub("moshi", "MoshiRMSNorm", 64), SCALE_FIRST, float64="refused"),
    "gemma3n": ZooNorm(hub("gemma3n", "Gemma3nRMSNorm", 64), SCALE_FIRST, float64="refused"),
    # transformers: 1 + weight
    "gemma2": ZooNorm(hub("gemma2", "Gemma2RMSNorm", 64), ONE_PLUS),
    "gemma2_width_33": ZooNorm(hub("gemma2", "Gemma2RMSNorm", 33), ONE_PLUS, (33,)),
    "qwen4_grouped": ZooNorm(
        hub("qwen4_exp", "Qwen4ExpTextRMSNorm", 64, group_size=16), ONE_PLUS.replace(group_size=16)
    ),
    # 1 + weight in the weight's dtype, then cast to float32, which loses bits of a float64 weight
    "muse_spark": ZooNorm(
        hub("muse_spark", "MuseSparkTextCenteredRMSNorm", 64),
        ONE_PLUS.replace(offset_in_float32=False), float64="refused",
    ),
    # transformers: no weight
    "gemma3n_no_scale": ZooNorm(
        hub("gemma3n", "Gemma3nRMSNorm", 64, with_scale=False), BARE, width=None, weight=""
    ),
    "llama4_l2": ZooNorm(hub("llama4", "Llama4TextL2Norm", 1e-6), BARE, width=None, weight=""),
    "nanochat": ZooNorm(hub("nanochat", "NanoChatRMSNorm", 1e-6), BARE, width=None, weight=""),
    # multiplies a float64 x, not its float32 copy
    "deepseek_v4": ZooNorm(
        hub("deepseek_v4", "DeepseekV4UnweightedRMSNorm", 1e-6),
        BARE.replace(order="cast_factor"), width=None, weight="", float64="refused",
    ),
    # transformers: gated
    "mamba2": ZooNorm(hub("mamba2", "MambaRMSNormGated", 64, 16), MAMBA),
    "zamba2": ZooNorm(hub("zamba2", "Zamba2RMSNormGated", 64, 32), MAMBA.replace(group_size=32)),
    "mamba2_one_group": ZooNorm(
        hub("mamba2", "MambaRMSNormGated", 64, 64), MAMBA.replace(group_size=None)
    ),
    "qwen3_next": ZooNorm(
        hub("qwen3_next", "Qwen3NextRMSNormGated", 64), CAST_FIRST.replace(gate="after", activation="silu")
    ),
    "kimi_linear": ZooNorm(
        hub("kimi_linear", "KimiLinearRMSNormGated", 64),
        SCALE_FIRST.replace(gate="after", activation="sigmoid"), float64="refused",
    ),
    "falcon_h1": ZooNorm(hub("falcon_h1", "FalconH1RMSNormGated", 64, n_groups=4), FALCON),
    "falcon_h1_one_group": ZooNorm(
        hub("falcon_h1", "FalconH1RMSNormGated", 64, n_groups=1), FALCON.replace(group_size=None)
    ),
    # a float64 x is gated in float64 and only then cast
    "falcon_h1_gate_first": ZooNorm(
        hub("falcon_h1", "FalconH1RMSNormGated", 64, n_groups=4, norm_before_gate=False),
        FALCON.replace(gate="before"), float64="refused",
    ),
    # by hand
    "biased": ZooNorm(
        lambda: Biased(64), SCALE_FIRST.replace(eps=3e-6, bias=True), bias="bias", float64="refused"
    ),
    "biased_after_cast": ZooNorm(lambda: BiasedAfterCast(33), CAST_FIRST.replace(bias=True), (33,), bias="bias"),
    "no_upcast": ZooNorm(lambda: NoUpcast(64), NO_UPCAST.replace(root="sqrt"), weight="g"),
    "no_upcast_rsqrt": ZooNorm(lambda: NoUpcastRsqrt(64), NO_UPCAST.replace(eps=1e-5)),
    "divided": ZooNorm(lambda: Divided(64), CAST_FIRST.replace(root="sqrt")),
    "reciprocal": ZooNorm(lambda: Reciprocal(64), CAST_FIRST.replace(root="reciprocal")),
    "l2": ZooNorm(
        L2, NO_UPCAST.replace(eps=1e-5, scale="none", reduction="sum"), width=None, weight=""
    ),
    "l2_weighted": ZooNorm(lambda: L2Weighted(64), SCALE_FIRST.replace(reduction="sum")),
    "buffer_weight": ZooNorm(lambda: BufferWeight(64), CAST_FIRST, weight="scale"),
    "row_weight": ZooNorm(lambda: Weighted(1, 64), CAST_FIRST),
    "row_weight_rank_3": ZooNorm(lambda: Weighted(1, 1, 64), CAST_FIRST),
    "per_head_weight": ZooNorm(lambda: Weighted(4, 16), CAST_FIRST, (4, 16), width=(16,)),
    "one_plus_after_cast": ZooNorm(
        lambda: OnePlusAfterCast(64), CAST_FIRST.replace(scale="one_plus_weight", offset_in_float32=False)
    ),
    "one_plus_wide_after_cast": ZooNorm(
        lambda: OnePlusWideAfterCast(64), CAST_FIRST.replace(scale="one_plus_weight")
    ),
    "factor_weighted": ZooNorm(
        lambda: FactorWeighted(64), SCALE_FIRST.replace(order="cast_factor"), float64="refused"
    ),
    "grouped_bare": ZooNorm(Grouped, BARE.replace(group_size=16), width=None, weight=""),
    "sigmoid_before": ZooNorm(
        lambda: SigmoidBefore(64), SCALE_FIRST.replace(gate="before", activation="sigmoid"), float64="refused"
    ),
    "silu_after_bare": ZooNorm(
        SiluAfter, BARE.replace(gate="after", activation="silu"), width=None, weight=""
    ),
    "takes_more": ZooNorm(lambda: TakesMore(64), CAST_FIRST),
    "overrides_layer_norm": ZooNorm(lambda: OverridesLayerNorm(64), CAST_FIRST.replace(eps=1e-5)),
    "eval_only_dropout": ZooNorm(lambda: EvalOnlyDropout().train(), CAST_FIRST),
}  # fmt: skip
