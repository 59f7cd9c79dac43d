"""The supported versions: the table against pyproject.toml and the constraints, and the messages."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from rmsnorm_deploy.models import versions
from rmsnorm_deploy.models.versions import LIBRARIES, installed_version, newer_than_tested, too_old

ROOT = Path(__file__).parents[2]


def bounds() -> dict[str, str]:
    """The lower bounds of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {name: bound for name, _, bound in (line.partition(">=") for line in lines)}


def pinned(name: str) -> dict[str, str]:
    """The versions of a constraints file."""
    lines = (ROOT / "tests" / "versions" / name).read_text().splitlines()
    rows = [line.partition(";")[0].split("==") for line in lines if not line.startswith("#")]
    return dict(reversed(rows))  # type: ignore[arg-type]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.distribution)
def test_the_table_has_the_bounds_of_the_project_and_of_the_trials(library: versions.Library) -> None:
    assert bounds()[library.distribution] == library.oldest
    for name, bound in (("oldest.txt", library.oldest), ("newest.txt", library.newest)):
        if library.distribution not in ("torch", "onnxruntime-gpu"):
            assert f"{pinned(name)[library.distribution]}.".startswith(f"{bound}.")


def test_what_is_installed_is_supported() -> None:
    assert [too_old(library.distribution) for library in LIBRARIES] == [""] * len(LIBRARIES)
    assert installed_version("numpy") == np.__version__
    assert installed_version("no-such-distribution-anywhere") is None


@pytest.mark.parametrize(
    ("version", "old", "new"),
    [
        (None, False, False),
        ("5.14.1", True, False),
        ("5.9", True, False),
        ("4.57.6", True, False),
        ("5.15.0", False, False),
        ("5.24.7", False, False),
        ("5.25.0.dev0", False, True),
        ("6.0", False, True),
    ],
)
def test_versions_are_compared_as_numbers(
    version: str | None, old: bool, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda name: version)
    old_text = (
        f"expected transformers 5.15 or later, got {version}. "
        'Install it with: pip install --upgrade "rmsnorm-deploy[hf]"'
    )
    new_text = (
        f"transformers {version} is later than 5.24, the latest that was tested. "
        'If it causes errors: pip install "transformers==5.24.*"'
    )
    assert too_old("transformers") == (old_text if old else "")
    assert newer_than_tested("transformers") == (new_text if new else "")


def test_a_local_build_is_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda name: "2.13.0+cu130")
    assert (too_old("torch"), newer_than_tested("torch")) == ("", "")
