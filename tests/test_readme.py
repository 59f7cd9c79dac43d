"""The README says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import rmsnorm_deploy
from rmsnorm_deploy.cli.application import app
from rmsnorm_deploy.cli.targets import markdown_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_targets_is_that_of_the_code() -> None:
    written = README.split("<!-- targets:begin -->")[1].split("<!-- targets:end -->")[0]
    assert written.strip() == markdown_table().strip()


def test_every_command_and_script_that_it_names_exists() -> None:
    named = set(re.findall(r"^rmsnorm (\w+)", README, flags=re.MULTILINE))
    assert {"build", "plugin"} <= named
    assert named <= {row.name for row in app.registered_commands} | {row.name for row in app.registered_groups}
    scripts = re.findall(r"(?:python|pytest) ([\w/]+\.py)", README)
    assert len(scripts) >= 4
    assert all((ROOT / script).is_file() for script in scripts)


def test_its_python_names_are_public() -> None:
    (imported,) = re.findall(r"^from rmsnorm_deploy import (.+)$", README, flags=re.MULTILINE)
    for name in imported.split(", "):
        assert getattr(rmsnorm_deploy, name) is not None
        assert name in rmsnorm_deploy.__all__
