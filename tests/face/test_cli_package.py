"""`rmsnorm package` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmsnorm_deploy import export_model
from tests.helpers.interface.command_line import CommandLine
from tests.helpers.models.factory_file import small_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("packages"), "command_models")


@pytest.fixture(scope="module")
def exported(source: str) -> Path:
    folder = Path(source).parent / "small"
    export_model(source, folder, target="standard")
    return folder


def test_a_package_for_each_server_and_its_check(
    rmsnorm: CommandLine, exported: Path, source: str, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    assert rmsnorm("validate", exported, "--against", source, "--shape", "2x5", "-o", report).code == 0
    for server, own in (("trtexec", "build.sh"), ("triton", "small/config.pbtxt")):
        outcome = rmsnorm("package", exported, "--for", server, "-o", tmp_path / server, "--report", report)
        assert outcome.code == 0
        assert f"{tmp_path / server}: small for {server}, validated. Check it there with: rmsnorm verify" in outcome.out
        assert (tmp_path / server / own).is_file()
        assert rmsnorm("verify", tmp_path / server).code == 0
    outcome = rmsnorm("package", exported, "--for", "genai", "-o", tmp_path / "genai")
    assert outcome.code == 3
    assert "expected a decoder that reads input_ids" in outcome.err


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
        (["--for", "genie"], "for: expected one of genai, triton, trtexec, ort-server, got 'genie'."),
        (["--for", "triton", "--weights", "move"], "--weights: expected copy or link, got 'move'."),
        (["--for", "triton", "--report", "missing.json"], "missing.json"),
    ],
)
def test_wrong_use(rmsnorm: CommandLine, exported: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    outcome = rmsnorm("package", exported, "-o", tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "out").exists()
