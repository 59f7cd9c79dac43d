"""The README says what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import rmsnorm_deploy
from rmsnorm_deploy.cli.application import app
from rmsnorm_deploy.cli.commands.targets import attention_markdown_table, markdown_table
from rmsnorm_deploy.runtime.norms.adversarial_rows import KINDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_targets_is_that_of_the_code() -> None:
    written = README.split("<!-- targets:begin -->")[1].split("<!-- targets:end -->")[0]
    assert written.strip() == markdown_table().strip()


def test_the_table_of_attention_is_that_of_the_code() -> None:
    written = README.split("<!-- attention:begin -->")[1].split("<!-- attention:end -->")[0]
    assert written.strip() == attention_markdown_table().strip()


def test_every_command_and_script_that_it_names_exists() -> None:
    named = set(re.findall(r"^rmsnorm (\w+)", README, flags=re.MULTILINE))
    assert {"build", "plugin"} <= named
    assert named <= {row.name for row in app.registered_commands} | {row.name for row in app.registered_groups}
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert len(modules) >= 6
    mains = [f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name for name in modules]
    assert [name for name in mains if importlib.util.find_spec(name) is None] == []
    paths = re.findall(r"`pytest ([^`]+)`", README)
    tests = [word for words in paths for word in words.split() if word.startswith("tests")]
    assert len(tests) >= 4
    assert [path for path in tests if not (ROOT / path).exists()] == []


def test_its_python_names_are_public() -> None:
    (imported,) = re.findall(r"^from rmsnorm_deploy import (.+)$", README, flags=re.MULTILINE)
    for name in imported.split(", "):
        assert getattr(rmsnorm_deploy, name) is not None
        assert name in rmsnorm_deploy.__all__


def test_it_counts_the_kinds_of_adversarial_rows() -> None:
    words = {"ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14}
    counted = re.findall(r"(\w+) kinds of adversarial rows", README)
    assert len(counted) >= 2
    assert {words[word] for word in counted} == {len(KINDS)}
