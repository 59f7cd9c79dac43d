"""Activations at a model's norms, stored on disk (`ActivationStore`), because long inputs may exceed the memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import ml_dtypes
import numpy as np

from ..runners.base import Array

# A norm of the model: the path of its module, and the number of the call, from 0.
Key = tuple[str, int]


class ActivationStore:
    """Arrays by norm and role, in a temporary folder that is removed when the context exits."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rmsnorm-activations-")
        self._files: dict[tuple[Key, str], tuple[Path, bool]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._folder.cleanup()

    def put(self, key: Key, role: str, array: Array) -> None:
        """Store an array."""
        path, _ = self._files.setdefault(
            (key, role), (Path(self._folder.name) / f"{len(self._files)}.npy", array.dtype == ml_dtypes.bfloat16)
        )
        np.save(path, array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array)

    def get(self, key: Key, role: str) -> Array:
        """The stored array, memory-mapped from its file."""
        path, is_bfloat16 = self._files[key, role]
        array = np.load(path, mmap_mode="r")
        return array.view(ml_dtypes.bfloat16) if is_bfloat16 else array

    def has(self, key: Key, role: str) -> bool:
        """Whether an array is stored for this norm and role."""
        return (key, role) in self._files
