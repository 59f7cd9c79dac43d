"""The pages that are generated while the site is built: commands, public Python names, fields of recipes, tables.

`mkdocs.yml` names this file as a hook. Without mkdocs, `pages` and `with_tables` give the same text to the tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import typer

import rmsnorm_deploy
from rmsnorm_deploy.cli.application import app
from rmsnorm_deploy.cli.commands.targets import attention_markdown_table, markdown_table
from rmsnorm_deploy.runtime.recipe.fields import GROUPS, default_of, field_of, names_of

RECIPE = "recipe_fields.md"

# A line of a page that is replaced by a table.
TABLES: dict[str, Callable[[], str]] = {
    "<!-- table: targets -->": markdown_table,
    "<!-- table: attention -->": attention_markdown_table,
}
# The folders of the packages, in the order of use, with what a reader finds there.
_PACKAGES = {
    "models": "Models and norms",
    "export": "Export",
    "runtime": "Running, comparing, serving",
    "plugins": "PyTorch operators",
}
_IMPORTED = "Import these names from `rmsnorm_deploy`, which loads each at its first use."
# What help adds to a description, such as `[default: 8000; 0<=x<=65535]`.
_FACTS = re.compile(r"\s*\[((?:default: |required|env var: |x[<>]|\d+<).*)\]$", re.DOTALL)
_EXIT_CODE = re.compile(r", (?=\d)")


def pages() -> dict[str, str]:
    """The text of every generated page, by its path in the site's sources."""
    return {**command_pages(), **python_pages(), RECIPE: recipe_page()}


# ------------------------------------------------------------------------------------------------------- commands


def command_pages() -> dict[str, str]:
    """A page for each command, and one that lists them."""
    root = typer.main.get_command(app)
    context = _context(root, "rmsnorm", None)
    found = {f"commands/{name}.md": _page(command, name, context) for name, command in _inside(root)}
    lines = ["# Commands", "", _prose(root.help), ""]
    lines += [f"- [`rmsnorm {name}`]({name}.md): {_first_line(command)}" for name, command in _inside(root)]
    lines += ["", "Every page is made from the text of `rmsnorm COMMAND --help`.", "", *_exit_codes(root, "##")]
    return {"commands/index.md": _joined(lines), **found}


def _page(command: Any, name: str, parent: Any) -> str:
    lines = list(_described(command, name, parent, "#"))
    if _inside(command):
        context = _context(command, name, parent)
        for below, one in _inside(command):
            lines += _described(one, below, context, "##")
    return _joined([*lines, *_exit_codes(parent.command, "##")])


def _described(command: Any, name: str, parent: Any, heading: str) -> Iterator[str]:
    """Description, usage, arguments and options of one command."""
    context = _context(command, name, parent)
    yield from (f"{heading} {context.command_path}", "", _prose(command.help), "")
    yield from ("```text", command.get_usage(context), "```", "")
    params = [param for param in command.get_params(context) if param.get_help_record(context) is not None]
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        rows = [param for param in params if param.param_type_name == kind]
        if rows:
            yield from (f"{heading}# {title}", "")
            for param in rows:
                yield from _param(param, context)


def _param(param: Any, context: Any) -> Iterator[str]:
    """An argument or an option as help shows it: its names, its description, and its default on a line of its own."""
    names, text = param.get_help_record(context)
    facts = _FACTS.search(text)
    yield from (f"`{names}`", f":   {_prose(text[: facts.start()] if facts else text)}", "")
    if facts:
        yield from (f"    *{_escaped(facts[1])}*", "")


def _inside(command: Any) -> list[tuple[str, Any]]:
    """The commands of a group in the order of help; none of a command."""
    return list(getattr(command, "commands", {}).items())


def _context(command: Any, name: str, parent: Any) -> Any:
    return command.context_class(command, info_name=name, parent=parent)


def _first_line(command: Any) -> str:
    return _prose((command.help or "").partition("\n\n")[0])


def _exit_codes(root: Any, heading: str) -> list[str]:
    """The exit codes as the help of `rmsnorm` lists them."""
    codes = _EXIT_CODE.split(root.epilog.partition("Exit codes: ")[2].rstrip("."))
    rows = [code.partition(" ") for code in codes]
    return [f"{heading} Exit codes", "", *(f"- `{number}`: {_escaped(text)}" for number, _, text in rows), ""]


def _prose(text: str | None) -> str:
    """Paragraphs of help as Markdown: what is not in backticks is plain text."""
    parts = re.split(r"(`[^`\n]+`)", (text or "").strip())
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    text = re.sub(r"([\\*_\[\]`])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# --------------------------------------------------------------------------------------------------- Python names


def python_pages() -> dict[str, str]:
    """A page for the public names of each package, for mkdocstrings to fill from their docstrings, and their list."""
    homes = {name: rmsnorm_deploy._HOME[name] for name in rmsnorm_deploy.__all__}
    found = {}
    lines = ["# Python", "", _IMPORTED, ""]
    for package, title in _PACKAGES.items():
        names = [name for name, home in homes.items() if home.partition(".")[0] == package]
        lines += [f"## {title}", "", *(f"- [`{name}`][{_identifier(name)}]" for name in names), ""]
        found[f"python/{package}.md"] = _joined(
            [f"# {title}", "", _IMPORTED, "", *(f"::: {_identifier(name)}\n" for name in names)]
        )
    return {"python/index.md": _joined(lines), **found}


def _identifier(name: str) -> str:
    """The full path of a public name: the package itself loads it lazily, which static analysis does not see."""
    return f"rmsnorm_deploy.{rmsnorm_deploy._HOME[name]}.{name}"


# -------------------------------------------------------------------------------------------------------- recipes


def recipe_page() -> str:
    """The fields of a recipe, from the model that reads it."""
    told = "`name` and these are the fields of a `[[model]]`; `[defaults]` may have them too."
    lines = ["# Fields of a recipe", "", told]
    for group in GROUPS:
        title = _prose((group.__doc__ or "").rstrip("."))
        lines += ["", f"## {title}", "", "| field | default | meaning |", "|---|---|---|"]
        for name in names_of(group):
            default = default_of(name)
            shown = "" if default is None else f"`{json.dumps(default)}`"
            lines.append(f"| `{name}` | {shown} | {_prose(field_of(name).description)} |")
    return _joined([*lines, "", "`rmsnorm init --schema` prints the JSON Schema of a recipe, for editors."])


# ----------------------------------------------------------------------------------------------------- for mkdocs


def with_tables(markdown: str) -> str:
    """A page with its tables, which are those of the README."""
    for mark, table in TABLES.items():
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation, behind the pages that `mkdocs.yml` lists."""
    made = list(pages())
    config["nav"].append({"Recipe": RECIPE})
    for title, folder in (("Commands", "commands/"), ("Python", "python/")):
        config["nav"].append({title: [path for path in made if path.startswith(folder)]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those on disk."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables."""
    return with_tables(markdown)


def _joined(lines: list[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"
