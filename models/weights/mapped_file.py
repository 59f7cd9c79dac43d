"""Files whose bytes are PyTorch tensors without being read (`map_file`), and where tensors' bytes live (`places_of`).

A mapping is private: a program that writes to such a tensor changes its own copy of the memory page, never the file.
The system reads a page when it is first used, and may drop it again at any time.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError
from .header import StoredTensor

# Bytes of a tensor that are compared at a time.
_CHUNK = 16 << 20
# Flag of mmap(2) in Linux: no memory is set aside for pages that the program may write. Python 3.13 has a name for it.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_SMAPS = Path("/proc/self/smaps")
_RANGE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ")


@dataclass(frozen=True, slots=True)
class Stamp:
    """The state of a file, to detect changes: its size in bytes, modification time in ns, device and inode."""

    size: int
    changed_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The file's current state.

        Raises:
            OSError: the file does not exist.
        """
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


class MappedFile(mmap.mmap):
    """A file in the address space, which lives as long as a tensor of it.

    Attributes:
        path: the file.
        stamp: its state when it was mapped.
        start: the address of its first byte.
    """

    path: Path
    stamp: Stamp
    start: int

    def tensor(self, stored: StoredTensor) -> Tensor:
        """A tensor of the file, which is not read."""
        dtype = getattr(torch, stored.dtype)
        if stored.length == 0:
            return torch.empty(stored.shape, dtype=dtype)
        flat = torch.frombuffer(self, dtype=torch.uint8, count=stored.length, offset=stored.offset)
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()  # PyTorch reads aligned elements only
        return flat.view(dtype).view(stored.shape)

    def check_unchanged(self) -> None:
        """Check that the file on disk is the one that was mapped.

        Raises:
            UsageError: it was changed, replaced or removed since.
        """
        try:
            same = Stamp.of(self.path) == self.stamp
        except OSError:
            same = False
        if not same:
            raise UsageError(
                f"{self.path} changed while it was in use, so the result is not reliable. Wait until no other program "
                "writes it, and start again."
            )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes live: a mapped file, and the offset and length there in bytes."""

    file: MappedFile
    offset: int
    length: int


_mapped: weakref.WeakSet[MappedFile] = weakref.WeakSet()


def map_file(path: Path) -> MappedFile:
    """Map a file.

    Raises:
        UsageError: it cannot be opened or mapped, or is empty.
    """
    try:
        with path.open("rb") as file:
            stamp = Stamp.of(path)
            if sys.platform == "win32":
                mapped = MappedFile(file.fileno(), 0, access=mmap.ACCESS_COPY)
            else:
                flags, prot = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                mapped = MappedFile(file.fileno(), 0, flags=flags, prot=prot)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be mapped: {error}.") from error
    mapped.path, mapped.stamp = path, stamp
    mapped.start = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    _mapped.add(mapped)
    return mapped


def places_of(tensors: Iterable[Tensor]) -> list[Place | None]:
    """Where the bytes of tensors live, if they are those of a mapped file, in their order.

    None for a tensor in memory, for one that is a part or a transposition of a stored one, and for one whose values
    a program changed since the file was mapped.
    """
    written = _written_ranges()
    found = []
    for tensor in tensors:
        place = _place(tensor)
        found.append(place if place is None or _is_stored(tensor, place, written) else None)
    return found


def is_mapped(tensor: Tensor) -> bool:
    """Whether the bytes of a tensor are those of a mapped file, in its order."""
    return _place(tensor) is not None


def position_of(tensor: Tensor) -> tuple[MappedFile, int] | None:
    """The mapped file that holds the elements of a tensor, in any order, and the offset of the first of them."""
    if tensor.device.type != "cpu" or type(tensor) not in (Tensor, torch.nn.Parameter):
        return None
    address = tensor.data_ptr()
    return next(((f, address - f.start) for f in list(_mapped) if 0 <= address - f.start < f.stamp.size), None)


def _place(tensor: Tensor) -> Place | None:
    if not tensor.is_contiguous() or tensor.numel() == 0:
        return None
    length, found = tensor.numel() * tensor.element_size(), position_of(tensor)
    if found is None or found[1] + length > found[0].stamp.size:
        return None
    return Place(*found, length)


def _is_stored(tensor: Tensor, place: Place, written: list[range] | None) -> bool:
    """Whether the file has the bytes of a tensor; they are compared if a page of its mapping was written to."""
    start, end = place.file.start, place.file.start + place.file.stamp.size
    if written is not None and not any(pages.start < end and start < pages.stop for pages in written):
        return True
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    with place.file.path.open("rb") as file:
        file.seek(place.offset)
        return all(file.read(len(part)) == part.numpy().tobytes() for part in flat.split(_CHUNK))


def _written_ranges() -> list[range] | None:
    """The address ranges in which this process has pages of its own; None where the system does not tell."""
    try:
        lines = _SMAPS.read_bytes().splitlines()
    except OSError:
        return None
    found: list[range] = []
    current = range(0)
    for line in lines:
        bounds = _RANGE.match(line)
        if bounds:
            current = range(int(bounds[1], 16), int(bounds[2], 16))
        elif line.startswith((b"Anonymous:", b"Swap:")) and int(line.split()[1]) > 0:
            found.append(current)
    return found


def release_pages() -> None:
    """Give the pages of all mapped files, as far as they are the files', back to the system."""
    files = list(_mapped)
    written = _written_ranges() if files else None
    for file in files:
        end = file.start + file.stamp.size
        if written is not None and not any(pages.start < end and file.start < pages.stop for pages in written):
            with contextlib.suppress(OSError):
                file.madvise(mmap.MADV_DONTNEED)
