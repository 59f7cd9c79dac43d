"""Small modules that the tests export."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HalfCastNorm(nn.Module):
    """Normalizes in float32, casts, then multiplies by the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = hidden_states.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(hidden_states.dtype)


class Residual(nn.Module):
    """Two residual blocks; each sum is normalized and used again."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norms = nn.ModuleList([HalfCastNorm(width), nn.RMSNorm(width, eps=1e-5)])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(self.norms[0](x))
        return self.norms[1](x) + x


class WithoutNorm(nn.Module):
    """Has no norm at all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


def residual_inputs() -> dict[str, Tensor]:
    """Inputs for `Residual` and `WithoutNorm` of the same width: `[2, 3, width]`."""
    return {"x": torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(4))}
