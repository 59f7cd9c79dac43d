"""`rmsnorm serve`: answer requests over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.delivery.signals import run_until_stopped
from rmsnorm_deploy.cli.screen import Screen

SCHEMA = "rmsnorm_deploy.serve/1"


def serve(
    path: options.Exported,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="The model's name.", show_default="the folder's or the package's"),
    ] = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="The port; 0 for any that is free.")
    ] = 8000,
    concurrency: Annotated[
        int, typer.Option("--concurrency", metavar="N", min=1, help="The most requests that are computed at a time.")
    ] = 1,
    provider: options.Provider = "cpu",
    runner: options.Runner = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Serve a model in the protocol of KServe and Triton, version 2, until it is interrupted.

    For one machine and for tests; for batches of several requests and several GPUs use rmsnorm package --for triton.
    """
    from rmsnorm_deploy.runtime.serving.server import serve_folder

    screen = Screen(as_json, quiet)
    with serve_folder(
        path, name=name, host=host, port=port, runner=runner, provider=provider, concurrency=concurrency
    ) as server:
        url = f"http://{server.address}/v2/models/{server.name}"
        screen.result({"schema": SCHEMA, "url": url, "name": server.name}, lambda: screen.line(f"serving {url}"))
        run_until_stopped(server)
