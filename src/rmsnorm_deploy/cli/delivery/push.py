"""`rmsnorm push`: upload an exported folder or a package to the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen, size_text
from rmsnorm_deploy.models.errors import UsageError

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.packaging.push import Push

SCHEMA = "rmsnorm_deploy.push/1"


@options.takes_hub("revision", "subfolder", "cache_dir", "offline")
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An exported folder or a package.", show_default=False)],
    repository: Annotated[
        str,
        typer.Argument(metavar="REPO", help="A hub name (owner/model), created if there is none.", show_default=False),
    ],
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    branch: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="The branch, created if there is none.", show_default="main"),
    ] = None,
    message: Annotated[str | None, typer.Option("--message", metavar="TEXT", help="The message of the commit.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="A JSON report of rmsnorm validate on DIR, for the card.",
            show_default="that of a package",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without a question.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files and the card; upload nothing.")] = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Upload an exported folder or a package to the hub, with a card that says what it is and how it was validated.

    Every file is compared with the manifest first, and only its files are uploaded.
    """
    from rmsnorm_deploy.models.hub.options import hub_options
    from rmsnorm_deploy.runtime.packaging.push import push_folder

    screen = Screen(as_json, quiet)
    if not yes and not dry_run:
        _ask(screen, folder, repository, private)
    with screen.working(f"reading {folder}") as progress:
        made = push_folder(
            folder, repository, private=private, revision=branch, message=message, report=report,
            hub=hub_options(repository), dry_run=dry_run, progress=progress,
        )  # fmt: skip
    screen.result(_payload(made), lambda: _print(screen, made), is_answer=dry_run)


def _ask(screen: Screen, folder: Path, repository: str, private: bool) -> None:
    """Ask before files are shown to others.

    Raises:
        UsageError: there is nobody to ask, or the answer is not yes.
    """
    if screen.as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("push: expected --yes, which uploads, or --dry-run, got neither, and nobody can be asked.")
    where = "" if private else ", where others may see them"
    if not typer.confirm(f"Upload the files of {folder} to {repository}{where}?", err=True):
        raise UsageError("push: nothing was uploaded.")


def _payload(made: Push) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "folder": str(made.folder), "repository": made.repository, "revision": made.revision,
        "files": [{"name": name, "bytes": size} for name, size in made.files.items()], "card": made.card,
        "validated": made.validated, "commit": made.commit, "url": made.url, "notes": made.notes,
    }  # fmt: skip


def _print(screen: Screen, made: Push) -> None:
    for name, size in made.files.items():
        screen.line(f"  {name} ({size_text(size)})")
    for note in made.notes:
        screen.note(f"note: {note}")
    if made.commit is None:
        screen.line()
        screen.line("README.md stays as it is." if made.card is None else made.card)
        screen.line(f"nothing was uploaded; upload it with: rmsnorm push {made.folder} {made.repository} --yes")
    else:
        tested = f"validated: {made.validated}" if made.validated else "without a validation report"
        screen.line(f"{made.folder} -> {made.repository} at {made.revision}, {tested}: {made.url}")
