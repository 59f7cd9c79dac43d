"""`rmsnorm plugin compile`: the file, what is printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.interface.command_line import CommandLine

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC: pip install 'rmsnorm-deploy[kernel]'")

SMALL = ("--hidden", "64")


def test_a_cubin_and_its_resources(rmsnorm: CommandLine, tmp_path: Path) -> None:
    place = tmp_path / "norm.cubin"
    arguments = ("--op", "add_rms_norm", "--hidden", "4096", "--dtype", "bf16", "--arch", "9.0", "--json")
    outcome = rmsnorm("plugin", "compile", *arguments, "-o", place)
    assert outcome.code == 0
    content = json.loads(outcome.out)
    assert place.read_bytes()[:4] == b"\x7fELF"
    assert content["bytes"] == place.stat().st_size
    found = {name: content[name] for name in ("schema", "file", "name", "kind", "architecture", "spilled_bytes")}
    assert found == {
        "schema": "rmsnorm_deploy.kernel/1", "file": str(place), "name": "add_rms_norm", "kind": "cubin",
        "architecture": 90, "spilled_bytes": 0,
    }  # fmt: skip
    assert 16 < content["registers"] <= 64
    layout = content["layout"]
    assert layout["threads"] * layout["vectors"] * layout["elements"] * layout["cluster"] == 4096
    assert (content["kernel"]["dtype"], content["kernel"]["width"]) == ("bfloat16", 4096)


def test_ptx_for_people(rmsnorm: CommandLine, tmp_path: Path) -> None:
    outcome = rmsnorm("plugin", "compile", *SMALL, "--kind", "ptx", "--arch", "sm_80", "-o", tmp_path / "norm.ptx")
    assert outcome.code == 0
    assert ".target sm_80" in (tmp_path / "norm.ptx").read_text()
    lines = outcome.out.splitlines()
    assert lines[1].startswith("rms_norm, ptx for sm_80, NVRTC ")
    assert lines[4].split() == ["registers", "shared", "memory", "stack", "spilled"]
    assert lines[-1].startswith("its PTX is for drivers of CUDA ")


def test_rows_choose_the_layout(rmsnorm: CommandLine, tmp_path: Path) -> None:
    few, many = (
        json.loads(rmsnorm("plugin", "compile", "--hidden", "4096", *rows, "--json", "-o", tmp_path / name).out)
        for name, rows in (("few", ("--rows", "1")), ("many", ()))
    )
    assert (few["layout"]["few"], many["layout"]["few"]) == (True, False)


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (("--driver", "11.8", "--kind", "ptx"), 3, "PTX for a driver of CUDA 11.8: expected NVRTC 11.8 or earlier, got"),
    (("--driver", "new", "--kind", "ptx"), 2, "--driver: expected a CUDA version such as 12.8"),
    (("--kind", "elf"), 2, "expected ptx or cubin, got 'elf'"), (("--op", "norm"), 2, "rms_norm, add_rms_norm"),
    (("--arch", "sm_70"), 2, "expected sm_75 or later, got sm_70"), (("--arch", "sm_91"), 2, "not sm_91"),
    (("--arch", "80,90"), 2, "--arch: expected one architecture"), (("--dtype", "float64"), 2, "float64"),
    (("--hidden", "0"), 2, "from 1 to 65536"), (("--epsilon", "-1"), 2, "epsilon is -1.0"),
])  # fmt: skip
def test_what_is_refused_leaves_nothing(
    rmsnorm: CommandLine, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    outcome = rmsnorm("plugin", "compile", *SMALL, *arguments, "-o", tmp_path / "norm.cubin")
    assert outcome.code == code
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(rmsnorm: CommandLine, tmp_path: Path) -> None:
    place = tmp_path / "norm.cubin"
    place.write_bytes(b"mine")
    outcome = rmsnorm("plugin", "compile", *SMALL, "-o", place)
    assert outcome.code == 2
    assert "exists; give a new file name" in outcome.err
    assert place.read_bytes() == b"mine"
