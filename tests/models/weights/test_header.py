"""The header of a safetensors file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.weights.header import read_header


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def row(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool,
        torch.float8_e4m3fn,
    ],
    ids=str,
)  # fmt: skip
def test_places_are_those_of_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "b": torch.ones(4).to(dtype),
        "scalar": torch.ones(()).to(dtype),
    }
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    data = (tmp_path / "m.safetensors").read_bytes()
    found = {tensor.name: tensor for tensor in read_header(tmp_path / "m.safetensors")}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = found[name]
        assert (stored.dtype, stored.shape) == (str(dtype).removeprefix("torch."), tuple(tensor.shape))
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[stored.offset : stored.offset + stored.length] == raw


DAMAGED = {
    "empty": lambda p: p.write_bytes(b""),
    "only a length": lambda p: p.write_bytes(struct.pack("<Q", 10)),
    "a header beyond the end": lambda p: p.write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
    "not JSON": lambda p: write(p, b"{nonsense"),
    "not an object": lambda p: write(p, [1]),
    "a pointer of Git LFS": lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "no shape": lambda p: write(p, {"a": {"dtype": "F32"}}, bytes(8)),
    "a negative offset": lambda p: write(p, {"a": row(offsets=(-8, 0))}, bytes(8)),
    "a float in the shape": lambda p: write(p, {"a": row(shape=(2.0,))}, bytes(8)),
    "too few bytes for the shape": lambda p: write(p, {"a": row(shape=(3,))}, bytes(8)),
    "a gap": lambda p: write(p, {"a": row(), "b": row(offsets=(12, 20))}, bytes(20)),
    "an overlap": lambda p: write(p, {"a": row(), "b": row(offsets=(4, 12))}, bytes(12)),
    "truncated": lambda p: write(p, {"a": row()}, bytes(7)),
    "longer than the header says": lambda p: write(p, {"a": row()}, bytes(9)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.safetensors"
    DAMAGED[name](path)
    with pytest.raises(UsageError, match=r"m\.safetensors is not a complete safetensors file"):
        read_header(path)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", {"a": row("F4", offsets=(0, 1))}, bytes(1))
    with pytest.raises(UsageError, match="a has the dtype 'F4', which PyTorch cannot hold"):
        read_header(tmp_path / "m.safetensors")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_header(tmp_path / "m.safetensors")
