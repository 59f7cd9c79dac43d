"""Options of the hub: which hold for which name, the token's file, and messages without tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rmsnorm_deploy import HubOptions
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.hub.options import (
    check_hub,
    hub_keywords,
    hub_options,
    recorded_options,
    token_of,
    using_hub,
    without_token,
)

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


def test_a_revision_holds_for_the_model_alone(tmp_path: Path) -> None:
    options = HubOptions(revision="v1", subfolder="small", cache_dir=tmp_path, offline=True)
    others = replace(options, revision=None, subfolder=None)
    with using_hub(options, "owner/model"):
        assert (hub_options("owner/model"), hub_options("owner/tokenizer")) == (options, others)
        with using_hub(HubOptions(revision="v2")):
            assert hub_options("owner/other") == HubOptions(revision="v2")
        assert hub_options("owner/model") == options
    assert hub_options("owner/model") == HubOptions()


def test_an_exported_commit_is_that_of_its_model_unless_another_is_asked_for() -> None:
    recorded = {"name": "owner/model", "revision": None, "subfolder": "small", "commit": "a" * 40}
    assert recorded_options("owner/model", recorded) == HubOptions(revision="a" * 40, subfolder="small")
    assert recorded_options("owner/other", recorded) == recorded_options("owner/model", None) == HubOptions()
    with using_hub(HubOptions(revision="v2"), "owner/model"):
        assert recorded_options("owner/model", recorded) == HubOptions(revision="v2")


def test_only_what_was_given_is_passed_on(tmp_path: Path) -> None:
    assert hub_keywords(HubOptions()) == {}
    (tmp_path / "token").write_text(f"{TOKEN}\nmore\n")
    options = HubOptions(revision="v1", cache_dir=tmp_path, token_file=tmp_path / "token", offline=True)
    assert hub_keywords(options) == {
        "revision": "v1", "cache_dir": str(tmp_path), "token": TOKEN, "local_files_only": True,
    }  # fmt: skip
    assert TOKEN not in repr(options)


@pytest.mark.parametrize("content", ["", "\n", "two words\n", "schlüssel\n", "\x00\n"])
def test_a_file_without_a_token_is_refused_and_not_shown(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="expected a token of the hub in the first line, got something else"):
        check_hub(HubOptions(token_file=path))
    with pytest.raises(UsageError, match="cannot be read"):
        token_of(HubOptions(token_file=tmp_path / "none"))


@pytest.mark.parametrize("revision", ["", "a b", "../x", "/x", "-x", "a\n", "x" * 251, "a:b"])
def test_revisions_that_cannot_be(revision: str) -> None:
    with (
        pytest.raises(UsageError, match="revision: expected a branch, a tag or a commit, got"),
        using_hub(HubOptions(revision=revision)),
    ):
        pass


@pytest.mark.parametrize("subfolder", ["", "/x", "../x", "x/../..", "~", "a\\b", "a\n"])
def test_subfolders_that_cannot_be(subfolder: str) -> None:
    with pytest.raises(UsageError, match="subfolder: expected a relative path in the repository, got"):
        check_hub(HubOptions(subfolder=subfolder))


@pytest.mark.parametrize("name", ["main", "refs/pr/1", "v1.0", "a" * 40])
def test_revisions_that_can_be(name: str) -> None:
    check_hub(HubOptions(revision=name, subfolder="a/b"))


def test_messages_have_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("of-a-file\n")
    monkeypatch.setenv("HF_TOKEN", " of-the-environment ")
    text = f"bad of-a-file, of-the-environment and {TOKEN}"
    assert without_token(text, HubOptions(token_file=tmp_path / "token")) == "bad ***, *** and ***"
    assert without_token("hf_hub_download, hf_transfer", HubOptions()) == "hf_hub_download, hf_transfer"
