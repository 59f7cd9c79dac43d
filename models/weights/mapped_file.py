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
from ..regular_files import FileStamp
from .header import StoredTensor

# Bytes of a tensor that are compared at a time.
_CHUNK = 16 << 20
# Flag of mmap(2) in Linux: no memory is set aside for pages that the program may write. Python 3.13 has a name for it.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_SMAPS = Path("/proc/self/smaps")
_RANGE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ")


class Mapping(mmap.mmap):
    """A part of a file in the address space, which lives as long as a tensor of it.

    Attributes:
        label: a name that is the same in another process.
        start: the address of its first byte.
        length: in bytes.
    """

    label: str
    start: int
    length: int

    def register(self, label: str) -> None:
        """Set the attributes, and make the mapping known to `position_of`."""
        self.label, self.length = label, len(self)
        self.start = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        _mappings.add(self)


class MappedFile(Mapping):
    """A file of weights, privately mapped.

    Attributes:
        stamp: the state of the file when it was mapped.
    """

    stamp: FileStamp

    @property
    def path(self) -> Path:
        """The file."""
        return self.stamp.path

    def tensor(self, stored: StoredTensor) -> Tensor:
        """A tensor of the file, which is not read."""
        dtype = getattr(torch, stored.dtype)
        if stored.length == 0:
            return torch.empty(stored.shape, dtype=dtype)
        flat = torch.frombuffer(self, dtype=torch.uint8, count=stored.length, offset=stored.offset)
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()  # PyTorch reads aligned elements only
        return flat.view(dtype).view(stored.shape)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes live: a mapped file, and the offset and length there in bytes."""

    file: MappedFile
    offset: int
    length: int


_mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()


def map_file(path: Path) -> MappedFile:
    """Map a file.

    Raises:
        UsageError: it cannot be opened or mapped, or is empty.
    """
    try:
        with path.open("rb") as file:
            stamp = FileStamp.of(path)
            if sys.platform == "win32":
                mapped = MappedFile(file.fileno(), 0, access=mmap.ACCESS_COPY)
            else:
                flags, prot = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                mapped = MappedFile(file.fileno(), 0, flags=flags, prot=prot)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be mapped: {error}.") from error
    mapped.stamp = stamp
    mapped.register(path.name)
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
    """Whether the elements of a tensor are in a mapped file, in any order."""
    return position_of(tensor) is not None


def position_of(tensor: Tensor) -> tuple[Mapping, int] | None:
    """The mapping that holds the elements of a tensor, in any order, and the offset of the first of them."""
    if tensor.device.type != "cpu" or type(tensor) not in (Tensor, torch.nn.Parameter):
        return None
    address = tensor.data_ptr()
    return next(((m, address - m.start) for m in list(_mappings) if 0 <= address - m.start < m.length), None)


def _place(tensor: Tensor) -> Place | None:
    """Where the bytes of a contiguous tensor are in a mapped file of weights."""
    if not tensor.is_contiguous() or tensor.numel() == 0:
        return None
    length, found = tensor.numel() * tensor.element_size(), position_of(tensor)
    if found is None or not isinstance(found[0], MappedFile) or found[1] + length > found[0].length:
        return None
    return Place(found[0], found[1], length)


def _is_stored(tensor: Tensor, place: Place, written: list[range] | None) -> bool:
    """Whether the file has the bytes of a tensor; they are compared if a page of its mapping was written to."""
    if written is not None and not _overlaps(place.file, written):
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


def _overlaps(mapping: Mapping, ranges: list[range]) -> bool:
    return any(pages.start < mapping.start + mapping.length and mapping.start < pages.stop for pages in ranges)


def release_pages() -> None:
    """Give the pages of all mappings back to the system, except those of a private one that was written to."""
    mappings = list(_mappings)
    written = _written_ranges() if mappings else None
    for mapping in mappings:
        is_private = isinstance(mapping, MappedFile)
        if not is_private or (written is not None and not _overlaps(mapping, written)):
            with contextlib.suppress(OSError, AttributeError):  # Windows has no madvise
                mapping.madvise(mmap.MADV_DONTNEED)
