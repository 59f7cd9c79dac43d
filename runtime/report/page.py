"""Pages that results are printed on: a terminal's, plain text, or HTML for a notebook."""

from __future__ import annotations

import html
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from .text import write_text

# A screen of at most this width shows lists instead of tables.
_NARROW = 40
# Cells up to this length are not split if they are numbers or single words; other columns get at least so many
# characters; between columns are at most so many.
_WHOLE, _LEAST, _BETWEEN = 18, 10, 3


class Page(Protocol):
    """Takes lines and tables."""

    def line(self, text: str = "") -> None:
        """Add one line."""
        ...

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table."""
        ...


def aligned(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table as lines of text, its columns aligned with spaces."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (columns, *texts)
    ]


def folded(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as a list of `name: value` lines, with an empty line between rows, for narrow screens."""
    lines: list[str] = []
    for row in rows:
        lines += [""] if lines else []
        lines += [f"{column}: {cell}" for column, cell in zip(columns, row, strict=True)]
    return lines


def is_whole(cells: Sequence[str]) -> bool:
    """Whether the cells of a column are numbers or short words, which are never split over two lines."""
    return all(len(cell) <= _WHOLE and (" " not in cell or any(map(str.isdigit, cell))) for cell in cells)


def fits(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Whether a table is readable in this width: whole cells in one line, and some characters for each other column."""
    if width <= _NARROW:
        return False
    needed = 0
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows]
        words = max(map(len, column.split()), default=0)
        longest = max((len(cell) for cell in cells), default=0)
        needed += max(words, longest if is_whole(cells) else min(longest, _LEAST)) + _BETWEEN
    return needed <= width


class TextPage:
    """Plain text."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        """See `Page.line`."""
        self.lines.append(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See `Page.table`."""
        self.lines += aligned(columns, rows)

    def __str__(self) -> str:
        return "\n".join(self.lines)


class HtmlPage:
    """HTML without a head or a style of its own, as notebooks show it; every text is escaped."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def line(self, text: str = "") -> None:
        """See `Page.line`."""
        if text:
            self._parts.append(f"<div>{html.escape(text)}</div>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See `Page.table`."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def __str__(self) -> str:
        return "\n".join(self._parts)


class Shown(ABC):
    """A result that prints as a short text, shows in a notebook, and can be saved as JSON."""

    __slots__ = ()

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""

    @abstractmethod
    def show(self, page: Page) -> None:
        """Print the result on a page."""

    def __str__(self) -> str:
        page = TextPage()
        self.show(page)
        return str(page)

    def _repr_html_(self) -> str:
        page = HtmlPage()
        self.show(page)
        return str(page)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result as JSON, as the command line's --json prints it.

        Raises:
            UsageError: the place cannot be written to; a file that was there is left as it was.
        """
        write_text(json.dumps(self.to_dict(), indent=2) + "\n", path)
