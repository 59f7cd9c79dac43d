"""A digest of parts of a large file, which tells other weights apart without reading all of them (`sample_digest`)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import UsageError
from .header import read_header

# From each tensor, or from each of this number of places in a file of another format, so many bytes are read.
_BYTES, _PLACES = 1024, 256


def sample_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's size, its header, and some bytes in the middle of each of its tensors.

    Training changes nearly all elements of the tensors that it changes, so another checkpoint has another digest. A
    change of a few bytes elsewhere is not seen.

    Args:
        path: a safetensors file; of another file, bytes at evenly spaced places are read.

    Raises:
        UsageError: the file cannot be read, or is a damaged safetensors file.
    """
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for start, length in _spans(path, size):
                file.seek(start)
                digest.update(file.read(length))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


def _spans(path: Path, size: int) -> list[tuple[int, int]]:
    if path.suffix == ".safetensors":
        stored = [tensor for tensor in read_header(path) if tensor.length]
        header = min((tensor.offset for tensor in stored), default=size)
        return [(0, header), *(_middle(tensor.offset, tensor.length) for tensor in stored)]
    step = max(size // _PLACES, _BYTES)
    return [(start, _BYTES) for start in range(0, size, step)]


def _middle(start: int, length: int) -> tuple[int, int]:
    return (start + (length - _BYTES) // 2, _BYTES) if length > _BYTES else (start, length)
