"""A temporary file for weights that were computed."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.weights import mapped_file as mapping
from rmsnorm_deploy.models.weights.mapped_file import is_mapped, places_of, release_pages
from rmsnorm_deploy.models.weights.side_file import SideFile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_a_tensor_at_rest_has_the_same_values(tmp_path: Path, dtype: torch.dtype) -> None:
    file = SideFile(tmp_path)
    tensors = [torch.randn(5, 300).to(dtype), torch.randn(300, 5).to(dtype).t(), torch.ones(()).to(dtype)]
    stored = [file.add(tensor) for tensor in tensors]
    for before, after in zip(tensors, stored, strict=True):
        assert torch.equal(before, after)
        assert after.is_contiguous()
        assert after.data_ptr() != before.data_ptr()


def test_the_file_has_no_name_and_its_values_outlive_a_release(tmp_path: Path) -> None:
    before = len(mapping._mappings)
    stored = SideFile(tmp_path).add(torch.arange(10_000))
    assert list(tmp_path.iterdir()) == []
    stored[5] = -1
    assert is_mapped(stored)
    assert places_of([stored]) == [None]  # the file has no name by which another program finds it
    release_pages()
    assert stored[:7].tolist() == [0, 1, 2, 3, 4, -1, 6]
    del stored
    gc.collect()
    assert len(mapping._mappings) == before


def test_an_empty_tensor(tmp_path: Path) -> None:
    assert SideFile(tmp_path).add(torch.empty(0, 3)).shape == (0, 3)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written to"):
        SideFile(tmp_path / "none")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SideFile(tmp_path)

    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(UsageError, match="No space left on device"):
        file.add(torch.ones(4))
