"""`rmsnorm init`: write a first recipe for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen

SCHEMA = "rmsnorm_deploy.init/1"


def _print_schema(value: bool) -> None:
    """Print the JSON Schema of recipes, and end: no model is needed."""
    if value:
        import json

        from rmsnorm_deploy.runtime.recipe.fields import recipe_schema

        typer.echo(json.dumps(recipe_schema(), indent=2))
        raise typer.Exit


@options.takes_hub("cache_dir", "token_file", "offline")
def init(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The recipe, which must not exist.")
    ] = Path("rmsnorm.toml"),
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            is_eager=True,
            callback=_print_schema,
            help="Print the JSON Schema of recipes, for editors, and exit.",
        ),
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a recipe for one model, which `rmsnorm ship` exports, validates and packages."""
    from rmsnorm_deploy.export.onnx_io.atomic_files import new_file
    from rmsnorm_deploy.export.onnx_io.destinations import check_new_file
    from rmsnorm_deploy.models.hub.options import hub_options
    from rmsnorm_deploy.runtime.recipe.first_recipe import first_recipe

    screen = Screen(as_json, quiet)
    check_new_file(output)
    text = first_recipe(model, output, hub_options(model))
    with new_file(output) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    payload = {"schema": SCHEMA, "recipe": str(output), "model": model}
    screen.result(payload, lambda: screen.line(f"{output}: a recipe for {model}. Ship it with: rmsnorm ship {output}"))
