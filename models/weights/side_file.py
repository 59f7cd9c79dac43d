"""A temporary file for weights that had to be computed, mapped as the files of a checkpoint are (`SideFile`)."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError
from .mapped_file import Mapping

# Bytes that are written at a time.
_CHUNK = 16 << 20


class SideFile:
    """A file without a name, which the system deletes when its last tensor is gone, also after a kill."""

    def __init__(self, folder: Path | None = None) -> None:
        """Create the file.

        Args:
            folder: where; the system's folder for temporary files when None, which may be in memory.

        Raises:
            UsageError: the folder cannot be written to.
        """
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open while tensors are added)
        except OSError as error:
            raise UsageError(f"{folder or tempfile.gettempdir()}: cannot be written to: {error.strerror}.") from error
        self._end = 0

    def add(self, tensor: Tensor) -> Tensor:
        """Write a tensor to the file.

        Returns:
            The same values at rest, contiguous.

        Raises:
            UsageError: the disk is full.
        """
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if not len(flat):
            return tensor.detach()
        try:
            self._file.seek(start)
            for part in flat.split(_CHUNK):
                self._file.write(part.numpy().data)
            self._file.flush()
            region = Mapping(self._file.fileno(), len(flat), offset=start)  # shared: pages are the file's
        except (OSError, ValueError) as error:
            raise UsageError(f"writing {len(flat)} bytes of converted weights to a temporary file: {error}.") from error
        self._end = start + len(flat)
        region.register(f"computed weights {start}")
        return torch.frombuffer(region, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
