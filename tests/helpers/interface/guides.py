"""The pages of docs/, run as a reader runs them: their blocks in order, in one folder (`Reader`).

- `console`: each line that begins with `$ ` is a command, and the lines below it are what it prints: stdout, then
  stderr. A line `...` stands for any lines, and `...` in a line for any text. Without such lines the output is not
  compared. A command must end with 0, unless the next one is `echo $?`.
- `python` and `toml` with a title: the file of that name. `python` without: code that runs, in one namespace for the
  page; a `text` block behind it is what it prints.
- `sh`: what needs a network or a GPU. It is not run; the commands in it must be ones that `rmsnorm` accepts.

`continues: export.md` in front of a page says that its folder begins as that page left it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from rmsnorm_deploy.cli.application import app
from tests.helpers.interface.command_line import CommandLine

LANGUAGES = ("console", "python", "toml", "text", "sh")
# The port that pages name; a free one stands for it.
PORT = "8000"
_SERVER = "from rmsnorm_deploy.cli import main; main()"
_FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_FRONT = re.compile(r"\A---\n(.*?)^---\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that its title names, its text, and its line in the page."""

    language: str
    title: str
    text: str
    line: int


@dataclass(frozen=True)
class Step:
    """A command of a `console` block, and the lines that it is shown to print."""

    command: str
    shown: list[str]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, each in one of `LANGUAGES`."""
    found = [Block(m[1], m[2] or "", m[3], page[: m.start()].count("\n") + 1) for m in _FENCE.finditer(page)]
    assert page.count("```") == 2 * len(found), "a fence is indented, not closed, or has other attributes than a title"
    others = {block.language for block in found} - set(LANGUAGES)
    assert not others, f"expected blocks of {', '.join(LANGUAGES)}, got {others}"
    return found


def continues(page: str) -> list[str]:
    """The pages whose folders a page goes on with."""
    front = _FRONT.match(page)
    return re.findall(r"^continues: (.+)$", front[1], re.MULTILINE)[0].split() if front else []


def steps_of(text: str) -> list[Step]:
    """The commands of a `console` block."""
    found: list[Step] = []
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line.removeprefix("$ ")
            while command.endswith("\\"):
                command = command.removesuffix("\\") + next(lines).removeprefix("> ").strip()
            found.append(Step(command, []))
        else:
            assert found, f"expected a command first, got {line!r}"
            found[-1].shown.append(line)
    return found


def is_shown(shown: list[str], printed: str) -> bool:
    """Whether lines with `...` stand for a text."""
    parts = [
        r"(?:.*\n)*" if line.strip() == "..." else ".*".join(map(re.escape, line.rstrip().split("..."))) + "\n"
        for line in shown
    ]
    lines = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    return re.fullmatch("".join(parts), lines) is not None


class Reader:
    """Runs the blocks of one page in the working directory; the servers that it started end with the `with` block."""

    def __init__(self, rmsnorm: CommandLine) -> None:
        self._rmsnorm = rmsnorm
        self._names: dict[str, Any] = {"__name__": "guide"}
        self._servers: list[subprocess.Popen[str]] = []
        self._files: set[str] = set()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.kill()
            server.communicate()
        for name in list(self._files):
            self._forget(name)

    def read(self, page: str) -> None:
        """Run every block of a page, and compare what it prints with what the page shows."""
        blocks = blocks_of(page.replace(PORT, self._port))
        for block, behind in zip(blocks, [*blocks, None][1:], strict=True):
            if block.title:
                self._forget(block.title)  # another page may have a file of this name
                Path(block.title).write_text(block.text, encoding="utf-8")
            elif block.language == "console":
                self._console(block)
            elif block.language == "python":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile("\n" * block.line + block.text, "guide", "exec"), self._names)
                if behind is not None and behind.language == "text":
                    _compare(f"line {block.line}", behind.text.splitlines(), printed.getvalue())
            elif block.language == "sh":
                for line in block.text.splitlines():
                    check_command(line.partition(" #")[0])

    def _forget(self, file: str) -> None:
        """Let Python read a file anew when it is imported again."""
        self._files.add(file)
        sys.modules.pop(Path(file).stem if file.endswith(".py") else "", None)
        importlib.invalidate_caches()

    def _console(self, block: Block) -> None:
        code = 0
        steps = steps_of(block.text)
        for step, behind in zip(steps, [*steps, None][1:], strict=True):
            if step.command == "echo $?":
                _compare(step.command, step.shown, str(code))
                continue
            code, printed = self._run(step)
            asked = behind is not None and behind.command == "echo $?"
            assert code == 0 or asked, f"{step.command}: ended with {code}\n{printed}"
            if step.shown:
                _compare(step.command, step.shown, printed)

    def _run(self, step: Step) -> tuple[int, str]:
        """The exit code of a command, and what it printed."""
        program, *arguments = shlex.split(step.command)
        if step.command == "kill %1":
            server = self._servers.pop(0)
            server.terminate()
            rest, _ = server.communicate(timeout=20)
            return server.returncode, rest
        assert program == "rmsnorm", f"expected rmsnorm, echo $? or kill %1, got {step.command}"
        if arguments[-1] == "&":
            return 0, self._serve(arguments[:-1], len(step.shown))
        outcome = self._rmsnorm(*arguments)
        return outcome.code, outcome.out + outcome.err

    def _serve(self, arguments: list[str], lines: int) -> str:
        """Start a command that goes on, and read the lines that it is shown to print."""
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._servers.append(server)
        assert server.stdout is not None
        return "".join(server.stdout.readline() for _ in range(lines))


def check_command(line: str) -> None:
    """Let the command line read the arguments of a command that is not run; the names of files do not matter."""
    words = shlex.split(line)
    if words[:1] != ["rmsnorm"]:
        return
    command: Any = typer.main.get_command(app)
    for name in words[1:2]:
        command.commands[name].make_context(name, words[2:]).close()


def _compare(what: str, shown: list[str], printed: str) -> None:
    assert is_shown(shown, printed), f"{what}: the page shows\n{chr(10).join(shown)}\nand it prints\n{printed}"
