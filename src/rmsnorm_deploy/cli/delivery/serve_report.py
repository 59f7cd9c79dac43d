"""`rmsnorm serve-report`: show the results of a recipe over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.delivery.signals import run_until_stopped
from rmsnorm_deploy.cli.screen import Screen

SCHEMA = "rmsnorm_deploy.serve_report/1"


def serve_report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a recipe's results.")],
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="The port; 0 for any that is free.")
    ] = 8000,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the results of a recipe in a browser, also while it is shipped, until it is interrupted.

    Nothing is changed, and nothing is sent but the summary, its history and the reports of its rows. There is no
    password: who reaches the address can read them.
    """
    from rmsnorm_deploy.runtime.shipping.report_server import ReportServer

    screen = Screen(as_json, quiet)
    server = ReportServer(folder, host, port)
    url = f"http://{server.address}/"
    screen.result({"schema": SCHEMA, "url": url}, lambda: screen.line(f"showing {folder} at {url}"), is_answer=True)
    run_until_stopped(server)
