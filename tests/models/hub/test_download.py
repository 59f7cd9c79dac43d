"""Models read from a hub: revisions, subfolders, shards, the cache, offline mode, progress and refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rmsnorm_deploy import HubOptions, load_model
from rmsnorm_deploy.models.companions import companion_files
from rmsnorm_deploy.models.errors import EnvironmentMissingError, RmsnormDeployError, UsageError
from rmsnorm_deploy.models.hub.download import companions_of
from rmsnorm_deploy.models.hub.options import showing_downloads, using_hub
from rmsnorm_deploy.runtime.inputs.tokenizer import load_tokenizer
from tests.helpers.interface.hub_server import HubServer, hub_server
from tests.helpers.models.families import VOCABULARY, build
from tests.helpers.models.tokenizers import save_tokenizer

NAME = "owner/small-llama"
TOKEN = "hf_secretsecretsecretsecret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "llama"
    build("llama").save_pretrained(folder)  # type: ignore[operator]
    save_tokenizer(folder, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights, in shards."""
    folder = tmp_path_factory.mktemp("hub") / "other"
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(folder, max_shard_size="20KB")  # type: ignore[operator]
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def weight(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.lm_head.weight
    return found


def test_each_revision_has_its_own_weights_and_commit(hub: HubServer, checkpoint: Path, other: Path) -> None:
    first = hub.add(NAME, checkpoint)
    second = hub.add(NAME, other, "v2")
    main = load_model(NAME)
    assert main.hub is not None
    assert (main.hub.commit, main.details) == (
        first,
        {"source": NAME, "hub": {"name": NAME, "revision": None, "subfolder": None, "commit": first}},
    )
    sharded = load_model(NAME, hub=HubOptions(revision="v2"))
    assert sharded.hub is not None
    assert (sharded.hub.revision, sharded.hub.commit) == ("v2", second)
    assert torch.equal(weight(main.model), weight(load_model(str(checkpoint)).model))
    assert torch.equal(weight(sharded.model), weight(load_model(str(other)).model))
    assert not torch.equal(weight(main.model), weight(sharded.model))
    assert torch.equal(weight(load_model(NAME, hub=HubOptions(revision=second)).model), weight(sharded.model))
    with using_hub(HubOptions(revision="v2"), NAME):
        assert torch.equal(weight(load_model(NAME).model), weight(sharded.model))
    assert hub.tokens() == set()


def test_a_branch_that_moves_meanwhile_gives_the_files_of_one_commit(
    hub: HubServer, checkpoint: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmsnorm_deploy.models.hub import download

    hub.add(NAME, checkpoint)
    original, seen = download._file, []

    def moving(name: str, file: str, options: HubOptions, **more: Any) -> Any:
        found = original(name, file, options, **more)
        if file == "config.json":
            seen.append(hub.add(NAME, other))
        return found

    monkeypatch.setattr(download, "_file", moving)
    assert torch.equal(weight(load_model(NAME).model), weight(load_model(str(checkpoint)).model))
    assert len(seen) == 1


def test_a_subfolder_has_its_companions_and_its_commit(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    name = "owner/nested-llama"  # transformers remembers the commit of a branch while a process runs
    inside = {f"small/fp32/{path.name}": path.read_bytes() for path in checkpoint.iterdir()}
    commit = hub.add(name, {**inside, "unrelated.bin": b"x"})
    with pytest.raises(
        UsageError, match=r"'owner/nested-llama': expected a config.json, got none. If the model is in a"
    ):
        load_model(name)
    options = HubOptions(subfolder="small/fp32", cache_dir=tmp_path / "other cache")
    source = load_model(name, hub=options).hub
    assert source is not None
    assert source.to_dict() == {"name": name, "revision": None, "subfolder": "small/fp32", "commit": commit}
    folder, reason = companions_of(source)
    found, notes = companion_files(folder)
    assert (reason, notes) == ("", [])
    assert {path.name: path.read_bytes() for path in found} == {
        path.name: path.read_bytes() for path in companion_files(checkpoint)[0]
    }
    assert {path.name for path in (tmp_path / "other cache").iterdir()} >= {"models--owner--nested-llama"}
    assert not any(path.endswith("unrelated.bin") for _, path, _ in hub.requests)
    with using_hub(options, name):
        assert load_tokenizer(name).encode("ab") == load_tokenizer(checkpoint).encode("ab")


def test_a_private_model_needs_the_token_of_the_file(
    hub: HubServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, checkpoint, private=True)
    hub.readers.add(TOKEN)
    with pytest.raises(UsageError, match=r"no such repository, or this token must not use it \(401: .*set HF_TOKEN"):
        load_model(NAME)
    (tmp_path / "token").write_text("wrong-but-secret\n")
    options = HubOptions(token_file=tmp_path / "token")
    with pytest.raises(UsageError) as raised:
        load_model(NAME, hub=options)
    assert "Repository not found, token ***" in str(raised.value)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    loaded = load_model(NAME, hub=options)
    assert TOKEN not in repr(loaded.hub) + json.dumps(loaded.details)
    assert hub.tokens() == {"wrong-but-secret", TOKEN}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert torch.equal(weight(load_model(NAME).model), weight(loaded.model))


@pytest.mark.parametrize("how", ["option", "variable"])
def test_offline_says_what_is_missing_where_and_how_to_get_it(
    hub: HubServer, checkpoint: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from huggingface_hub import constants

    hub.add(NAME, checkpoint)
    hub.add(NAME, other, "v2")
    online = HubOptions(cache_dir=tmp_path / "mine")
    offline = HubOptions(cache_dir=tmp_path / "mine", offline=how == "option")
    place = tmp_path / "mine" / "models--owner--small-llama"

    def missing(options: HubOptions) -> str:
        before = len(hub.requests)
        with monkeypatch.context() as changed:
            changed.setattr(constants, "HF_HUB_OFFLINE", how == "variable")
            with pytest.raises(UsageError) as raised:
                load_model(NAME, hub=options)
        assert len(hub.requests) == before
        return str(raised.value)

    assert missing(offline) == (
        f"the hub name 'owner/small-llama': offline: expected config.json in the cache {place}, got none; download it "
        f"with a network: hf download owner/small-llama --cache-dir {tmp_path / 'mine'}"
    )
    load_model(NAME, hub=online)
    with monkeypatch.context() as changed:
        changed.setattr(constants, "HF_HUB_OFFLINE", how == "variable")
        count = len(hub.requests)
        again = load_model(NAME, hub=offline)
        assert again.hub is not None
        companions, reason = companions_of(again.hub)
        assert len(hub.requests) == count
    assert again.hub.commit == hub.repositories[NAME].refs["main"]
    assert (companions, reason[:60]) == (again.hub.folder, "")
    versioned = HubOptions(revision="v2", cache_dir=offline.cache_dir, offline=offline.offline)
    assert "expected config.json" in missing(versioned)
    assert "--revision v2" in missing(versioned)
    load_model(NAME, hub=HubOptions(revision="v2", cache_dir=online.cache_dir))
    commit = hub.repositories[NAME].refs["v2"]
    shard = sorted((place / "snapshots" / commit).glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"expected {shard.name} in the cache {place}, got none" in missing(versioned)
    for path in (place / "snapshots" / commit).glob("model*"):
        path.unlink()
    assert f"expected model.safetensors in the cache {place}" in missing(versioned)


def test_a_hub_that_cannot_be_reached(hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add(NAME, checkpoint)
    load_model(NAME)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client tries several times
    gone = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", gone)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", gone + "/{repo_id}/resolve/{revision}/{filename}")
    load_model(NAME)  # from the cache
    with pytest.raises(
        EnvironmentMissingError, match=f"'owner/none': {gone} cannot be reached .*config.json is not in"
    ):
        load_model("owner/none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (HubOptions(revision="v9"), "at v9: expected an existing branch, tag or commit, got 'v9'"),
        (HubOptions(subfolder="none"), "expected a config.json, got none"),
        (HubOptions(revision="a b"), "revision: expected a branch, a tag or a commit, got 'a b'"),
    ],
)
def test_what_the_hub_does_not_have(hub: HubServer, checkpoint: Path, options: HubOptions, message: str) -> None:
    hub.add(NAME, checkpoint)
    with pytest.raises(UsageError, match=message):
        load_model(NAME, hub=options)


def test_a_shard_that_the_repository_lacks(hub: HubServer, other: Path) -> None:
    files = {path.name: path.read_bytes() for path in other.iterdir()}
    gone = sorted(name for name in files if name.startswith("model-"))[0]
    del files[gone]
    hub.add(NAME, files)
    with pytest.raises(UsageError, match=f"expected the files that model.safetensors.index.json names, got .* {gone}"):
        load_model(NAME)


@pytest.mark.parametrize("source", ["builtin:small", "folder", "file.py:factory"])
def test_a_revision_of_what_has_none_is_refused(checkpoint: Path, source: str) -> None:
    name = str(checkpoint) if source == "folder" else source
    for options in (HubOptions(revision="v1"), HubOptions(subfolder="x")):
        with pytest.raises(RmsnormDeployError, match=r"expected a model with a hub name \(owner/model\), got "):
            load_model(name, hub=options)


def test_downloads_are_shown_to_who_asks(hub: HubServer, checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.add(NAME, checkpoint)
    lines: list[str] = []
    with showing_downloads(lines.append):
        load_model(NAME)
    assert any(line.startswith("downloading config.json (") for line in lines)
    assert any(line.startswith("downloading model.safetensors (0.1 of 0.1 MB)") for line in lines), lines
    load_model(NAME, hub=HubOptions(revision=hub.add(NAME, {**hub.files(NAME), "new": b""}, "v2")))
    assert capfd.readouterr() == ("", "")
