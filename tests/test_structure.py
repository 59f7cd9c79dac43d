"""The house: which room may import which, without circles, and how large modules and rooms may be.

`python -m tests.helpers.import_graph` prints the picture of the rooms.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.import_graph import HOUSE, ImportGraph

ROOT = Path(__file__).parent.parent
GRAPH = ImportGraph.read(ROOT)

MOST_LINES, MOST_MODULES = 450, 14

# From the bottom up: a room may import itself and the rooms of the lines above it, never one beside it.
# `models` counts as one room: loading a model needs those that are built in, which need the spec.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "models",
        "models.calling",
        "models.recognition",
        "models.builtin",
        "models.weights",
        "models.hub",
        "models.attention",
    ),
    ("plugins",),
    ("plugins.kernel", "export.graph", "export.onnx_io", "runtime.accuracy"),
    ("plugins.tensorrt", "export.recognition", "export.lowering"),
    ("export.sizes", "plugins.torch", "runtime.engines", "runtime.cluster"),
    ("export.capture",),
    ("export.from_onnx", "export.from_torch", "runtime.runners"),
    ("export", "runtime.inputs"),
    ("runtime.norms", "runtime.report"),
    ("runtime.rewriting", "runtime.risk", "runtime.attention"),
    ("runtime.tensorrt",),
    ("runtime.validation", "runtime.generation", "runtime.packaging", "runtime.dataset", "runtime.serving"),
    ("runtime.recipe",),
    ("runtime.shipping",),
    ("runtime",),
    ("", "cli", "cli.commands", "cli.delivery"),
)
TOGETHER = (set(LAYERS[0]), set(LAYERS[-1]))
# `export` reads the contract of the custom operators and nothing else of `plugins`.
CONTRACT = "plugins.contract"


def layer_of(room: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def test_every_room_has_a_layer() -> None:
    rooms = {GRAPH.room_of(name) for name in GRAPH.files}
    assert rooms == {room for rooms in LAYERS for room in rooms}


@pytest.mark.parametrize("room", sorted({GRAPH.room_of(name) for name in GRAPH.files}))
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in GRAPH.imports.items()
        for target in targets
        if GRAPH.room_of(name) == room
        and GRAPH.room_of(target) != room
        and not any({room, GRAPH.room_of(target)} <= together for together in TOGETHER)
        and layer_of(GRAPH.room_of(target)) >= layer_of(room)
    ]
    assert wrong == []


def test_export_reads_the_contract_alone_of_the_plugins() -> None:
    found = {
        target
        for name, targets in GRAPH.imports.items()
        for target in targets
        if name.startswith("export") and target.startswith("plugins")
    }
    assert found == {CONTRACT}


def test_there_are_no_circles() -> None:
    assert GRAPH.circles() == []


def test_modules_are_of_a_size_to_read() -> None:
    assert {name: lines for name, lines in GRAPH.lines.items() if lines > MOST_LINES} == {}


def test_rooms_are_of_a_size_to_overlook() -> None:
    assert {room: len(names) for room, names in GRAPH.rooms().items() if len(names) > MOST_MODULES} == {}


@pytest.mark.parametrize("room", [room for room in GRAPH.rooms() if room.startswith(HOUSE)])
def test_a_room_lists_its_modules(room: str) -> None:
    """In its docstring; the command line's rooms do without."""
    text = GRAPH.files[room].read_text(encoding="utf-8")
    names = [name.rpartition(".")[2] for name in GRAPH.rooms()[room]]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def test_reading_a_manifest_loads_neither_recognition_nor_lowering() -> None:
    loaded = GRAPH.loaded_by("export.onnx_io.manifest")
    assert "models.errors" in loaded
    rooms = ("recognition", "lowering", "from_onnx", "from_torch", "capture")
    above = (*(f"export.{room}" for room in rooms), "plugins")
    assert [name for name in loaded if name.startswith(above)] == []


def test_one_place_names_the_backends() -> None:
    """Everything else opens runners through `open_runner`; the backends' own helpers are imported where they are."""
    defined = {
        name: set(re.findall(r"^class (\w+Runner)\b", GRAPH.files[name].read_text(encoding="utf-8"), re.MULTILINE))
        for name in GRAPH.rooms()["runtime.runners"]
    }
    classes = {name for names in defined.values() for name in names}
    assert {"OrtRunner", "TensorRTRunner", "TorchRunner"} <= classes
    found = {
        name for name, path in GRAPH.files.items()
        if classes & set(path.read_text(encoding="utf-8").replace("(", " ").replace(",", " ").split())
    }  # fmt: skip
    assert {name for name in found if name and not defined.get(name)} == {"runtime.runners.open"}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository with a circle, an import upwards and an import for type checkers."""
    sources = {
        "models/a.py": "from . import b\n",
        "models/b.py": "def f():\n    from .a import x\n",
        "models/__init__.py": "",
        "export/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..models.a import x\n",
        "export/__init__.py": "",
        "plugins/__init__.py": "",
        "runtime/__init__.py": "from ..export import c\n",
        "src/rmsnorm_deploy/__init__.py": "import rmsnorm_deploy.runtime\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_graph_sees_imports_wherever_they_are(small: Path) -> None:
    graph = ImportGraph.read(small)
    assert graph.circles() == [["models.a", "models.b"]]
    assert graph.imports["export.c"] == {"models.a"}
    assert graph.at_load["export.c"] == frozenset()
    assert graph.imports["runtime"] == {"export.c"}
    assert graph.imports[""] == {"runtime"}
    assert graph.loaded_by("runtime") == {"export", "export.c"}
    assert (graph.levels("models"), graph.levels("export")) == (1, 1)
    assert "models.a <-> models.b" in graph.picture()
