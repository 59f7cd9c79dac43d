"""`rmsnorm serve` as a process: it says where it listens, answers, and ends cleanly when it is told to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from rmsnorm_deploy import export_model
from tests.helpers.interface.command_line import CommandLine
from tests.helpers.models.factory_file import small_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    export_model(small_model(folder, "command_served"), folder / "small", target="ort")
    return folder / "small"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_until_it_is_told_to_end(exported: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "rmsnorm_deploy", "serve", str(exported), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while not said.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, "it ended"
            said += line
        url = json.loads(said)["url"]
        assert url.endswith("/v2/models/small")
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert json.load(answer)["name"] == "small"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_wrong_use(rmsnorm: CommandLine, exported: Path, tmp_path: Path) -> None:
    assert "does not exist" in rmsnorm("serve", tmp_path / "gone").err
    outcome = rmsnorm("serve", exported, "--host", "host.invalid", "--port", "0")
    assert (outcome.code, "host.invalid:0: cannot listen there" in outcome.err) == (2, True)
    assert rmsnorm("serve", exported, "--port", "70000").code == 2
