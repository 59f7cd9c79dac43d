"""The line and column of every key and value in a TOML text (`Positions`), which tomllib does not give."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from typing import NamedTuple

Path = tuple[str | int, ...]
_BLANK = " \t\r\n"
_QUOTES = "\"'"


class Position(NamedTuple):
    """A place in a text; both numbers begin at 1."""

    line: int
    column: int


@dataclass(slots=True)
class Positions:
    """Where each key of a TOML text is.

    Attributes:
        found: the position by path: `("model", 1, "name")` is the key `name` in the second `[[model]]`, `("model", 1)`
            its header, and `("model", 1, "targets", 0)` the first element of an array.
    """

    found: dict[Path, Position] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Positions:
        """The positions in a text that tomllib accepts.

        Raises:
            ValueError: it is not TOML.
        """
        tomllib.loads(text)
        return cls(_Scanner(text).scan())

    def at(self, path: Path) -> Position:
        """The position of a path, or of the longest beginning of it that the text has; else the first character."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.found:
                return self.found[path[:length]]
        return Position(1, 1)


class _Scanner:
    """Walks through a text that is known to be TOML, so that it need not check anything."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[Path, Position] = {}
        self.lengths: dict[Path, int] = {}  # of the arrays of tables

    def scan(self) -> dict[Path, Position]:
        table: Path = ()
        while self.skip_blank():
            if self.text.startswith("[[", self.at):
                table = self.header(2)
            elif self.text[self.at] == "[":
                table = self.header(1)
            else:
                self.pair(table)
        return self.found

    def header(self, brackets: int) -> Path:
        start = self.at
        self.at += brackets
        *parents, (last, _) = self.keys()
        self.at += brackets
        path: Path = ()
        for name, _ in parents:
            self.found.setdefault((*path, name), self.position(start))
            path = self.inside((*path, name))
        path = (*path, last)
        if brackets == 2:
            self.lengths[path] = self.lengths.get(path, 0) + 1
            self.found.setdefault(path, self.position(start))
            path = self.inside(path)
        self.found.setdefault(path, self.position(start))
        return path

    def inside(self, path: Path) -> Path:
        """The path of the last table, where a path is that of an array of tables."""
        return (*path, self.lengths[path] - 1) if path in self.lengths else path

    def pair(self, table: Path) -> None:
        path = table
        for name, start in self.keys():
            path = (*path, name)
            self.found.setdefault(path, self.position(start))
        self.at += 1  # the sign =
        self.skip_blank()
        self.value(path)

    def keys(self) -> list[tuple[str, int]]:
        """The parts of a dotted key, each with its offset; ends before what follows the key."""
        found = []
        while True:
            self.skip_blank()
            start = self.at
            if self.text[start] in _QUOTES:
                self.string()
            else:
                while self.text[self.at] not in " \t.=]":
                    self.at += 1
            (name,) = tomllib.loads(f"{self.text[start : self.at]} = 0")
            found.append((name, start))
            self.skip_blank()
            if self.text[self.at] != ".":
                return found
            self.at += 1

    def value(self, path: Path) -> None:
        first = self.text[self.at]
        if first in _QUOTES:
            self.string()
        elif first == "[":
            self.array(path)
        elif first == "{":
            self.inline_table(path)
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}#\n":
                self.at += 1

    def array(self, path: Path) -> None:
        self.at += 1
        number = 0
        while self.skip_blank() and self.text[self.at] != "]":
            if self.text[self.at] == ",":
                self.at += 1
                continue
            self.found[(*path, number)] = self.position(self.at)
            self.value((*path, number))
            number += 1
        self.at += 1

    def inline_table(self, path: Path) -> None:
        self.at += 1
        while self.skip_blank() and self.text[self.at] != "}":
            if self.text[self.at] == ",":
                self.at += 1
            else:
                self.pair(path)
        self.at += 1

    def string(self) -> None:
        quote = self.text[self.at]
        end = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(end)
        while not self.text.startswith(end, self.at):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        self.at += len(end)
        while len(end) == 3 and self.text.startswith(quote, self.at):  # a text may end in one or two quotes itself
            self.at += 1

    def skip_blank(self) -> bool:
        """Skip blanks, ends of lines and comments; whether anything follows."""
        while self.at < len(self.text):
            if self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif self.text[self.at] in _BLANK:
                self.at += 1
            else:
                return True
        return False

    def position(self, offset: int) -> Position:
        before = self.text.rfind("\n", 0, offset)
        return Position(self.text.count("\n", 0, offset) + 1, offset - before)
