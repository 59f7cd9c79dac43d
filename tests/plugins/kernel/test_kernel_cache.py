"""The cache of compiled kernels: found again, keyed by everything, damaged entries compiled again, off on request."""

from __future__ import annotations

import dataclasses
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import RmsnormDeployError
from rmsnorm_deploy.plugins.kernel import compiler, kernel_cache
from rmsnorm_deploy.plugins.kernel.compiler import compile_kernel
from rmsnorm_deploy.plugins.kernel.launch_config import choose
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC: pip install 'rmsnorm-deploy[kernel]'")

KERNEL = NormKernel(64, 1e-6)


def compiled(kernel: NormKernel = KERNEL, architecture: int = 80, kind: Any = "cubin") -> compiler.CompiledKernel:
    return compile_kernel(kernel, choose(kernel, None, architecture), architecture, kind)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What NVRTC compiled."""
    found: list[str] = []
    own = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *arguments: (found.append(arguments[-1]), own(*arguments))[1])
    return found


def test_a_kernel_is_compiled_once(folder: Path, compilations: list[str]) -> None:
    first, second = compiled(), compiled()
    assert first == second
    assert compilations == ["rms_norm for sm_80"]
    assert len(list(folder.iterdir())) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_everything_that_it_depends_on_is_in_the_key(
    folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in ({}, {"epsilon": 1e-5}, {"width": 72}, {"dtype": "bfloat16"}, {"op": "add_rms_norm"}):
        compiled(NormKernel(**{"width": 64, "epsilon": 1e-6, **changes}))
    compiled(architecture=90)
    ptx = compiled(kind="ptx")
    monkeypatch.setattr(compiler, "_build_of", lambda nvrtc: ["1.0"])
    compiled()
    monkeypatch.setattr(kernel_cache, "FORMAT", 0)
    compiled()
    assert len(compilations) == len(list(folder.iterdir())) == 9
    assert compiled(kind="ptx").image != compiled().image
    assert ptx.image.lstrip().startswith(b"//")


def test_a_changed_source_is_compiled(folder: Path, compilations: list[str], tmp_path: Path) -> None:
    compiled()
    for file in compiler.SOURCE_FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "numbers.cuh").open("a") as file:
        file.write("// more\n")
    compile_kernel(KERNEL, choose(KERNEL, None, 80), 80, folder=tmp_path)
    assert len(compilations) == 2
    with (tmp_path / "kernel.cu").open("a") as file:
        file.write("#error it stops here\n")
    with pytest.raises(RmsnormDeployError, match=r"failed to compile rms_norm for sm_80 .*\n(.*\n)*.*it stops here"):
        compile_kernel(KERNEL, choose(KERNEL, None, 80), 80, folder=tmp_path)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: b"", lambda content: content[:200] + b"\1" + content[201:],
    lambda content: b"0" * 64 + content[64:],
], ids=["short", "empty", "changed", "hash"])  # fmt: skip
def test_a_damaged_entry_is_compiled_again(folder: Path, compilations: list[str], damage: Any) -> None:
    first = compiled()
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert compiled() == first
    assert len(compilations) == 2
    assert entry.read_bytes() == whole


def test_an_entry_under_another_name_is_not_taken(folder: Path, compilations: list[str]) -> None:
    compiled()
    (entry,) = folder.iterdir()
    compiled(architecture=90)
    (other,) = (path for path in folder.iterdir() if path != entry)
    other.write_bytes(entry.read_bytes())
    assert compiled(architecture=90).architecture == 90
    assert len(compilations) == 3


def test_simultaneous_writers_leave_one_whole_entry(folder: Path) -> None:
    first = compiled()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: kernel_cache.write_entry("key", dataclasses.asdict(first)), range(40)))
    assert len(list(folder.iterdir())) == 2  # the compiled one, and the one that all wrote
    assert compiler.CompiledKernel(**(kernel_cache.read_entry("key") or {})) == first


def test_a_folder_that_cannot_be_written_to_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "file" / "kernels"))
    assert compiled().image[:4] == b"\x7fELF"
    assert "is not cached" in caplog.text
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(("given", "base", "expected"), [
    ("off", "/base", None), ("OFF", "/base", None), ("0", "/base", None), ("/x/y", "/base", "/x/y"),
    ("", "/base", "/base/rmsnorm-deploy/kernels"), ("", "", "/home/.cache/rmsnorm-deploy/kernels"),
    ("", "relative", "/home/.cache/rmsnorm-deploy/kernels"), ("~/z", "", "/home/z"),
])  # fmt: skip
def test_the_folder(monkeypatch: pytest.MonkeyPatch, given: str, base: str, expected: str | None) -> None:
    monkeypatch.setenv("HOME", "/home")
    monkeypatch.setenv(kernel_cache.VARIABLE, given)
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert kernel_cache.cache_folder() == (None if expected is None else Path(expected))
