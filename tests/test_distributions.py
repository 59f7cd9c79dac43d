"""Wheel and sdist hold what is under version control: every module, all package data, and in the sdist the rest too."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAME, VERSION = "rmsnorm_deploy", PYPROJECT["project"]["version"]
# Links to the packages, which the Makefile creates again.
LINKS = ".typecheck/"


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and not name.startswith(LINKS)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], Path, Path]:
    """The tracked files, and the sdist and the wheel built from a copy of them; the wheel from the sdist."""
    tracked = [name for name in _tracked() if (ROOT / name).is_file()]
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    # What a test run leaves behind, which must not get in.
    (copy / "tests" / "__pycache__").mkdir()
    (copy / "tests" / "__pycache__" / "conftest.cpython-311.pyc").write_bytes(b"")
    # Outside the checkout: a folder `build` there would stand for the tool.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    run = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return set(tracked), out / f"{NAME}-{VERSION}.tar.gz", out / f"{NAME}-{VERSION}-py3-none-any.whl"


def _installed(tracked: set[str]) -> dict[str, str]:
    """Where each file of the packages lies in the wheel, by its path in the repository."""
    folders = PYPROJECT["tool"]["setuptools"]["package-dir"]
    tops = {f"{folder}/": package.replace(".", "/") for package, folder in folders.items() if package.count(".") < 2}
    return {
        name: f"{package}/{name.removeprefix(top)}"
        for name in tracked
        for top, package in tops.items()
        if name.startswith(top)
    }


def test_the_wheel_contains_every_file_of_the_packages_and_no_other(built: tuple[set[str], Path, Path]) -> None:
    tracked, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = f"{NAME}-{VERSION}.dist-info/"
    wanted = set(_installed(tracked).values())
    assert {name for name in names if not name.startswith(info)} == wanted
    assert {f"{info}{name}" for name in ("licenses/LICENSE", "METADATA", "entry_points.txt", "RECORD")} <= names
    suffixes = {Path(name).suffix for name in wanted}
    assert {".py", ".typed", ".j2", ".cu", ".cpp", ".safetensors"} <= suffixes


def test_the_sdist_contains_the_repository(built: tuple[set[str], Path, Path]) -> None:
    tracked, sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    of_setuptools = ("PKG-INFO", "setup.cfg", f"{NAME}.egg-info/")
    made = {name for name in names - tracked if name.startswith(of_setuptools)}
    assert names - made == tracked
    assert {"LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "tests/tensorrt-headers.txt"} <= names


def test_both_hold_the_bytes_of_the_repository(built: tuple[set[str], Path, Path]) -> None:
    tracked, sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        assert [n for n, inside in _installed(tracked).items() if archive.read(inside) != (ROOT / n).read_bytes()] == []
    with tarfile.open(sdist) as archive:
        files = {name: archive.extractfile(f"{NAME}-{VERSION}/{name}") for name in tracked}
        assert [n for n, file in files.items() if file is None or file.read() != (ROOT / n).read_bytes()] == []
