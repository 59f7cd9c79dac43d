"""Which plugins an opened engine gets, and what is said where they are missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.plugins.tensorrt import creators
from rmsnorm_deploy.plugins.tensorrt import library as plugin_library
from rmsnorm_deploy.runtime.engines import plugin_creators
from rmsnorm_deploy.runtime.engines.engine_file import EngineFile
from rmsnorm_deploy.runtime.engines.plugin_creators import ensure_creators, load_library, missing_creators


class Registry:
    """TensorRT's registry, into which libraries bring what `brings` says."""

    def __init__(self, brings: tuple[str, ...] = tuple(contract.INPUTS)) -> None:
        self.all_creators: list[Any] = []
        self.brings, self.loaded = brings, []

    def load_library(self, path: str) -> None:
        self.loaded.append(path)
        if path.endswith("broken.so"):
            raise RuntimeError("cannot open shared object")
        for name in self.brings:
            row = SimpleNamespace(name=name, plugin_version="1", plugin_namespace=contract.PLUGIN_NAMESPACE)
            self.all_creators.append(row)

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        known = {(c.name, c.plugin_version, c.plugin_namespace): c for c in self.all_creators}
        return known.get((name, version, namespace))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr(plugin_library, "read_library", lambda path: SimpleNamespace(is_current=path.stem != "old"))
    monkeypatch.setattr(plugin_library, "find_library", lambda: None)
    return Registry()


def trt_of(registry: Registry) -> Any:
    return SimpleNamespace(__name__="a_tensorrt", get_plugin_registry=lambda: registry)


def engine(kind: str, library: Path | None = None) -> EngineFile:
    plugin = {"kind": kind, "library": None if library is None else str(library)}
    return EngineFile(Path("m.engine"), "rtx", {"plugin": plugin, "plugin_layers": 5})


def file_in(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(b"")
    return folder / name


def test_an_engine_without_plugins_needs_none(registry: Registry) -> None:
    ensure_creators(trt_of(registry), engine("none"))
    assert (registry.loaded, len(missing_creators(trt_of(registry)))) == ([], len(contract.INPUTS))


def test_the_library_that_the_engine_was_built_with(registry: Registry, tmp_path: Path) -> None:
    place = file_in(tmp_path, "lib.so")
    for _ in range(2):  # once for each process
        ensure_creators(trt_of(registry), engine("library", place))
    assert registry.loaded == [str(place)]
    assert missing_creators(trt_of(registry)) == []


def test_the_named_and_the_default_library(registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named, default = file_in(tmp_path, "named.so"), file_in(tmp_path, "default.so")
    ensure_creators(trt_of(registry), engine("library", tmp_path / "gone.so"), named)
    assert registry.loaded == [str(named)]
    monkeypatch.setattr(plugin_library, "find_library", lambda: default)
    for file in (engine("library", tmp_path / "gone.so"), EngineFile(Path("foreign.plan"), "rtx")):
        other = Registry()
        ensure_creators(trt_of(other), file)
        assert other.loaded == [str(default)]


def test_a_missing_library_is_named(registry: Registry, tmp_path: Path) -> None:
    message = r"m.engine: 5 of its norms are run by the plugin's C\+\+ library, and it is not there: expected .*gone.so"
    with pytest.raises(EnvironmentMissingError, match=message):
        ensure_creators(trt_of(registry), engine("library", tmp_path / "gone.so"))
    ensure_creators(trt_of(registry), EngineFile(Path("foreign.plan"), "rtx"))  # it may need none
    with pytest.raises(UsageError, match=r"named.so does not exist"):
        ensure_creators(trt_of(registry), engine("library"), tmp_path / "named.so")


def test_plugins_in_python(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Plugins:
        def __init__(self, trt: Any, architectures: tuple[int, ...]) -> None:
            assert architectures == ()
            made.append(self)

        def register(self) -> None:
            registry.load_library("python")

    monkeypatch.setattr(creators, "Plugins", Plugins)
    for _ in range(2):
        ensure_creators(trt_of(registry), engine("python"))
    assert len(made) == 1
    assert plugin_creators._KEPT.pop("a_tensorrt") is made[0]


@pytest.mark.parametrize(
    ("name", "brings", "message"),
    [
        ("broken.so", (), r"broken.so: TensorRT cannot load it: cannot open shared object"),
        (
            "other.so",
            ("RMSNorm",),
            r"expected creators RMSNorm, .*, got RMSNorm version 1 of",
        ),
        ("none.so", (), r"got none\. Build it again: rmsnorm plugin build"),
        ("old.so", tuple(contract.INPUTS), r"built by another version of rmsnorm-deploy with different operators"),
    ],
)
def test_libraries_that_cannot_be_used(
    registry: Registry, tmp_path: Path, name: str, brings: tuple[str, ...], message: str
) -> None:
    registry.brings = brings
    with pytest.raises(UsageError, match=message):
        load_library(trt_of(registry), file_in(tmp_path, name))
