"""`rmsnorm package` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmsnorm_deploy import export_model
from tests.helpers.interface.command_line import CommandLine
from tests.helpers.models.families import build


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packages")
    model = build("llama")
    model.save_pretrained(place / "checkpoint")
    export_model(place / "checkpoint", place / "llama", target="ort", with_past=True, attention="in-place")
    return place / "llama"


def test_a_package_for_each_server_and_its_check(rmsnorm: CommandLine, exported: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--against", exported.parent / "checkpoint", "--shape", "2x5", "-o", report]
    assert rmsnorm("validate", exported, *arguments).code == 0
    for server, own in (("genai", "genai_config.json"), ("triton", "llama/config.pbtxt")):
        outcome = rmsnorm("package", exported, "--for", server, "-o", tmp_path / server, "--report", report)
        assert outcome.code == 0
        assert f"{tmp_path / server}: llama for {server}, validated. Check it there with: rmsnorm verify" in outcome.out
        assert (tmp_path / server / own).is_file()
        assert rmsnorm("verify", tmp_path / server).code == 0


def test_json(rmsnorm: CommandLine, exported: Path, tmp_path: Path) -> None:
    outcome = rmsnorm("package", exported, "--for", "triton", "-o", tmp_path / "out", "--name", "m", "--json")
    assert outcome.code == 0
    assert outcome.json["schema"] == "rmsnorm_deploy.package/1"
    assert (outcome.json["for"], outcome.json["name"], outcome.json["validated"]) == ("triton", "m", None)
    assert "m/config.pbtxt" in outcome.json["files"]
    assert outcome.json["notes"] == [
        "no validation report is in it; add one with --report, from rmsnorm validate --json"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "genie"], "for: expected one of genai, triton, trtexec, got 'genie'."),
        (["--for", "triton", "--weights", "move"], "--weights: expected copy or link, got 'move'."),
        (["--for", "triton", "--report", "missing.json"], "missing.json"),
    ],
)
def test_wrong_use(rmsnorm: CommandLine, exported: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    outcome = rmsnorm("package", exported, "-o", tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "out").exists()
