"""A recipe (`Recipe`); while it is checked, one of its models (`Merged`) and what is wrong with it (`Problem`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .positions import Path as Keys


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe without problems.

    Attributes:
        path: the file.
        output: the folder of the results, absolute.
        models: the fields of each model by the names in the file, with the defaults where it does not say; fields that
            neither gives are left out.
    """

    path: Path
    output: Path
    models: tuple[dict[str, Any], ...]


class Problem(NamedTuple):
    """What is wrong with a key: its path, and "expected X, got Y"."""

    path: Keys
    text: str


class Merged(NamedTuple):
    """A model with its defaults.

    Attributes:
        values: its fields.
        places: where each field stands in the file: in the model, or in the defaults.
        header: the path of the model.
    """

    values: dict[str, Any]
    places: dict[str, Keys]
    header: Keys

    def at(self, key: str) -> Keys:
        """Where a field stands; the model, if nowhere."""
        return self.places.get(key, self.header)


def suggestion(given: str, known: Iterable[str]) -> str:
    """The question whether the nearest of some names was meant; empty if none is near."""
    near = difflib.get_close_matches(given, list(known), 1)
    return f". Did you mean {near[0]!r}?" if near else ""
