"""Folders that are uploaded to a hub: which files, which card, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy import HubOptions, export_model, package_model, push_folder
from rmsnorm_deploy.models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError, UsageError
from rmsnorm_deploy.runtime.packaging.model_card import MARK
from tests.helpers.interface.hub_server import HubServer, hub_server
from tests.helpers.models.factory_file import small_model

NAME, TOKEN = "owner/pushed", "hf_secretsecretsecretsecret"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pushed") / "small"
    export_model(small_model(folder.parent, "pushed_models"), folder, target="ort")
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "small"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(monkeypatch, tmp_path / "cache") as server:
        server.writers.add(TOKEN)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def _pushed(hub: HubServer, branch: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in hub.files(NAME, branch).items() if name != ".gitattributes"}


def test_only_the_files_of_the_manifest_and_a_card(hub: HubServer, folder: Path) -> None:
    (folder / "private-notes.txt").write_text("not for others")
    hub.large = 1000
    made = push_folder(folder, NAME, message="first")
    wanted = {name: (folder / name).read_bytes() for name in ("model.onnx", "manifest.json")}
    files = _pushed(hub)
    assert {name: files[name] for name in files if name != "README.md"} == wanted | {
        name: (folder / name).read_bytes() for name in json.loads(wanted["manifest.json"])["files"]
    }
    assert made.files == {name: len(content) for name, content in files.items()}
    assert files["README.md"].decode() == made.card
    assert (hub.messages, made.commit) == (["first"], hub.repositories[NAME].refs["main"])
    assert wanted["model.onnx"] in hub.uploads.values()
    assert f"manifest.json names a path of this machine: {json.loads(wanted['manifest.json'])['source']}" in made.notes


def test_a_dry_run_asks_the_hub_nothing(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    made = push_folder(folder, NAME, dry_run=True)
    assert (hub.requests, hub.repositories, made.commit) == ([], {}, None)
    assert set(made.files) == {"README.md", "manifest.json", "model.onnx", *made.files}
    assert made.card is not None


def test_a_branch_is_created_and_other_files_stay(hub: HubServer, folder: Path) -> None:
    hub.add(NAME, {"other.txt": b"theirs"})
    push_folder(folder, NAME, revision="onnx")
    push_folder(folder, NAME, revision="onnx")
    assert _pushed(hub) == {"other.txt": b"theirs"}
    assert {"other.txt", "model.onnx", "README.md"} <= set(_pushed(hub, "onnx"))


@pytest.mark.parametrize("own", [True, False])
def test_a_card_of_the_repository_is_replaced_only_if_it_is_ours(hub: HubServer, folder: Path, own: bool) -> None:
    before = f"{MARK if own else ''}\nold".encode()
    hub.add(NAME, {"README.md": before})
    made = push_folder(folder, NAME)
    assert (_pushed(hub)["README.md"] != before) == own
    assert (made.card is None, "README.md" in made.files) == (not own, own)
    assert any("README.md of owner/pushed was not written by this command" in note for note in made.notes) != own


def test_a_card_in_the_folder_is_not_replaced(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    made = push_folder(folder, NAME)
    assert (made.card, _pushed(hub)["README.md"]) == (None, b"mine")
    assert (folder / "README.md").read_text() == "mine"


def test_a_package_is_pushed_with_its_folders(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    package_model(folder, "triton", tmp_path / "served", name="small")
    made = push_folder(tmp_path / "served", NAME)
    assert "small/1/model.onnx" in _pushed(hub)
    assert made.card is not None
    assert "as a folder for `triton`" in made.card


@pytest.mark.parametrize("what", ["changed", "missing", "link"])
def test_a_folder_that_is_not_as_it_was_written_is_refused(hub: HubServer, folder: Path, what: str) -> None:
    model = folder / "model.onnx"
    content = model.read_bytes()
    model.unlink()
    if what == "changed":
        model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif what == "link":
        (folder.parent / "elsewhere").write_bytes(content)
        model.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(UsageError, match=r"model.onnx: expected .* Restore the file, or export again"):
        push_folder(folder, NAME)
    assert hub.requests == []


def test_a_file_that_changes_during_the_upload_is_not_committed(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    original = HfApi.preupload_lfs_files

    def changing(self: HfApi, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        (folder / "model.onnx").write_bytes(b"another")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", changing)
    with pytest.raises(UsageError, match=r"it was changed during the upload\. Nothing was committed"):
        push_folder(folder, NAME)
    assert "model.onnx" not in _pushed(hub)


def test_private_is_not_public(hub: HubServer, folder: Path) -> None:
    hub.add(NAME, {"other.txt": b"theirs"})
    with pytest.raises(UsageError, match="expected a private repository, got a public one that exists already"):
        push_folder(folder, NAME, private=True)
    assert _pushed(hub) == {"other.txt": b"theirs"}


def test_weights_outside_of_the_folder_are_refused(hub: HubServer, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "model.safetensors").write_bytes(b"")
    from rmsnorm_deploy.models.weights.digest import sample_digest

    row = {"bytes": 0, "sample": sample_digest(folder / "model.onnx")}
    manifest["weights"] = {"mode": "reference", "files": {"model.safetensors": row}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RmsnormDeployError) as raised:
        push_folder(folder, NAME)
    assert isinstance(raised.value, UnsupportedError | UsageError)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["pushed", "a/b/c", "../x", "a/..", "a b/c", "", "http://x/y", "a/b--c"])
def test_names_that_cannot_be(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="repository: expected a hub name"):
        push_folder(folder, name, dry_run=True)


@pytest.mark.parametrize("token", ["none", "wrong"])
def test_without_a_token_that_may_write(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token == "none":
        with pytest.raises(
            EnvironmentMissingError, match="set HF_TOKEN, log in with hf auth login, or give --token-file"
        ):
            push_folder(folder, NAME)
        assert hub.requests == []
        return
    (tmp_path / "token").write_text("wrong-but-secret")
    with pytest.raises(
        UsageError, match=r"the hub refuses the upload \(403\): .*rights to write with \*\*\*"
    ) as raised:
        push_folder(folder, NAME, hub=HubOptions(token_file=tmp_path / "token"))
    assert raised.value.__suppress_context__


def test_a_report_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    report = {"schema": "rmsnorm_deploy.validate/7", "verdict": "pass", "model": "x"}
    report["provenance"] = {"candidate": {"model": {"sha256": "0" * 64}}}  # type: ignore[assignment]
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(UsageError, match=r"expected a report on the model in .*small, got one on x"):
        push_folder(folder, NAME, report=tmp_path / "report.json", dry_run=True)
