"""The graph of imports between this package's modules, from their sources; at any depth, for type checkers or not."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HOUSE = ("models", "export", "plugins", "runtime")
PACKAGE = "rmsnorm_deploy"


@dataclass(frozen=True)
class ImportGraph:
    """Modules and what they import, by their names inside of `rmsnorm_deploy`, such as `runtime.norms.cut`.

    Attributes:
        files: each module's file; a package stands for its `__init__`.
        imports: what each imports, anywhere in its source.
        at_load: what each imports when it is loaded itself: at module level, and not for type checkers.
    """

    files: Mapping[str, Path]
    imports: Mapping[str, frozenset[str]]
    at_load: Mapping[str, frozenset[str]]

    @classmethod
    def read(cls, root: Path) -> ImportGraph:
        """The graph of a repository whose packages are the folders at its root."""
        files = dict(_modules(root))
        found = {name: _imports(name, path, set(files)) for name, path in files.items()}
        every = {name: frozenset(target for target, _ in pairs) for name, pairs in found.items()}
        at_load = {name: frozenset(t for t, is_at_load in pairs if is_at_load) for name, pairs in found.items()}
        return cls(files, every, at_load)

    @cached_property
    def lines(self) -> dict[str, int]:
        """Lines of each module."""
        return {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in self.files.items()}

    def circles(self) -> list[list[str]]:
        """Groups of modules that import each other, directly or not."""
        return sorted(sorted(group) for group in _strongly_connected(self.imports) if len(group) > 1)

    def rooms(self) -> dict[str, list[str]]:
        """Modules by their folder, packages' own files left out."""
        rooms = defaultdict(list)
        for name, path in self.files.items():
            if path.name != "__init__.py":
                rooms[name.rpartition(".")[0]].append(name)
        return dict(rooms)

    def room_of(self, name: str) -> str:
        """The folder that a module is in; a package is its own."""
        return name if self.files[name].name == "__init__.py" else name.rpartition(".")[0]

    def room_imports(self) -> dict[str, set[str]]:
        """Which rooms each room imports."""
        found = defaultdict(set)
        for name, targets in self.imports.items():
            for target in targets:
                if self.room_of(target) != self.room_of(name):
                    found[self.room_of(name)].add(self.room_of(target))
        return dict(found)

    def levels(self, package: str) -> int:
        """The longest chain of imports among the modules of one of the four packages; circles count as one."""
        inside = {n: {t for t in ts if _in(t, package)} for n, ts in self.imports.items() if _in(n, package)}
        group_of = {name: index for index, group in enumerate(_strongly_connected(inside)) for name in group}
        deeper: dict[int, set[int]] = defaultdict(set)
        for name, targets in inside.items():
            deeper[group_of[name]] |= {group_of[t] for t in targets} - {group_of[name]}
        depth: dict[int, int] = {}

        def measure(group: int) -> int:
            if group not in depth:
                depth[group] = 1 + max(map(measure, deeper[group]), default=0)
            return depth[group]

        return max(map(measure, set(group_of.values())), default=0)

    def loaded_by(self, name: str) -> set[str]:
        """What loading a module loads besides it, its packages included."""
        pending, seen = [name], set()
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            parents = current.split(".")
            pending += [p for end in range(1, len(parents)) if (p := ".".join(parents[:end])) in self.files]
            pending += self.at_load[current]
        return seen - {name}

    def picture(self) -> str:
        """The rooms as text: modules, lines, and the rooms that each imports."""
        rows = []
        arrows = self.room_imports()
        for room, names in sorted(self.rooms().items()):
            lines = [self.lines[name] for name in names]
            targets = ", ".join(sorted(arrows.get(room, set()))) or "-"
            rows.append(f"{room or PACKAGE:22} {len(names):3} modules, at most {max(lines):3} lines -> {targets}")
        rows.append("")
        for package in HOUSE:
            count = sum(1 for name in self.files if _in(name, package) and self.files[name].name != "__init__.py")
            rows.append(f"{package:22} {count:3} modules on {self.levels(package)} levels of imports")
        circles = self.circles()
        rows.append(f"circles: {'; '.join(' <-> '.join(circle) for circle in circles) or 'none'}")
        return "\n".join(rows)


def _in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for package in HOUSE:
        for path in sorted((root / package).rglob("*.py")):
            yield _name(path.relative_to(root)), path
    face = root / "src" / PACKAGE
    for path in sorted(face.rglob("*.py")):
        yield _name(path.relative_to(face)), path


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, path: Path, modules: set[str]) -> set[tuple[str, bool]]:
    """What a source imports of `modules`, and whether loading it does so."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {id(node) for scope in ast.walk(tree) if _is_late(scope) for node in ast.walk(scope)}
    found = set()
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([PACKAGE, *base] if node.level else [])
            module = ".".join(part for part in (start, node.module or "") if part)
            targets = [f"{module}.{alias.name}" for alias in node.names]
        for target in targets:
            known = _module_of(target, modules)
            if known is not None and known != name:
                found.add((known, id(node) not in late))
    return found


def _module_of(target: str, modules: set[str]) -> str | None:
    """The module that an imported name is, or is in."""
    if target.partition(".")[0] != PACKAGE:
        return None
    inner = target.partition(".")[2]
    return next((name for name in (inner, inner.rpartition(".")[0]) if name in modules), None)


def _is_late(node: ast.AST) -> bool:
    is_for_checkers = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_for_checkers


def _strongly_connected(graph: Mapping[str, frozenset[str] | set[str]]) -> list[list[str]]:
    """Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph.get(name, ()):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            start = stack.index(name)
            found.append(stack[start:])
            del stack[start:]

    for name in graph:
        if name not in index:
            visit(name)
    return found


if __name__ == "__main__":
    import sys

    print(ImportGraph.read(Path(sys.argv[1] if len(sys.argv) > 1 else ".")).picture())
