"""A digest of parts of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.weights.digest import sample_digest


def checkpoint(path: Path, **changes: torch.Tensor) -> Path:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(300, 300), "b": torch.randn(40), "c": torch.zeros(0), **changes}
    save_file(tensors, path)
    return path


def test_equal_files_have_equal_digests(tmp_path: Path) -> None:
    assert sample_digest(checkpoint(tmp_path / "a.safetensors")) == sample_digest(
        checkpoint(tmp_path / "b.safetensors")
    )


@pytest.mark.parametrize("change", [{"a": torch.randn(300, 300)}, {"b": torch.ones(40)}, {"d": torch.ones(1)}])
def test_other_weights_have_another_digest(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    one, other = checkpoint(tmp_path / "a.safetensors"), checkpoint(tmp_path / "b.safetensors", **change)
    assert sample_digest(one) != sample_digest(other)


def test_a_file_of_another_format(tmp_path: Path) -> None:
    path, data = tmp_path / "w.bin", bytearray(torch.arange(1 << 20).numpy().tobytes())
    path.write_bytes(data)
    before = sample_digest(path)
    data[: 1 << 19] = bytes(1 << 19)
    path.write_bytes(data)
    assert sample_digest(path) != before
    (tmp_path / "empty").write_bytes(b"")
    assert len(sample_digest(tmp_path / "empty")) == 64


def test_a_damaged_or_missing_file(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="not a complete safetensors file"):
        sample_digest(path)
    with pytest.raises(UsageError, match="cannot be read"):
        sample_digest(tmp_path / "none.bin")
