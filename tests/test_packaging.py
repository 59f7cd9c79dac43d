"""The package list, the import rule and the type checkers' view all agree with the disk."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ("export", "models", "plugins", "runtime")
FACE = ROOT / "src" / "rmsnorm_deploy"
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def _package_folders() -> dict[str, Path]:
    """Every folder with an `__init__.py`, by the name of the package that it is."""
    tops = {"rmsnorm_deploy": FACE, **{f"rmsnorm_deploy.{name}": ROOT / name for name in HOUSE}}
    return {
        ".".join((name, *init.parent.relative_to(top).parts)): init.parent
        for name, top in tops.items()
        for init in top.rglob("__init__.py")
    }


def _sources() -> Iterator[Path]:
    for name in HOUSE:
        yield from sorted((ROOT / name).rglob("*.py"))


def test_packages_are_those_on_disk() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(_package_folders())


def test_package_dirs_lead_to_the_packages() -> None:
    folders = _package_folders()
    for name, path in SETUPTOOLS["package-dir"].items():
        assert ROOT / path == folders[name]


def test_every_module_is_in_a_package() -> None:
    packages = set(_package_folders().values())
    assert [path for path in (*_sources(), *FACE.rglob("*.py")) if path.parent not in packages] == []


def test_every_other_file_is_package_data() -> None:
    listed = subprocess.run(["git", "ls-files", *HOUSE, "src"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is not a git checkout")
    patterns = [
        f"{_package_folders()[package].relative_to(ROOT)}/{pattern}"
        for package, wanted in SETUPTOOLS["package-data"].items()
        for pattern in wanted
    ]
    others = [name for name in listed.stdout.splitlines() if not name.endswith(".py")]
    assert others
    assert [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_inside_the_house_are_relative(path: Path) -> None:
    forbidden = {*HOUSE, "rmsnorm_deploy"}
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in forbidden]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [node.module] if str(node.module).partition(".")[0] in forbidden else []
    assert found == []


# Who may import whom; `export` reaches into `plugins` for the contract alone.
_MAY_IMPORT = {
    "models": set(),
    "plugins": {"models"},
    "export": {"models", "plugins.contract"},
    "runtime": {"models", "plugins", "export"},
}


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    package, *inside = path.relative_to(ROOT).with_suffix("").parts
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level != len(inside) + 1:
            continue
        modules = [node.module] if node.module else [alias.name for alias in node.names]
        if node.module and "." not in node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        wrong += [m for m in modules if not {m, m.partition(".")[0]} & (_MAY_IMPORT[package] | {package})]
    assert wrong == []


def test_type_checkers_see_every_package_and_module() -> None:
    seen = ROOT / ".typecheck" / "rmsnorm_deploy"
    if (ROOT / "PKG-INFO").is_file() and not seen.exists():
        pytest.skip("this is an unpacked sdist, in which `make types` makes the links")
    wanted = {path.name: path for path in FACE.iterdir() if path.name != "__pycache__"}
    wanted |= {name: ROOT / name for name in HOUSE}
    assert {path.name for path in seen.iterdir()} == set(wanted)
    for name, path in wanted.items():
        assert not (seen / name).readlink().is_absolute()
        assert (seen / name).resolve() == path
