"""A captured graph that differs from its model at other sizes is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.errors import MismatchError, UnsupportedError


class Plain(nn.Module):
    """While it is captured, it behaves as a model that keeps the size of the example as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class KeepsAFactor(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (10 if torch.compiler.is_exporting() else x.shape[1])


class KeepsASize(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return nn.functional.pad(y, (0, 0, 0, 16))[:, :10] if torch.compiler.is_exporting() else y


class ReturnsTenTokens(Plain):
    """PyTorch itself returns a fixed size, so the graph may."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.norm(x), (0, 0, 0, 16))[:, :10]


class FailsAtOtherSizes(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.shape[1] != 10:
            raise ValueError("ten tokens only")
        return self.norm(x)


INPUTS = {"x": torch.linspace(-1, 1, 2 * 10 * 8).reshape(2, 10, 8)}


def test_other_values_are_a_mismatch_that_names_the_sizes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MismatchError, match=r"output: at x_dim_0 5, x_dim_1 13 the captured graph differs .*--static"):
        export_model(KeepsAFactor().eval(), tmp_path / "out", inputs=INPUTS)
    assert not (tmp_path / "out").exists()


def test_a_fixed_output_dim_is_unsupported(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnsupportedError, match=r"model returns shape \[5, 13, 8\], but .* \[5, 10, 8\].*--static"):
        export_model(KeepsASize().eval(), tmp_path / "out", inputs=INPUTS)


def test_a_size_that_is_fixed_in_pytorch_too_is_exported(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = export_model(ReturnsTenTokens().eval(), tmp_path / "out", inputs=INPUTS)
    assert result.manifest["outputs"][0]["shape"] == ["x_dim_0", 10, 8]
    assert result.manifest["notes"] == []


def test_a_model_that_fails_at_other_sizes_is_noted(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = export_model(FailsAtOtherSizes().eval(), tmp_path / "out", inputs=INPUTS)
    assert len(result.manifest["notes"]) == 1
    assert "could not be compared with the model at other sizes" in result.manifest["notes"][0]
    assert "ValueError: ten tokens only" in result.manifest["notes"][0]


def test_fixed_sizes_are_exported_without_the_check(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = export_model(KeepsAFactor().eval(), tmp_path / "out", inputs=INPUTS, dynamic=False)
    assert result.manifest["inputs"][0]["shape"] == [2, 10, 8]


class SumsInPieces(nn.Module):
    """Sums tokens in pieces of 24, in a loop that a capture unrolls for the example's length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.norm = nn.RMSNorm(8, eps=1e-6)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(input_ids))
        if torch.compiler.is_exporting():  # the one piece of the example
            return x.cumsum(1)
        return torch.cat([piece.cumsum(1) for piece in x.split(24, dim=1)], dim=1)


def test_a_loop_over_pieces_ends_the_range_at_a_piece(tmp_path) -> None:  # type: ignore[no-untyped-def]
    inputs = {"input_ids": torch.arange(20).reshape(2, 10) % 16}
    result = export_model(SumsInPieces().eval(), tmp_path / "out", inputs=inputs)
    row = result.manifest["inputs"][0]
    assert (row["shape"], row["ranges"]) == (["batch", "sequence"], {"sequence": [1, 24]})
