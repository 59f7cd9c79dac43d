"""Read a recipe (`read_recipe`), with every problem in it by its line and column."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...export.onnx_io.manifest_fields import field_problem
from ...models.errors import UsageError
from ...models.hub.options import TOKEN_VARIABLE
from ...models.regular_files import read_bytes
from .checks import value_problems
from .defaults import merged
from .fields import LimitFields, ModelFields, RecipeFields, Settings, names_of
from .positions import Path as Keys
from .positions import Position, Positions
from .recipe import Problem, Recipe, suggestion
from .sources import home_expanded

RECIPE = "rmsnorm.toml"
_LARGEST = 16 << 20
# What TOML calls the types that pydantic expects.
_AS_TOML = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "Input should be a table")
_PLACE = re.compile(r" \(at line (\d+), column (\d+)\)$")


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UsageError: the file cannot be read, or has problems: all of them, one a line, as
            "FILE:LINE:COLUMN: KEY: expected X, got Y".
    """
    if not path.exists():
        raise UsageError(f"{path}: there is no such file. Write one with: rmsnorm init MODEL -o {path}")
    content = read_bytes(path, _LARGEST)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise UsageError(
            f"{path}:{line}:{column}: expected UTF-8, got the byte {content[error.start]:#04x}."
        ) from error
    return parse_recipe(text, path)


def parse_recipe(text: str, path: Path) -> Recipe:
    """Check the text of a recipe; see `read_recipe`.

    Args:
        text: the text.
        path: its file, for messages, and whose folder relative paths are relative to.
    """
    text = text.removeprefix("\ufeff")  # a mark with which some editors begin a file
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(_syntax_problem(path, text, error)) from error
    problems = _field_problems(content)
    wrong = {problem.path[: 3 if problem.path[0] == "model" else 2] for problem in problems}
    models = merged(content, path.parent)
    given = content.get("output", RecipeFields.model_fields["output"].default)
    if isinstance(given, str) and "\0" in given:
        problems.append(Problem(("output",), f"expected a path without NUL characters, got {given!r}"))
        given = ""
    output = Path(path.parent, home_expanded(given if isinstance(given, str) else "")).absolute()
    problems += value_problems(models, path.parent, output, wrong)
    if problems:
        raise UsageError(_listed(path, Positions.of(text), problems))
    return Recipe(path, output, tuple(model.values for model in models))


def _field_problems(content: Mapping[str, Any]) -> list[Problem]:
    """Unknown keys, missing keys and wrong types."""
    try:
        RecipeFields.model_validate(content)
    except ValidationError as error:
        return [_problem(row) for row in error.errors(include_url=False)]
    return [] if content["model"] else [Problem(("model",), "expected at least one [[model]], got none")]


def _problem(row: Mapping[str, Any]) -> Problem:
    path: Keys = tuple(row["loc"])
    if row["type"] == "extra_forbidden":
        fields = _fields_of(path[:-1])
        if "token" in str(path[-1]).lower():
            return Problem(path, f"a recipe has no token, as it is kept and shared; set the variable {TOKEN_VARIABLE}")
        return Problem(path, f"unknown key; expected one of {', '.join(fields)}{suggestion(str(path[-1]), fields)}")
    if row["type"] == "missing":
        what = "at least one [[model]]" if path == ("model",) else "a value"
        return Problem(path, f"expected {what}, got none")
    if path == ("model",) and isinstance(row["input"], dict):
        return Problem(path, "expected [[model]], of which there may be several, got one table, [model]")
    return Problem(path, field_problem({**row, "msg": _AS_TOML.get(row["type"], row["msg"])}))


def _fields_of(table: Keys) -> list[str]:
    """The names of the fields of a table, as the file has them."""
    if "limits" in table:
        return sorted(names_of(LimitFields))
    return sorted(names_of((RecipeFields, Settings, ModelFields)[len(table)]))


def _listed(path: Path, positions: Positions, problems: Iterable[Problem]) -> str:
    rows: dict[tuple[Position, str], None] = {}
    for problem in problems:
        shown = _shown_key(problem.path)
        rows[positions.at(problem.path), f"{shown}: {problem.text}"] = None
    lines = [f"{path}:{place.line}:{place.column}: {text}" for place, text in sorted(rows)]
    return "\n".join(line if line.endswith((".", "?")) else f"{line}." for line in lines)


def _shown_key(path: Keys) -> str:
    """The key as the file has it: the last name, with the number of an element of an array."""
    names = [part for part in path if isinstance(part, str)]
    number = path[-1] if isinstance(path[-1], int) else None
    if number is None:
        return names[-1]
    return f"[[{names[-1]}]] {number + 1}" if len(path) == 2 else f"{names[-1]}[{number}]"


def _syntax_problem(path: Path, text: str, error: tomllib.TOMLDecodeError) -> str:
    message = str(error)
    place = _PLACE.search(message)
    line, column = (int(place[1]), int(place[2])) if place else (text.count("\n") + 1, len(text) - text.rfind("\n"))
    reason = _PLACE.sub("", message).removesuffix(" (at end of document)")
    return f"{path}:{line}:{column}: expected TOML, got: {reason[:1].lower()}{reason[1:]}."
