"""Hub models on the command line: a private model exported, validated and pushed, and no token anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rmsnorm_deploy.cli.application import run
from tests.helpers.interface.command_line import CommandLine
from tests.helpers.interface.hub_server import HubServer, hub_server
from tests.helpers.models.families import build

NAME, PUSHED = "owner/private-llama", "owner/pushed.onnx"
TOKEN = "hf_secretsecretsecretsecret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(monkeypatch, tmp_path / "cache") as server:
        server.readers.add(TOKEN)
        server.writers.add(TOKEN)
        yield server


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


def _save(folder: Path, factor: float) -> Path:
    model = build("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def test_from_the_hub_and_back_without_a_trace_of_the_token(
    rmsnorm: CommandLine,
    hub: HubServer,
    token: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RMSNORM_PROGRESS", "1")
    first = hub.add(NAME, _save(tmp_path / "first", 1), "v1", private=True)
    hub.add(NAME, _save(tmp_path / "second", 2))
    shown = []
    out, report = tmp_path / "out", tmp_path / "report.json"
    refused = rmsnorm("export", NAME, "-o", out, "--revision", "v1")
    assert (refused.code, "set HF_TOKEN, or give --token-file FILE" in refused.err) == (2, True)
    exported = rmsnorm("export", NAME, "-o", out, "--revision", "v1", "--token-file", token, "--target", "ort")
    assert exported.code == 0, exported.err
    assert "... downloading model.safetensors (" in exported.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["hub"] == {"name": NAME, "revision": "v1", "subfolder": None, "commit": first}

    count = len(hub.requests)
    hub.add(NAME, tmp_path / "second", "v1")  # the tag moves: the exported commit is validated
    quick = ("--outputs-only", "--shape", "2x5")
    judged = rmsnorm("validate", out, "-o", report, *quick, "--token-file", token)
    assert (judged.code, json.loads(report.read_text())["verdict"]) == (0, "pass"), judged.err
    assert not any("/resolve/v1/" in path for _, path, _ in hub.requests[count:])

    plan = rmsnorm("push", out, PUSHED, "--report", report, "--dry-run", "--json")
    count = len(hub.requests)
    assert (plan.code, plan.json["commit"], plan.json["schema"]) == (0, None, "rmsnorm_deploy.push/1")
    pushed = rmsnorm("push", out, PUSHED, "--report", report, "--private", "--yes", "--token-file", token, "--json")
    assert pushed.code == 0, pushed.err
    assert {path for _, path, _ in hub.requests[count:]} >= {"/api/repos/create"}
    files = hub.files(PUSHED)
    assert hub.repositories[PUSHED].private
    assert pushed.json["commit"] == hub.repositories[PUSHED].refs["main"]
    assert set(files) - {".gitattributes"} == {*manifest["files"], "manifest.json", "README.md"}
    assert files["model.onnx"] == (out / "model.onnx").read_bytes()
    assert files["README.md"].decode() == plan.json["card"]
    refused = rmsnorm("push", out, "owner/none", "--yes")
    assert (refused.code, "set HF_TOKEN, log in with hf auth login, or give --token-file" in refused.err) == (4, True)

    hub.writers.clear()
    shown += [rmsnorm("push", out, PUSHED, "--yes", "--token-file", token, *more) for more in ((), ("--json",))]
    monkeypatch.setenv("RMSNORM_DEBUG", "1")
    assert [outcome.code for outcome in shown] == [2] * 2
    assert "You don't have the rights to write with ***" in shown[0].err
    for arguments in (["push", str(out), PUSHED, "--yes"], ["export", "owner/none", "-o", str(tmp_path / "none")]):
        assert run([*arguments, "--token-file", str(token)]) == 2
        captured = capsys.readouterr()
        assert "Traceback" in captured.err
        assert TOKEN not in captured.out + captured.err
    for outcome in (exported, judged, plan, pushed, refused, *shown):
        assert TOKEN not in outcome.out + outcome.err
    assert hub.tokens() == {TOKEN}
    traces = [
        Path(folder) / name for folder, _, names in os.walk(tmp_path) for name in names
        if TOKEN.encode() in (Path(folder) / name).read_bytes()
    ]  # fmt: skip
    assert traces == [token]
    assert not any(TOKEN.encode() in content for content in files.values())


def test_options_hold_for_the_model_and_are_checked_first(
    rmsnorm: CommandLine, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, _save(tmp_path / "first", 1))
    offline = rmsnorm("inspect", NAME, "--offline", "--cache-dir", tmp_path / "mine")
    assert offline.code == 2
    assert f"expected config.json in the cache {tmp_path / 'mine' / 'models--owner--private-llama'}" in offline.err
    for extra in ((), ("--quiet",), ("--json",)):
        monkeypatch.setenv("RMSNORM_PROGRESS", "1" if extra else "")
        found = rmsnorm("inspect", NAME, "--cache-dir", tmp_path / f"cache{len(extra)}{extra[:1]}", *extra)
        assert (found.code, "downloading" in found.out + found.err) == (0, False)
    wrong = rmsnorm("inspect", "builtin:addition", "--revision", "v1")
    assert (wrong.code, "revision: expected a model with a hub name" in wrong.err) == (2, True)
    empty = tmp_path / "empty"
    empty.write_text("")
    assert (
        "expected a token of the hub in the first line" in rmsnorm("export", NAME, "--token-file", empty, "-o", "x").err
    )
    assert rmsnorm("export", NAME, "--token", "x", "-o", "x").code == 2  # there is no such option


@pytest.mark.parametrize("command", ["export", "inspect", "validate", "bisect"])
def test_every_command_that_reads_a_model_has_the_options(rmsnorm: CommandLine, command: str) -> None:
    text = rmsnorm(command, "--help").out
    assert [
        name for name in ("revision", "subfolder", "cache-dir", "token-file", "offline") if f"--{name}" not in text
    ] == []
    assert "--token " not in text


def test_a_recipe_of_a_revision(rmsnorm: CommandLine, hub: HubServer, tmp_path: Path) -> None:
    first = hub.add(NAME, _save(tmp_path / "first", 1), "v1")
    recipe = tmp_path / "rmsnorm.toml"
    assert rmsnorm("init", NAME, "--revision", "v1", "-o", recipe).code == 0
    text = recipe.read_text()
    assert 'revision = "v1"  # of a hub name' in text
    recipe.write_text(text.replace("# validate = true", "validate = false"))
    shipped = rmsnorm("ship", recipe, "--json").json
    assert shipped["rows"][0]["steps"][0]["result"]["hub"]["commit"] == first
    assert rmsnorm("ship", recipe, "--dry-run").out == "private-llama: unchanged\n"
    recipe.write_text(recipe.read_text().replace('"v1"', '"v2"'))
    assert rmsnorm("ship", recipe, "--dry-run").out == "private-llama: export (changed: revision)\n"
