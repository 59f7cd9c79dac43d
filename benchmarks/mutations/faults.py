"""The faults: what each one breaks, where it is planted, and where `bisect` must find it."""

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
        name: what is wrong.
        model: which model it is planted in, see `Subject`.
        target: in which of its four files.
        plant: makes the fault in the open file.
        norms: module paths that `bisect` must name; empty for a fault between norms.
        before: the norm or output before which the segment lies that `bisect` must name; empty for a fault in norms.
        dtype: of the model.
        padded: whether it shows only where the attention mask hides something.
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
        """The model as it was exported."""
        return Subject(self.model, self.dtype)

    def write(self, honest: Path, folder: Path) -> Path:
        """Write the honest folder with the fault in it; returns `folder`."""
        edit = Edit(honest)
        self.plant(edit)
        return edit.save(folder)
