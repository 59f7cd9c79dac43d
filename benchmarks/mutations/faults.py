"""A fault (`Fault`): what it changes, where it is planted, and where `bisect` must locate it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
        plant: plants the fault in the open file; None for a fault that `damage` plants.
        norms: module paths that `bisect` must name; empty for a fault between norms.
        attentions: module paths that `bisect` must name as attentions; empty for other faults.
        before: norm or output at the end of the segment that `bisect` must name; empty for a fault in norms. A fault
            without `norms`, `attentions` and `before` must be detected, but need not be located.
        dtype: dtype of the model.
        variant: variant of the model, see `Subject`.
        family: the kind of fault, a key of `catalog.FAMILIES`.
        damage: plants the fault in the files of a copied folder.
    """

    name: str
    model: str
    target: str
    plant: Plant | None
    norms: tuple[str, ...] = ()
    before: str = ""
    dtype: str = "float32"
    variant: str = "plain"
    family: str = ""
    attentions: tuple[str, ...] = ()
    damage: Callable[[Path], None] | None = None

    @property
    def subject(self) -> Subject:
        """The exported model."""
        return Subject(self.model, self.dtype, self.variant)

    def write(self, honest: Path, folder: Path) -> Path:
        """Write a copy of the fault-free folder with the fault planted; returns `folder`."""
        if self.damage is not None:
            shutil.copytree(honest, folder)
            self.damage(folder)
        if self.plant is None:
            return folder
        edit = Edit(honest)
        self.plant(edit)
        return edit.save(folder)


def of_family(family: str, faults: Iterable[Fault]) -> tuple[Fault, ...]:
    """The faults, as members of a family."""
    return tuple(replace(fault, family=family) for fault in faults)
