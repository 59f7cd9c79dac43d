"""A fault (`Fault`): what it changes, where it is planted, and where `bisect` must locate it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .subjects import Subject
from .surgery import Edit

Plant = Callable[[Edit], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault in an exported file.

    Attributes:
        name: description of the fault.
        model: the model that it is planted in, see `Subject`.
        target: the target of the file that it is planted in.
        plant: plants the fault in the open file.
        norms: module paths that `bisect` must name; empty for a fault between norms.
        before: norm or output at the end of the segment that `bisect` must name; empty for a fault in norms.
        dtype: dtype of the model.
        padded: whether it has an effect only if the attention mask contains zeros.
    """

    name: str
    model: str
    target: str
    plant: Plant
    norms: tuple[str, ...] = ()
    before: str = ""
    dtype: str = "float32"
    padded: bool = False

    @property
    def subject(self) -> Subject:
        """The exported model."""
        return Subject(self.model, self.dtype)

    def write(self, honest: Path, folder: Path) -> Path:
        """Write a copy of the fault-free folder with the fault planted; returns `folder`."""
        edit = Edit(honest)
        self.plant(edit)
        return edit.save(folder)
