"""The benchmarks are plain packages: each starts from the root, none changes `sys.path`, no imports run in circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("benchmarks", "tests/helpers")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
COMMANDS = sorted(
    name.removesuffix(".__main__")
    for name, path in SOURCES.items()
    if name.startswith("benchmarks.") and "__name__ ==" in path.read_text(encoding="utf-8")
)


def _imported(name: str) -> Iterator[str]:
    """Modules of SOURCES that a module imports anywhere, inside functions and under TYPE_CHECKING too."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (module for module in found if module in SOURCES and module != name)


def test_imports_are_followed() -> None:
    assert "benchmarks.mutations.surgery" in set(_imported("benchmarks.mutations.steps"))
    assert "benchmarks.mutations.run" in set(_imported("benchmarks.mutations.__main__"))
    assert any(module.startswith("tests.helpers.") for module in _imported("benchmarks.rewrite"))


def test_imports_are_not_circular() -> None:
    order = list(TopologicalSorter({name: set(_imported(name)) for name in SOURCES}).static_order())
    assert sorted(order) == sorted(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_the_path_is_left_alone(name: str) -> None:
    """What benchmarks and helpers need is imported as it stands; helpers import each other relatively."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path")
        assert not (isinstance(node, ast.ImportFrom) and not node.level and str(node.module).startswith("helpers"))


def test_there_is_a_command_for_every_benchmark() -> None:
    parts = {
        f"benchmarks.{path.stem}"
        for path in (ROOT / "benchmarks").iterdir()
        if path.stem != "__init__" and (path.suffix == ".py" or (path / "__init__.py").is_file())
    }
    assert parts == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_benchmark_starts(command: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: python -m {command} ")
