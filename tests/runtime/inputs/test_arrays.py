"""Array files: every dtype is preserved, and files that are not array files are refused."""

from __future__ import annotations

import io
import os
import zipfile
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


def _npy(array: np.ndarray, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


ONES = _npy(np.ones(3, np.float32))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("d/", b""), ("a.npy", ONES)], "member 'd/': expected the name of an array, NAME.npy"),
        ([("a.txt", b"hello")], "member 'a.txt': expected the name of an array"),
        ([("a.npy", ONES), ("a.npy", ONES)], "member 'a.npy': expected one array of this name, got several"),
        ([("a.npy", b"\x80\x04}.")], "expected an .npz file of plain arrays"),
        ([("a.npy", b"\x93NUMPY\x09\x00")], "expected an .npz file of plain arrays"),
        (
            [("a.npy", _npy(np.array([{1: 2}], object), True))],
            "expected an .npz file of plain arrays, got Python objects",
        ),
        ([("a.npy", _header((1 << 50,)))], "expected 4503599627370624 bytes for shape 1125899906842624 of float32"),
        ([("a.npy", _header((-3,)))], "bytes for shape -3 of float32"),
        ([("a.npy", ONES[:-1])], "expected 140 bytes for shape 3 of float32, got 139"),
        ([("a.npy", ONES + b"x")], "expected 140 bytes for shape 3 of float32, got 141"),
    ],
)
def test_members_that_are_not_arrays(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    with pytest.raises(UsageError) as caught:
        read_arrays(tmp_path / "x.npz")
    assert message in str(caught.value)


def test_a_name_with_a_nul_character(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("aXb.npy", ONES)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes().replace(b"aXb", b"a\0b"))
    with pytest.raises(UsageError, match="expected the name of an array"):
        read_arrays(tmp_path / "x.npz")


def test_odd_names_of_arrays_are_only_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name in (".npy", "../x.npy", "a/b.npy"):
            archive.writestr(name, ONES)
    assert sorted(read_arrays(tmp_path / "x.npz")) == ["", "../x", "a/b"]


def test_a_small_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    size = 300 << 20
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w") as member,
    ):
        member.write(_header((size // 4,)))
        for _ in range(300):
            member.write(bytes(1 << 20))
    with pytest.raises(UsageError, match=r"member 'a\.npy': expected at most 200 times its .* compressed bytes"):
        read_arrays(tmp_path / "x.npz")


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    for name in ("x.npz", "x.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UsageError, match="expected a regular file, got a pipe"):
            read_arrays(tmp_path / name)
