"""`rmsnorm verify`: check the files of an exported folder against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen

SCHEMA = "rmsnorm_deploy.verify/1"


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An exported folder.", show_default=False)],
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Check that an exported folder still has the files, and the weights, that were exported."""
    from rmsnorm_deploy.export.onnx_io.verify import verify_folder

    screen = Screen(as_json, quiet)
    with screen.working(f"comparing the files of {folder}"):
        files = verify_folder(folder)
    problems = [file for file in files if file.problem is not None]
    payload = {
        "schema": SCHEMA,
        "folder": str(folder),
        "verdict": "fail" if problems else "pass",
        "files": [file.to_dict() for file in files],
    }
    screen.result(payload, lambda: _print(screen, payload))
    if problems:
        raise typer.Exit(1)


def _print(screen: Screen, payload: dict[str, Any]) -> None:
    for row in payload["files"]:
        screen.line(f"  {row['name']}: {row['problem'] or 'as exported'} ({row['compared']} compared)")
    sampled = sum(row["compared"] != "all bytes" and row["problem"] is None for row in payload["files"])
    wrong = sum(row["problem"] is not None for row in payload["files"])
    if wrong:
        screen.line(f"{payload['folder']}: {wrong} of {len(payload['files'])} files are not as exported.")
    else:
        note = f"; {sampled} by a sample only, which rmsnorm export --hash avoids" if sampled else ""
        screen.line(f"{payload['folder']}: all {len(payload['files'])} files are as exported{note}.")
