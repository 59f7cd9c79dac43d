"""Tokenizers: where one is looked for, the addition task's, and one of transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from rmsnorm_deploy.models.builtin.addition_task import TOKENIZER
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.runtime.inputs.tokenizer import has_tokenizer, load_tokenizer, token_ids


def manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)


# --------------------------------------------------------------------------------------------------- has_tokenizer


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tokenizer.json", "{}", True),
        ("tokenizer_config.json", "{}", True),
        ("config.json", "{}", False),
        ("manifest.json", json.dumps({"tokenizer": TOKENIZER}), True),
        ("manifest.json", json.dumps({"tokenizer": "another"}), False),
        ("manifest.json", "{", False),
        ("manifest.json", "[]", False),
    ],
)
def test_what_tells_of_a_tokenizer(tmp_path: Path, name: str, text: str, expected: bool) -> None:
    (tmp_path / name).write_text(text)
    assert has_tokenizer(tmp_path) is expected


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path / "gone")
    (tmp_path / "tokenizer.json").mkdir()
    assert not has_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------------ the addition task


@pytest.mark.parametrize("named", [True, False])
def test_the_addition_task_by_its_name_and_by_a_manifest(tmp_path: Path, named: bool) -> None:
    manifest(tmp_path, json.dumps({"tokenizer": TOKENIZER}))
    tokenizer = load_tokenizer("builtin:addition" if named else tmp_path)
    ids = tokenizer.encode("12+9=")
    assert ids == [1, 2, 10, 9, 11]
    assert all(type(number) is int for number in ids)
    assert tokenizer.decode(ids) == "12+9="


def test_the_addition_task_refuses_what_it_does_not_know() -> None:
    tokenizer = load_tokenizer("builtin:addition")
    with pytest.raises(UsageError):
        tokenizer.encode("12-9=")
    with pytest.raises(UsageError, match="empty"):
        tokenizer.encode("")


def test_the_addition_task_needs_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load_tokenizer("builtin:addition").encode("1") == [1]


# ---------------------------------------------------------------------------------------------------- transformers


class Words:
    """A tokenizer as transformers makes them: the length of each word, and 99 as a special token before."""

    asked: ClassVar[list[tuple[str, bool]]] = []

    @classmethod
    def from_pretrained(cls, name: str, *, trust_remote_code: bool) -> Words:
        cls.asked.append((name, trust_remote_code))
        if "broken" in name:
            raise RuntimeError("of\n  many   lines")
        return cls()

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": np.array([99, *map(len, text.split())])} if text else {"input_ids": []}

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join("x" * number for number in ids if number != 99 or not skip_special_tokens)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=Words))
    monkeypatch.setattr(Words, "asked", [])
    return Words.asked


def test_a_tokenizer_of_the_hub(words: list[tuple[str, bool]]) -> None:
    tokenizer = load_tokenizer("owner/name")
    ids = tokenizer.encode("a bb cccc")
    assert ids == [99, 1, 2, 4]
    assert all(type(number) is int for number in ids)
    assert tokenizer.decode(ids) == "x xx xxxx"
    assert words == [("owner/name", False)]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_a_folder(words: list[tuple[str, bool]], tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{}")
    load_tokenizer(tmp_path, trust_remote_code=True)
    assert words == [(str(tmp_path), True)]


def test_the_home_folder_may_be_named(
    words: list[tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    load_tokenizer("~/words")
    assert words == [(str(tmp_path / "words"), False)]


def test_a_text_without_tokens_is_refused(words: list[tuple[str, bool]]) -> None:
    with pytest.raises(UsageError, match="empty"):
        load_tokenizer("owner/name").encode("")


def test_a_folder_without_a_tokenizer_is_refused_at_once(words: list[tuple[str, bool]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    assert words == []


def test_whatever_transformers_raises_is_one_line(words: list[tuple[str, bool]]) -> None:
    with pytest.raises(UsageError) as error:
        load_tokenizer("owner/broken")
    assert "owner/broken" in str(error.value)
    assert "of many lines" in str(error.value)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_without_transformers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentMissingError, match="pip install"):
        load_tokenizer("owner/name")


# ------------------------------------------------------------------------------------------------------- token_ids


@pytest.mark.parametrize("prompt", [[1, 2], (1, 2), np.array([1, 2]), iter([np.int32(1), True + 1])])
def test_token_ids_are_pythons_integers(prompt: Any) -> None:
    ids = token_ids(prompt)
    assert ids == [1, 2]
    assert all(type(number) is int for number in ids)


@pytest.mark.parametrize("prompt", [[], np.zeros(0), iter(())])
def test_no_token_is_refused(prompt: Any) -> None:
    with pytest.raises(UsageError, match="empty"):
        token_ids(prompt)
