"""Small models whose norms are not modules with one input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16


def _weight() -> nn.Parameter:
    return nn.Parameter(torch.rand(WIDTH) + 0.5)


class Attention(nn.Module):
    """`F.rms_norm` of the queries with a weight, of the keys without, and a formula in the forward for the values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.q_weight, self.v_weight = nn.Linear(WIDTH, 3 * WIDTH), _weight(), _weight()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.rms_norm(q, (WIDTH,), self.q_weight, 1e-6), F.rms_norm(k, (WIDTH,), eps=1e-5)
        wide = v.float()
        v = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)).to(v.dtype) * self.v_weight
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


class Layers(nn.Module):
    """Two attention layers, each behind a norm that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


class AddNorm(nn.Module):
    """Adds a residual, normalizes, and returns both results."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = _weight()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        wide = total.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * self.weight.float()
        return y.to(x.dtype), total


class Residual(nn.Module):
    """A norm that returns a tuple, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = AddNorm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, residual = self.norm(x)
        for _ in range(2):
            h, residual = self.norm(self.mix(h), residual)
        return h + residual


class ChannelNorm(nn.Module):
    """A norm over dim 1, through a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = _weight()

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.permute(0, 2, 3, 1), (WIDTH,), self.weight, 1e-6).permute(0, 3, 1, 2)


class Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, WIDTH, 1), ChannelNorm(), nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.stem(x))))


class Modulated(nn.Module):
    """adaLN: the scale of a normalized value is computed from a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.condition, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5).to(x.dtype)
        return self.out(y * (1 + self.condition(c).unsqueeze(1)))


class Lengths(nn.Module):
    """`F.normalize`: an L2 norm whose length is clamped, which is not an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gamma = nn.Linear(WIDTH, WIDTH), _weight()

    def forward(self, x: Tensor) -> Tensor:
        return x + F.normalize(self.up(x), dim=-1) * WIDTH**0.5 * self.gamma


# Each model's inputs by shape, and the paths under which its norms are found in the graph.
INPUTS: dict[type[nn.Module], dict[str, tuple[int, ...]]] = {
    Layers: {"x": (2, 5, WIDTH)},
    Residual: {"x": (2, 5, WIDTH)},
    Channels: {"x": (2, 3, 4, 5)},
    Modulated: {"x": (2, 5, WIDTH), "c": (2, WIDTH)},
    Lengths: {"x": (2, 5, WIDTH)},
}
PATHS: dict[type[nn.Module], list[str]] = {
    Layers: [f"layers.{layer}:rms_norm_{number}" for layer in range(2) for number in range(3)],
    Residual: ["norm"],
    Channels: ["norm"],
    Modulated: [":rms_norm_0"],
}


def inline_model(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and its inputs."""
    torch.manual_seed(0)
    model = kind().eval().to(dtype)
    return model, {name: torch.randn(shape, dtype=dtype) for name, shape in INPUTS[kind].items()}
