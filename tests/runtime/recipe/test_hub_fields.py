"""The fields of a recipe for models of the hub, and that a token is none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.recipe.recipe_file import parse_recipe
from rmsnorm_deploy.runtime.recipe.rows import rows_of

_MODEL = '[[model]]\nname = "a"\nsource = "{source}"\n{more}\n'


def _rows(tmp_path: Path, more: str = "", source: str = "owner/model") -> list[dict[str, Any]]:
    return rows_of(parse_recipe(_MODEL.format(source=source, more=more), tmp_path / "rmsnorm.toml"))


def test_a_revision_and_a_subfolder_are_facts_of_a_row(tmp_path: Path) -> None:
    plain, versioned = _rows(tmp_path)[0], _rows(tmp_path, 'revision = "v1"\nsubfolder = "small"')[0]
    assert (plain["revision"], plain["subfolder"]) == (None, None)
    assert (versioned["revision"], versioned["subfolder"]) == ("v1", "small")
    for before, after in zip(plain["steps"], versioned["steps"], strict=True):
        found = {name for name, value in before["facts"].items() if after["facts"][name] != value}
        assert found == {"revision", "subfolder"}


@pytest.mark.parametrize(
    ("more", "source", "message"),
    [
        ('revision = "a b"', "owner/model", "4:1: revision: expected a branch, a tag or a commit, got 'a b'"),
        (
            'subfolder = "../x"',
            "owner/model",
            "4:1: subfolder: expected a relative path in the repository, got '../x'",
        ),
        ('revision = "v1"', "builtin:small", "4:1: revision: expected a source with a hub name (owner/model), got"),
        ("revision = 1", "owner/model", "4:1: revision: expected a valid string, got 1"),
    ],
)
def test_what_cannot_be(tmp_path: Path, more: str, source: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        _rows(tmp_path, more, source)
    assert message in str(raised.value)


@pytest.mark.parametrize("key", ["token", "hf_token", "token_file", "HF_TOKEN"])
def test_a_token_is_refused_and_not_shown(tmp_path: Path, key: str) -> None:
    with pytest.raises(
        UsageError, match="a recipe has no token, as it is kept and shared; set the variable HF_TOKEN"
    ) as e:
        _rows(tmp_path, f'{key} = "hf_secretsecretsecretsecret"')
    assert "hf_secret" not in str(e.value)
