"""Register the creators of the plugins in TensorRT's registry, which lives as long as the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...models.errors import EnvironmentMissingError, UsageError
from ...plugins import contract
from ...plugins.tensorrt import library as plugin_library
from .engine_file import EngineFile

# What must live as long as the registry, by the module of TensorRT: creators in Python.
_KEPT: dict[str, Any] = {}


def creator_key(creator: Any) -> tuple[str, str, str]:
    """Name, version and namespace of a creator."""
    return (creator.name, creator.plugin_version, creator.plugin_namespace)


def missing_creators(trt: Any) -> list[str]:
    """The operators that the registry has no creator of ours for."""
    registry, version, space = trt.get_plugin_registry(), contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE
    return [name for name in contract.INPUTS if registry.get_creator(name, version, space) is None]


def load_library(trt: Any, library: Path) -> None:
    """Load the C++ library into the registry.

    Raises:
        UsageError: TensorRT cannot load it, it brings other creators, or it was built for another contract.
    """
    registry = trt.get_plugin_registry()
    before = {creator_key(creator) for creator in registry.all_creators}
    try:
        registry.load_library(str(library))
    except Exception as error:
        raise UsageError(f"{library}: TensorRT cannot load it: {' '.join(str(error).split())}") from error
    if missing_creators(trt):
        brought = [creator_key(creator) for creator in registry.all_creators]
        names = ", ".join(f"{n} version {v} of namespace {s!r}" for n, v, s in brought if (n, v, s) not in before)
        *others, last = contract.INPUTS
        raise UsageError(
            f"{library}: expected creators {', '.join(others)} and {last} of namespace {contract.PLUGIN_NAMESPACE!r}, "
            f"version {contract.PLUGIN_VERSION!r}, got {names or 'none'}. Build it again: rmsnorm plugin build."
        )
    if not plugin_library.read_library(library).is_current:
        raise UsageError(
            f"{library}: it was built by another version of rmsnorm-deploy with different operators. Build it "
            "again: rmsnorm plugin build."
        )


def ensure_creators(trt: Any, file: EngineFile, library: Path | None = None) -> None:
    """Register what an engine needs, unless this process has done so already.

    Args:
        trt: TensorRT's module.
        file: the engine.
        library: the C++ library's file; None for the one that the engine was built with, or else the default one.

    Raises:
        EnvironmentMissingError: the engine needs the C++ library, and there is none.
        UsageError: the library cannot be loaded.
    """
    plugin = file.record.get("plugin", {"kind": "library"})
    if plugin["kind"] == "none" or not missing_creators(trt):
        return
    if plugin["kind"] == "python" and library is None:
        from ...plugins.tensorrt.creators import Plugins

        _KEPT[trt.__name__] = plugins = Plugins(trt, ())
        plugins.register()
        return
    if library is not None and not library.is_file():
        raise UsageError(f"{library} does not exist; expected the plugin's library. Build it: rmsnorm plugin build.")
    places = [library, Path(plugin["library"]) if plugin.get("library") else None, plugin_library.find_library()]
    found = next((place for place in places if place is not None and place.is_file()), None)
    if found is not None:
        load_library(trt, found)
    elif file.record:
        raise EnvironmentMissingError(
            f"{file.path}: {file.record.get('plugin_layers')} of its norms are run by the plugin's C++ library, and it "
            f"is not there: expected {plugin['library']} or {plugin_library.default_folder()}. Build it (rmsnorm "
            f"plugin build), or name it with the environment variable {plugin_library.LIBRARY_VARIABLE}."
        )
