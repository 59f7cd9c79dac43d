"""A recipe (`Recipe`); while it is checked, one of its models (`Merged`) and what is wrong with it (`Problem`)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...models.errors import EnvironmentMissingError, RmsnormDeployError
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


def refused(place: Keys, check: Callable[[], Any], remedy: str = "") -> Iterator[Problem]:
    """The problem that a check of the commands names, without the options of the command line.

    Args:
        place: the path of the value.
        check: raises an error of this package where the value is wrong. What is missing on this machine is not a
            problem of the recipe: the row says so.
        remedy: what to do in a recipe, in place of what the error says.
    """
    try:
        check()
    except EnvironmentMissingError:
        return
    except RmsnormDeployError as error:
        first = re.split(r"\. |; |\.$", str(error))[0] if remedy else str(error)
        text = re.sub(r"^[a-z_0-9]+: ", "", first)  # the name of the option
        yield Problem(place, text + (f". {remedy}" if remedy else ""))


def scheme_of(quantize: str | None) -> Any:
    """The quantization that a field names; None without one.

    Raises:
        UsageError: it names none.
    """
    from ...export.lowering.weight_quantizer import parse_quantize

    return parse_quantize(quantize)
