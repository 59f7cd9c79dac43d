"""The application: its commands, and the conversion of every error to a message and an exit code."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import rmsnorm_deploy
from rmsnorm_deploy.cli.commands import plugin
from rmsnorm_deploy.cli.failures import failure_of, interruptible
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.cli.table import COMMANDS

JSON_FLAG = "--json"

# Help is plain text: rich would take most of the start-up time.
app = typer.Typer(
    name="rmsnorm",
    help="Take RMSNorm from PyTorch to ONNX Runtime and TensorRT: find it, export it, run it, verify the numbers.",
    epilog=(
        "Exit codes: 0 pass, 1 mismatch, 2 wrong usage or input, 3 unsupported combination or a result that cannot be "
        "judged, 4 a missing package, library or device, 70 bug, 130 interrupted."
    ),
    add_completion=False,
    rich_markup_mode=None,
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(plugin.app, name="plugin")


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"rmsnorm-deploy {rmsnorm_deploy.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def run(arguments: list[str]) -> int:
    """Run one command line.

    Args:
        arguments: the arguments after the program's name.

    Returns:
        The exit code. No exception is raised, not even KeyboardInterrupt.
    """
    screen = Screen(JSON_FLAG in arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a POSIX locale encodes ASCII only
            stream.reconfigure(errors="backslashreplace")
    try:
        with interruptible():
            code = _invoke(arguments)
            sys.stdout.flush()
        return code
    except BaseException as error:
        failure = failure_of(error)
        screen.failure(failure, error)
        return failure.exit_code


def _invoke(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        # Instead of `app()`, which handles some errors itself and not others.
        with command.make_context("rmsnorm", list(arguments)) as context:
            return command.invoke(context) or 0
    except typer.Exit as error:
        return error.exit_code
