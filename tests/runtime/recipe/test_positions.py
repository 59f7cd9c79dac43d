"""The line and column of keys and values in TOML texts."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.runtime.recipe.positions import Position, Positions

_TEXT = '''\
# [[model]] in a comment
output = "a # no comment"  # a comment = 1
[[model]]
name = """the first
[[model]]
name = "in a text\\""" "
"""
targets = [
  "ort", # "]"
  ']',
  [1, [2]],
]
[model.inner]
a.'b c'. "d" = {x = [1, {y = 2}], "z" = 3}

[[ "model" ]]
\tname='''  # its value follows

_PLACES = {
    ("output",): (2, 1),
    ("model",): (3, 1),
    ("model", 0): (3, 1),
    ("model", 0, "name"): (4, 1),
    ("model", 0, "targets"): (8, 1),
    ("model", 0, "targets", 0): (9, 3),
    ("model", 0, "targets", 1): (10, 3),
    ("model", 0, "targets", 2, 1, 0): (11, 8),
    ("model", 0, "inner"): (13, 1),
    ("model", 0, "inner", "a", "b c", "d"): (14, 10),
    ("model", 0, "inner", "a", "b c", "d", "x", 1, "y"): (14, 26),
    ("model", 0, "inner", "a", "b c", "d", "z"): (14, 35),
    ("model", 1): (16, 1),
    ("model", 1, "name"): (17, 2),
}


@pytest.mark.parametrize("value", ["'b'", '"""b"""""', "'''\nb'''", "[ ]", "{ }", "1979-05-27T07:32:00Z", "1.5e3\n\n#"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_every_key_and_element_has_its_place(value: str, ends: str) -> None:
    found = Positions.of((_TEXT + value).replace("\n", ends)).found
    assert {path: tuple(found[path]) for path in _PLACES} == _PLACES
    assert max(place.line for place in found.values()) == 17


def test_inline_tables_are_models_too() -> None:
    positions = Positions.of('model = [{name = "a"},\n  {name = "b"}]\n[defaults]\nopset = 23')
    assert positions.at(("model", 1, "name")) == Position(2, 4)
    assert positions.at(("defaults", "opset")) == Position(4, 1)


def test_what_is_missing_has_the_place_of_what_would_hold_it() -> None:
    positions = Positions.of('\n[[model]]\nname = "a"')
    assert positions.at(("model", 0, "source")) == Position(2, 1)
    assert positions.at(("nothing", 3)) == Position(1, 1)


def test_a_text_that_is_not_toml_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid value"):
        Positions.of("a = ")


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _leaves(inner, (*path, key))


def test_every_key_of_a_large_file_stands_where_it_says() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    found, lines = Positions.of(text).found, text.splitlines()
    leaves = list(_leaves(tomllib.loads(text)))
    assert len(leaves) > 200
    assert [path for path in leaves if path not in found] == []
    for path in leaves:
        if isinstance(path[-1], str):
            assert path[-1] in lines[found[path].line - 1][found[path].column - 1 :]
