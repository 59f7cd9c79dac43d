"""One table of modules that look like an RMS norm and are none, or none that can be taken over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms.norm_zoo import Biased, Weighted, factor, hub, normalized


@dataclass(frozen=True)
class LookAlike:
    """A module that is not an RMS norm, or not one that can be replaced.

    Attributes:
        make: builds it.
        refused: part of the reason to be given; `""` where it is passed over without a word.
    """

    make: Callable[[], nn.Module]
    refused: str


class LayerNormSubclass(nn.LayerNorm):
    pass


class EpsOutside(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return x / (torch.sqrt((x * x).mean(-1, keepdim=True)) + 1e-6) * self.weight


class Normalize(Weighted):
    """F.normalize(x) * sqrt(d) * g: eps bounds the norm from below instead of being added."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.weight


class UnitLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)


class Standardized(Weighted):
    """Divided by the standard deviation, mean kept."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.std(-1, keepdim=True) + 1e-6) * self.weight


class VarianceOnly(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.var(-1, keepdim=True, unbiased=False) + 1e-6)).to(x.dtype) * self.weight


class PartialStatistics(Weighted):
    """The root mean square of the first half only."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * factor(h[..., : h.shape[-1] // 2])).to(x.dtype) * self.weight


class Cosine(nn.Module):
    """Cosine similarity to one direction."""

    def __init__(self) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return F.cosine_similarity(x, self.direction, dim=-1).unsqueeze(-1) * self.direction


class OverChannels(nn.Module):
    """Norm over dim 1 of `[N, C, L]`."""

    def __init__(self, *shape: int, dim: int = 1, reduction: str = "mean") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.dim, self.reduction = dim, reduction

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        reduced = getattr(h.pow(2), self.reduction)(self.dim, keepdim=True)
        return (h * torch.rsqrt(reduced + 1e-6)).to(x.dtype) * self.weight


class OverTwoDims(nn.Module):
    """No weight to tell that both dims belong together."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-6)


class FourGroups(nn.Module):
    """Four groups whatever the width: no group size says that."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float().unflatten(-1, (4, -1))
        return (h * factor(h)).flatten(-2).to(x.dtype)


class SigmoidGate(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.weight)


class NamedRMSNorm(Weighted):
    """A norm by name only."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class GeluGated(Weighted):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = normalized(x) * self.weight
        return y if gate is None else y * F.gelu(gate)


class Adaptive(Weighted):
    """Scale and shift come from a condition."""

    def __init__(self) -> None:
        super().__init__(64)
        self.project = nn.Linear(8, 64)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return normalized(x) * self.weight * (1 + self.project(condition))


class AdaptiveNorm(Adaptive):
    pass


class RaisingNorm(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the kernel is not built\nfor this machine")


class RandomNorm(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return normalized(x) * self.weight * (1 + torch.rand(()))


class AlwaysDropping(Weighted):
    """Dropout that eval mode does not switch off."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(normalized(x) * self.weight, 0.5, True)


class TwiceNormalized(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return normalized(normalized(x)) * self.weight


class Activated(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(normalized(x) * self.weight)


class Clamped(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return (normalized(x) * self.weight).clamp(-3, 3)


class TupleNorm(Weighted):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return normalized(x) * self.weight, x


class DoubleStatistics(Weighted):
    """Sums in float64: nearer the truth than any spec."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.double()
        return (h * factor(h)).to(x.dtype) * self.weight


class HalfDiffers(Weighted):
    """Another formula for bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            return (x.float() * factor(x.float()) * self.weight.float()).to(x.dtype)
        return normalized(x) * self.weight


class RankDiffers(Weighted):
    """Another formula for four dims."""

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x) * self.weight * (2 if x.ndim == 4 else 1)


class LooseWeight(nn.Module):
    """A weight that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(64)

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x) * self.scale.to(x.dtype)


class ThreeTensorsNorm(Biased):
    def __init__(self) -> None:
        super().__init__(64)
        self.shift = nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


class Absolute(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs()


def _parametrized() -> nn.Module:
    norm = nn.RMSNorm(64)
    nn.utils.parametrize.register_parametrization(norm, "weight", Absolute())
    return norm


def _weight_norm() -> nn.Module:
    """The old weight norm: a hook writes the weight before each call, so the one that lies there may be stale."""
    norm = nn.utils.weight_norm(nn.RMSNorm(64))
    norm.weight_g.data.mul_(2)
    return norm


def _own_forward() -> nn.Module:
    norm = nn.RMSNorm(64)
    norm.forward = norm.forward
    return norm


NO_SPEC = "no NormSpec reproduces it bit for bit in float32"
BY_LENGTH = "it divides by the length of a row, as F.normalize does"
SUBTRACTS = "it subtracts the mean"
UNFIXED = "broadcasts over a width that the module does not fix"
BY_NAME = "its name contains 'norm', but it does not normalize a single input"

LOOK_ALIKES: dict[str, LookAlike] = {
    "layer_norm": LookAlike(lambda: nn.LayerNorm(64), SUBTRACTS),
    "layer_norm_no_bias": LookAlike(lambda: nn.LayerNorm(64, bias=False), SUBTRACTS),
    "layer_norm_no_affine": LookAlike(lambda: nn.LayerNorm(64, elementwise_affine=False), SUBTRACTS),
    "layer_norm_subclass": LookAlike(lambda: LayerNormSubclass(64), SUBTRACTS),
    "layer_norm_subclass_no_bias": LookAlike(lambda: LayerNormSubclass(64, bias=False), SUBTRACTS),
    "cohere": LookAlike(hub("cohere", "CohereLayerNorm", 64), SUBTRACTS),
    "batch_norm": LookAlike(lambda: nn.BatchNorm1d(64), "statistics of the batch"),
    "batch_norm_2d": LookAlike(lambda: nn.BatchNorm2d(64), "statistics of the batch"),
    "group_norm": LookAlike(lambda: nn.GroupNorm(4, 64), "mean of each group"),
    "instance_norm": LookAlike(lambda: nn.InstanceNorm1d(64), "statistics of each channel"),
    "local_response_norm": LookAlike(lambda: nn.LocalResponseNorm(2), "window of channels"),
    "eps_outside": LookAlike(lambda: EpsOutside(64), NO_SPEC),
    "normalize": LookAlike(lambda: Normalize(64), BY_LENGTH),
    "unit_length": LookAlike(UnitLength, BY_LENGTH),
    "standardized": LookAlike(lambda: Standardized(64), NO_SPEC),
    "variance_only": LookAlike(lambda: VarianceOnly(64), NO_SPEC),
    "partial_statistics": LookAlike(lambda: PartialStatistics(64), NO_SPEC),
    "timestep_norm": LookAlike(hub("pocket_tts", "PocketTTSTimestepNorm", 64), NO_SPEC),
    "input_scaled": LookAlike(hub("muse_spark", "MuseSparkTextInputScaledRMSNorm", 64), NO_SPEC),
    "twice_normalized": LookAlike(lambda: TwiceNormalized(64), NO_SPEC),
    "activated": LookAlike(lambda: Activated(64), NO_SPEC),
    "clamped": LookAlike(lambda: Clamped(64), NO_SPEC),
    "double_statistics": LookAlike(lambda: DoubleStatistics(64), NO_SPEC),
    "gelu_gated": LookAlike(lambda: GeluGated(64), NO_SPEC),
    "random": LookAlike(lambda: RandomNorm(64), BY_NAME),
    "always_dropping": LookAlike(lambda: AlwaysDropping(64), ""),
    "half_differs": LookAlike(lambda: HalfDiffers(64), "no order of casts reproduces it"),
    "rank_differs": LookAlike(lambda: RankDiffers(64), "with an x of 4 dims, it differs from its spec"),
    "factor_only": LookAlike(hub("hy_v4", "HYV4UnweightedRMSNorm", 1e-6), BY_NAME),
    "named_only": LookAlike(lambda: NamedRMSNorm(64), BY_NAME),
    "tuple": LookAlike(lambda: TupleNorm(64), BY_NAME),
    "identity": LookAlike(nn.Identity, ""),
    "softmax": LookAlike(lambda: nn.Softmax(-1), ""),
    "silu": LookAlike(nn.SiLU, ""),
    "linear": LookAlike(lambda: nn.Linear(64, 64), ""),
    "cosine": LookAlike(Cosine, BY_LENGTH),
    "sigmoid_gate": LookAlike(lambda: SigmoidGate(64), ""),
    "over_channels": LookAlike(lambda: OverChannels(64), "dim that is not trailing"),
    "over_channels_column": LookAlike(lambda: OverChannels(8, 1), UNFIXED),
    "over_channels_image": LookAlike(lambda: OverChannels(1, 8, 1, 1), UNFIXED),
    "over_channels_from_behind": LookAlike(lambda: OverChannels(8, 1, dim=-2), UNFIXED),
    "over_channels_image_from_behind": LookAlike(lambda: OverChannels(1, 8, 1, 1, dim=-3), UNFIXED),
    "head_scalars": LookAlike(lambda: OverChannels(4, 1, dim=-1), UNFIXED),
    "head_scalars_l2": LookAlike(lambda: OverChannels(4, 1, dim=-1, reduction="sum"), UNFIXED),
    "scalar_weight": LookAlike(lambda: OverChannels(1, dim=-1), UNFIXED),
    "scalar_weight_rank_0": LookAlike(lambda: OverChannels(dim=-1), UNFIXED),
    "over_two_dims": LookAlike(OverTwoDims, "dim that is not trailing"),
    "four_groups": LookAlike(FourGroups, "other shapes it differs"),
    "meta": LookAlike(lambda: nn.RMSNorm(64, device="meta"), "on the meta device"),
    "torchscript": LookAlike(lambda: torch.jit.script(nn.RMSNorm(64)), "TorchScript"),
    "own_forward": LookAlike(_own_forward, "its forward was replaced on the instance"),
    "adaptive": LookAlike(AdaptiveNorm, "its child modules have parameters"),
    "raising": LookAlike(lambda: RaisingNorm(64), "does not normalize a single input (the kernel is not built)"),
    "loose_weight": LookAlike(LooseWeight, "not a parameter or buffer"),
    "parametrized": LookAlike(_parametrized, "its tensors are parametrized"),
    "weight_norm": LookAlike(_weight_norm, "not a parameter or buffer"),
    "three_tensors": LookAlike(ThreeTensorsNorm, "more or larger tensors than a weight and a bias"),
    "huge_weight": LookAlike(lambda: nn.RMSNorm((1 << 20) + 1), "more or larger tensors than a weight and a bias"),
}
