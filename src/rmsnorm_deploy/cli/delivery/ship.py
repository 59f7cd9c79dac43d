"""`rmsnorm ship`: export, build, validate and package the models of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen

SCHEMA = "rmsnorm_deploy.ship_plan/1"


@options.takes_hub("revision", "subfolder")
def ship(
    recipe: Annotated[Path, typer.Argument(metavar="[FILE]", help="The recipe.")] = Path("rmsnorm.toml"),
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="The name of a row or a model to ship; may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Do everything again, also what has not changed.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Ship rows side by side on a cluster of Ray: local (on this machine), auto or HOST:PORT.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")] = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> int:
    """Export or rewrite, build, validate and package the models of a recipe.

    What has not changed is skipped, and what was interrupted goes on where it stopped. The exit code is that of the
    worst row. Write a first recipe with: rmsnorm init MODEL
    """
    from rmsnorm_deploy.runtime.shipping.ship import plan
    from rmsnorm_deploy.runtime.shipping.ship import ship as ship_recipe

    screen = Screen(as_json, quiet)
    if dry_run:
        with screen.working(f"reading {recipe}"):
            rows = plan(recipe, only=only or (), force=force)
        screen.result({"schema": SCHEMA, "rows": rows}, lambda: _print_plan(screen, rows), is_answer=True)
        return 0
    with screen.working(f"reading {recipe}") as progress:
        shipment = ship_recipe(recipe, only=only or (), force=force, ray=ray, progress=progress)
    summary = shipment.to_dict()
    for note in shipment.notes:
        screen.note(f"note: {note}")
    screen.result(summary, lambda: _print(screen, summary, quiet), is_answer=True)
    return int(summary["exit_code"])


def _print_plan(screen: Screen, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        steps = f"{', '.join(row['steps'])} ({row['reason']})" if row["steps"] else "unchanged"
        screen.line(f"{row['row']}: {steps}")


def _print(screen: Screen, summary: dict[str, Any], quiet: bool) -> None:
    from rmsnorm_deploy.runtime.report.text import size_text
    from rmsnorm_deploy.runtime.shipping.summary import kinds_in, step_word

    rows = summary["rows"]
    if not quiet:
        kinds = kinds_in(summary)
        screen.table(
            ("row", *kinds, "seconds", "size"),
            [
                (
                    row["row"], *(step_word(row, kind) for kind in kinds), f"{row['seconds']:.1f}",
                    size_text(row["bytes"]) if row["bytes"] else "-",
                )
                for row in rows
            ],
        )  # fmt: skip
    for row in rows:
        for note in row["notes"] if row["status"] != "unchanged" else []:
            screen.note(f"{row['row']}: note: {note}")
        for step in row["steps"]:
            if step["error"]:
                screen.line(f"{row['row']}: {step['step']}: {step['error']['message']}")
    counts = {word: sum(row["status"] == word for row in rows) for word in ("done", "unchanged", "failed")}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    screen.line(f"verdict: {summary['verdict']} ({told}); {summary['output']}")
