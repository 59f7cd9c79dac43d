"""The scripts that check a GPU, run with programs that stand for those that they call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"
COMMON = SCRIPTS / "common.sh"
NO_NVIDIA_SMI = "#!/usr/bin/env bash\necho 'No devices were found'\nexit 6\n"
# What nvidia-smi may be where there is no GPU.
WITHOUT_GPU = (NO_NVIDIA_SMI, "#!/usr/bin/env bash\nexit 127\n", "#!/usr/bin/env bash\n")


@dataclass(frozen=True)
class GpuScript:
    """A script with its stand-ins.

    Attributes:
        name: the script's file name.
        python: stands for the interpreter; it writes each call into $CALLS.
        programs: other programs on PATH, by name; nvidia-smi is one.
        settings: variables of the stand-ins.
    """

    name: str
    python: str
    programs: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The script's file."""
        return SCRIPTS / self.name

    def __call__(
        self, place: Path, *arguments: str, nvidia_smi: str | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the script in `place`."""
        programs = {**self.programs, **({} if nvidia_smi is None else {"nvidia-smi": nvidia_smi})}
        for name, text in programs.items():
            program(place / "bin", name, text)
        python = program(place / "fake", "python3", self.python)
        own = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHON": str(python), "CALLS": str(place / "calls")}
        kept = {name: value for name, value in os.environ.items() if name != "RMSNORM_DEPLOY_PLUGIN"}
        return subprocess.run(
            [str(self.path), *arguments], cwd=place, env={**kept, "HAS": "little", **self.settings, **own, **variables},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def limits(self) -> dict[str, str]:
        """The time limit of each step, as it is written."""
        text = self.path.read_text(encoding="utf-8")
        found = dict(re.findall(r"^ *(?:run_)?step (\w+) (\d+|\$\(\(.*?\)\)) ", text, flags=re.MULTILINE))
        (venv,) = re.findall(r"^ *step venv (\d+) ", COMMON.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (install,) = re.findall(r"^ *install_into_environment (\d+) ", text, flags=re.MULTILINE)
        return {"venv": venv, "install": install, **found}

    def check_shell(self) -> None:
        """What shellcheck finds in the script: nothing. Skips the test where it is missing."""
        if shutil.which("shellcheck") is None:
            pytest.skip("needs shellcheck")
        command = ["shellcheck", "-x", "-P", str(SCRIPTS.parent), str(self.path)]
        assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout == ""

    def check_nothing_is_written_without_a_gpu(self, place: Path, nvidia_smi: str) -> None:
        """Run the script with this nvidia-smi, which finds no GPU."""
        done = self(place, "out", nvidia_smi=nvidia_smi)
        assert (done.returncode, done.stdout) == (4, "")
        assert "requires an NVIDIA GPU" in done.stderr
        assert sorted(path.name for path in place.iterdir()) == ["bin", "fake"]

    def check_this_machine_has_no_gpu(self, place: Path) -> None:
        """Run the script as it is. Skips the test where there is nvidia-smi."""
        if shutil.which("nvidia-smi") is not None:
            pytest.skip("this machine has nvidia-smi")
        done = subprocess.run([str(self.path)], cwd=place, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 4
        assert "nvidia-smi is not on PATH or found none. Nothing was installed." in done.stderr
        assert list(place.iterdir()) == []


def program(folder: Path, name: str, text: str) -> Path:
    """A program that can be run."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def calls(place: Path) -> list[str]:
    """The calls of the stand-ins, in order."""
    return (place / "calls").read_text(encoding="utf-8").splitlines()


def steps(place: Path) -> dict[str, int]:
    """Exit code of each step."""
    lines = (place / "out" / "steps.txt").read_text(encoding="utf-8").splitlines()
    return {line.split()[0]: int(line.split("exit code ")[1].partition(",")[0]) for line in lines}
