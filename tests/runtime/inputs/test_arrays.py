"""Array files: every dtype is preserved, and files that are not array files are refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.inputs.arrays import read_arrays

TORCH_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def test_safetensors_hold_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {str(dtype): torch.tensor([[1, 0, 1], [0, 3, 1]]).to(dtype) for dtype in TORCH_DTYPES}
    save_file({**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}, path)
    found = read_arrays(path)
    assert list(found) == sorted(found)
    for dtype in TORCH_DTYPES:
        array = found[str(dtype)]
        assert array.dtype.name == str(dtype).removeprefix("torch.")
        assert array.astype(np.float64).tolist() == tensors[str(dtype)].double().tolist()
    assert (found["scalar"].shape, float(found["scalar"])) == ((), 2.5)
    assert found["empty"].shape == (0, 3)


def test_bfloat16_comes_bit_for_bit(tmp_path: Path) -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"x": values}, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", x=values.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    for name in ("x.safetensors", "x.npz"):
        found = read_arrays(tmp_path / name)["x"]
        assert found.dtype == ml_dtypes.bfloat16
        assert np.array_equal(found.view(np.int16), values.view(torch.int16).numpy())


def test_npz_of_any_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(3), b=np.ones((2, 2), np.float16))
    (tmp_path / "x.npz").rename(tmp_path / "inputs")
    found = read_arrays(tmp_path / "inputs")
    assert {name: (array.dtype.name, array.shape) for name, array in found.items()} == {
        "a": ("int64", (3,)), "b": ("float16", (2, 2)),
    }  # fmt: skip


def test_files_that_are_not_array_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nosuch\.npz: there is no such file"):
        read_arrays(tmp_path / "nosuch.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UsageError, match=r"text\.npz: expected an \.npz file of plain arrays"):
        read_arrays(tmp_path / "text.npz")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UsageError, match=r"text\.safetensors: not a \.safetensors file"):
        read_arrays(tmp_path / "text.safetensors")
    save_file({"x": torch.ones(100)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"x\.safetensors: .* truncated"):
        read_arrays(tmp_path / "x.safetensors")


def test_dtypes_that_are_not_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"x: expected one of the dtypes F64, F32.*, got F8_E4M3"):
        read_arrays(tmp_path / "x.safetensors")
