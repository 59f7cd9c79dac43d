"""The sizes for which a captured graph is valid, of models that branch on a size, assert one, or slice a table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.capture.capture import capture
from rmsnorm_deploy.export.graph.sizes import SizeLimits
from rmsnorm_deploy.export.sizes.ranges import comparison


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-6)
        self.linear = nn.Linear(8, 8)
        self.positions = nn.Embedding(32, 8)
        self.register_buffer("table", torch.linspace(-1, 1, 32 * 8).reshape(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class BranchesOnLength(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)) * (2 if x.shape[1] > 16 else 1)


class BranchesOnBatch(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)) + (1 if x.shape[0] >= 4 else 0)


class BranchesOnOneToken(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (1 if x.shape[1] == 1 else 2)


class Asserts(Plain):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] <= 64
        return self.norm(x)


class SlicesATable(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.table[: x.shape[1]]


class ReadsPositions(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.positions(torch.arange(x.shape[1]))


class ReadsDistances(Plain):
    """A bias by distance, as in T5: the indices grow with the square of the length, and are not followed."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        return self.norm(x) + self.positions((steps[:, None] - steps[None]).clamp(0, 31)).mean(0)


class BranchesOnMultiples(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (2 if x.shape[1] % 5 == 0 else 1)


class BranchesOnTokens(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (2 if x.shape[0] * x.shape[1] > 16 else 1)


class PadsToMultiples(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.pad(self.norm(x), (0, 0, 0, -x.shape[1] % 8)))


@pytest.mark.parametrize(
    ("kind", "length", "wanted"),
    [
        (Plain, 10, SizeLimits()),
        (PadsToMultiples, 10, SizeLimits()),
        (BranchesOnLength, 10, SizeLimits({"x_dim_1": (0, 16)})),
        (BranchesOnLength, 20, SizeLimits({"x_dim_1": (17, None)})),
        (BranchesOnBatch, 10, SizeLimits({"x_dim_0": (0, 3)})),
        (BranchesOnOneToken, 10, SizeLimits({"x_dim_1": (2, None)})),
        (Asserts, 10, SizeLimits({"x_dim_1": (0, 64)})),
        (SlicesATable, 10, SizeLimits({"x_dim_1": (1, 32)})),
        (ReadsPositions, 10, SizeLimits({"x_dim_1": (0, 32)})),
        (ReadsDistances, 10, SizeLimits()),
        (BranchesOnMultiples, 10, SizeLimits({}, ("x_dim_1 % 5 == 0",))),
        (BranchesOnTokens, 10, SizeLimits({}, ("16 < x_dim_1 * x_dim_0",))),
    ],
)
def test_limits_of_a_model(kind: type[Plain], length: int, wanted: SizeLimits) -> None:
    found = capture(kind().eval(), {"x": torch.randn(2, length, 8)})
    assert (found.limits, found.notes) == (wanted, [])


def test_a_static_export_has_no_limits() -> None:
    assert not capture(BranchesOnLength().eval(), {"x": torch.randn(2, 10, 8)}, dynamic=False).limits


def test_expressions_of_torch_become_comparisons() -> None:
    names = {"s1": "sequence", "s2": "batch"}
    assert comparison("Eq(Mod(s1, 8), 0)", names) == "sequence % 8 == 0"
    assert comparison("Eq(s1, Min(32, s1))", names) == "sequence == min(32, sequence)"
    assert comparison("16 < s1*s2", names) == "16 < sequence * batch"
    assert comparison("Ne(s1, FloorDiv(s2, 2))", names) == "sequence != batch // 2"
    assert comparison("Eq(s1, s9)", names) is None
    assert comparison("Eq(IsNonOverlapping(s1, s2), 1)", names) is None
    assert comparison("s1 + s2", names) is None
