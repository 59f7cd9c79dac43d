"""The generated pages have every command, every option and every public name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import rmsnorm_deploy
from docs.generate import TABLES, command_pages, pages, python_pages, with_tables
from rmsnorm_deploy.cli.application import app
from rmsnorm_deploy.cli.commands.targets import attention_markdown_table, markdown_table
from rmsnorm_deploy.cli.table import COMMANDS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = command_pages()
ROOT: Any = typer.main.get_command(app)


def _terms(page: str) -> set[str]:
    """What a page defines: the terms of its definition lists."""
    return set(re.findall(r"^`(.+)`\n:   \S", page, re.MULTILINE))


def _commands(group: Any) -> list[Any]:
    """A command with those inside of it."""
    return [group, *(one for below in getattr(group, "commands", {}).values() for one in _commands(below))]


def test_every_command_has_its_page() -> None:
    assert set(PAGES) == {"commands/index.md", *(f"commands/{name}.md" for name in (*COMMANDS, "plugin"))}
    assert all(f"]({name}.md): " in PAGES["commands/index.md"] for name in (*COMMANDS, "plugin"))


@pytest.mark.parametrize("name", [*COMMANDS, "plugin"])
def test_a_page_has_every_argument_and_option(name: str) -> None:
    page = PAGES[f"commands/{name}.md"]
    assert page.startswith(f"# rmsnorm {name}\n\n")
    described = [option for term in _terms(page) for option in re.findall(r"(?<![\w-])-[\w-]+", term)]
    count = 0
    for command in _commands(ROOT.commands[name]):
        assert " ".join(command.help.split())[:40] in " ".join(page.replace("\\", "").split())
        for param in command.params:
            count += 1
            if param.param_type_name == "argument":
                assert any(param.metavar in term for term in _terms(page))
            else:
                assert {*param.opts, *param.secondary_opts} <= set(described)
            # The description, without the marks that Markdown needs.
            plain = page.replace("\\", "").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
            assert param.help in plain
    assert count >= 1
    assert "- `4`: a missing package, library or device" in page


def test_defaults_are_shown() -> None:
    assert "    *default: 127.0.0.1*\n" in PAGES["commands/serve.md"]
    assert "    *default: 8000; 0&lt;=x&lt;=65535*\n" in PAGES["commands/serve.md"]
    assert "    *required*\n" in PAGES["commands/export.md"]


def test_every_public_name_is_on_one_page() -> None:
    made = python_pages()
    named = [line.removeprefix("::: ") for page in made.values() for line in page.splitlines() if line[:4] == "::: "]
    homes = rmsnorm_deploy._HOME
    assert sorted(named) == sorted(f"rmsnorm_deploy.{homes[name]}.{name}" for name in rmsnorm_deploy.__all__)
    assert all(made["python/index.md"].count(f"[`{name}`][") == 1 for name in rmsnorm_deploy.__all__)


def test_the_page_of_targets_has_the_tables_of_the_code() -> None:
    page = (DOCS / "targets.md").read_text(encoding="utf-8")
    assert all(page.count(mark) == 1 for mark in TABLES)
    filled = with_tables(page)
    assert markdown_table() in filled
    assert attention_markdown_table() in filled


def test_links_and_the_navigation_lead_to_pages() -> None:
    on_disk = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
    known = {*on_disk, *pages()}
    links = [
        (name, os.path.normpath(Path(name).parent / link))
        for name, text in {**on_disk, **pages()}.items()
        for link in re.findall(r"\]\(([^)#\s]+\.md)\)", text)
    ]
    assert len(links) >= 30
    assert [(name, link) for name, link in links if link not in known] == []
    settings = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert {path for path in on_disk if f" {path}\n" not in settings} == set()
