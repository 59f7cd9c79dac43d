"""Print results to stdout, progress and errors to stderr, with rich on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from rmsnorm_deploy.cli.failures import Failure
from rmsnorm_deploy.models.hub.options import HubOptions, showing_downloads, without_token
from rmsnorm_deploy.runtime.report.page import aligned, fits, folded, is_whole
from rmsnorm_deploy.runtime.report.printed import brief
from rmsnorm_deploy.runtime.report.text import printable, size_text

DEBUG_VARIABLE, PROGRESS_VARIABLE = "RMSNORM_DEBUG", "RMSNORM_PROGRESS"


class Screen:
    """Prints text for people, or one JSON object for programs.

    Args:
        as_json: whether only JSON is printed to stdout.
        quiet: print no progress and no notes, and of a result only the verdict and what failed.
    """

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    @property
    def is_live(self) -> bool:
        """Whether progress is shown on one line that is updated."""
        return sys.stderr.isatty() and not self.quiet

    def result(self, payload: dict[str, Any], for_people: Callable[[], None], *, is_answer: bool = False) -> None:
        """Print the result of a command.

        Args:
            payload: JSON values, with a `schema` key.
            for_people: prints the same as text, with `line` and `table`.
            is_answer: the result is what the user asked for, so that it is printed in quiet mode too.
        """
        if self.as_json:
            print(json.dumps(payload, indent=2))
        elif self.quiet and not is_answer:
            for line in brief(payload):
                self.line(line)
        else:
            for_people()

    def line(self, text: str = "") -> None:
        """Print one line on stdout."""
        text = printable(text)
        if sys.stdout.isatty():
            _console().print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text)

    def piece(self, text: str) -> None:
        """Print a part of a line on stdout at once."""
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table on stdout, aligned with spaces if stdout is not a terminal."""
        texts = [[printable(str(cell)) for cell in row] for row in rows]
        if sys.stdout.isatty():
            console = _console()
            if fits(columns, texts, console.width):
                console.print(_rich_table(columns, texts), highlight=False)
            else:
                console.print("\n".join(folded(columns, texts)), markup=False, highlight=False, soft_wrap=True)
            return
        print("\n".join(aligned(columns, texts)))

    def note(self, text: str) -> None:
        """Print one line on stderr that is not part of the result."""
        if not self.quiet:
            print(printable(text), file=sys.stderr)

    @contextmanager
    def working(self, first: str) -> Iterator[Callable[[str], None]]:
        """Show progress on stderr while the block runs; output of libraries is redirected to stderr.

        Without a terminal, steps are printed only if the environment variable RMSNORM_PROGRESS is set to 1; in quiet
        mode, neither steps nor output of libraries are printed. Downloads are steps, except with `as_json`.

        Args:
            first: the first step.

        Yields:
            A function that is called with the text of each further step.
        """
        if self.quiet:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield _no_step
            return
        if not sys.stderr.isatty():
            step = _plain_step if os.environ.get(PROGRESS_VARIABLE) == "1" else _no_step
            step(first)
            with redirect_stdout(sys.stderr), showing_downloads(None if self.as_json else step):
                yield step
            return
        from rich.console import Console
        from rich.text import Text

        with redirect_stdout(sys.stderr), Console(stderr=True).status(Text(printable(first))) as status:

            def show(text: str) -> None:
                status.update(Text(printable(text)))

            with showing_downloads(None if self.as_json else show):
                yield show

    def failure(self, failure: Failure, error: BaseException) -> None:
        """Print an error as a line on stderr, and with `as_json` as an object on stdout."""
        if os.environ.get(DEBUG_VARIABLE):
            print(without_token("".join(traceback.format_exception(error)), HubOptions()), file=sys.stderr)
        if isinstance(error, BrokenPipeError):
            _discard_stdout()
            return
        print(f"error: {printable(failure.message)}", file=sys.stderr)
        if self.as_json:
            print(json.dumps(failure.to_dict(), indent=2))


def _plain_step(text: str) -> None:
    print(f"... {printable(text)}", file=sys.stderr, flush=True)


def _no_step(text: str) -> None:
    """A step that is not shown."""


def _console() -> Any:
    from rich.console import Console

    return Console()


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows]
        least = max(map(len, column.split()))  # headings may be split between words, numbers not at all
        least = max(least, *map(len, cells)) if cells and is_whole(cells) else least
        table.add_column(column, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return table


_STYLES = {"pass": "green", "fail": "bold red", "yes": "green", "no": "red", "not judged": "yellow"}


def _discard_stdout() -> None:
    """Discard buffered output after the reader closed stdout, so that Python's flush at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def file_size(path: Path) -> str:
    """A file's size with its unit, such as `1.2 MB`."""
    return size_text(path.stat().st_size)
