"""Everything about a build that is decided before TensorRT runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...export.onnx_io.atomic_files import sha256
from ...models.errors import EnvironmentMissingError, UnsupportedError, UsageError
from ...plugins.tensorrt import library
from ..inputs.exported import Exported, open_exported
from .api import resolve_architectures
from .network import NetworkFile, read_network
from .options import BuildOptions
from .profiles import Profile, make_profiles

# Keys of a model's config that tell how many positions it has.
_LIMITS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length")


@dataclass(frozen=True, slots=True)
class PluginUse:
    """Which plugins a build registers.

    Attributes:
        kind: `library`, `python`, or `none`.
        library: the C++ library's file.
        reason: why, for people.
    """

    kind: str
    library: Path | None
    reason: str

    def digest(self) -> str | None:
        """SHA-256 of the library, or of what the plugins in Python are made of; None without plugins."""
        if self.library is not None:
            return sha256(self.library)
        return library.python_digest() if self.kind == "python" else None

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON, with the plugin's hash."""
        place = None if self.library is None else str(self.library)
        return {"kind": self.kind, "library": place, "sha256": self.digest(), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Everything that is decided before TensorRT runs.

    Attributes:
        source: what was asked for.
        network: the file that is built.
        options: as given.
        architectures: what the engine is for.
        profiles: its optimization profiles.
        plugin: which plugins are registered.
    """

    source: Exported
    network: NetworkFile
    options: BuildOptions
    architectures: tuple[int, ...]
    profiles: list[Profile]
    plugin: PluginUse


@contextmanager
def plan_build(source: str | os.PathLike[str], options: BuildOptions, elsewhere: bool = False) -> Iterator[BuildPlan]:
    """Decide everything that can be decided without TensorRT. The plan's file may vanish at the end of the block.

    Args:
        source: an exported folder, or an .onnx file.
        options: how to build.
        elsewhere: plan a build on another machine: the GPU and the plugin need not be here.

    Raises:
        UsageError, UnsupportedError, EnvironmentMissingError: as `build_engine`.
    """
    exported = open_exported(Path(source))
    architectures = resolve_architectures(options.runtime, options.architectures, elsewhere)
    with contextlib.ExitStack() as stack:
        network = read_network(exported.model, options.float64_as_float32)
        if options.norm == "plugin" and not (network.plugin_nodes and _all_in_plugin(network)):
            if elsewhere:
                raise UsageError(
                    f"{exported.model}: not all of its norms are the plugin's yet. Make a file whose norms are, and "
                    "name that: rmsnorm rewrite --target plugin"
                )
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rmsnorm-build-")))
            network = _with_plugins(exported, folder / "model", options)
        longest = _longest(exported)
        profiles = make_profiles(network.inputs, options.profiles, longest)
        # A library that will be there is not asked for here.
        plugin = choose_plugin(dataclasses.replace(options, plugin="auto") if elsewhere else options, network)
        yield BuildPlan(exported, network, options, architectures, profiles, plugin)


def choose_plugin(options: BuildOptions, network: NetworkFile) -> PluginUse:
    """The one place that decides between the C++ library and the plugins in Python.

    Raises:
        EnvironmentMissingError: the library was asked for and is not there.
        UnsupportedError: every norm is to run natively, and the file has nothing but the plugin for it.
    """
    if options.norm == "native" and network.plugin_nodes and not network.functions:
        raise UnsupportedError(
            f"{network.path}: its norms are the plugin's and the file has no local functions, so --norm native cannot "
            "build it. Export it for the target standard or primitives."
        )
    if options.norm == "native" or not network.plugin_nodes:
        return PluginUse(
            "none", None, "no norm of the file is the plugin's" if not network.plugin_nodes else "--norm native"
        )
    if options.plugin == "python":
        return PluginUse("python", None, "--plugin python")
    named = options.plugin_library
    place = Path(named).expanduser().absolute() if named is not None else library.find_library()
    if place is not None and not place.is_file():
        raise UsageError(f"--plugin-library: there is no {place}. Make one with: rmsnorm plugin build")
    if place is not None:
        return PluginUse("library", place, "the library is there" if named is None else "--plugin-library")
    if options.plugin == "library":
        raise EnvironmentMissingError(
            f"the plugin's library is not there: expected {library.default_folder() / library.LIBRARY_NAME}, or the "
            f"file that {library.LIBRARY_VARIABLE} names. Make it with: rmsnorm plugin build"
        )
    return PluginUse(
        "python", None, "the library is not there (rmsnorm plugin build makes it); the engine needs Python to run"
    )


def _with_plugins(exported: Exported, folder: Path, options: BuildOptions) -> NetworkFile:
    """The file with its norms given to the plugin, as `rmsnorm rewrite --target plugin` would write it."""
    from ..rewriting.rewrite_file import rewrite_model

    rewritten = rewrite_model(exported.model, folder, target="plugin", verify=False)
    network = read_network(rewritten.model, options.float64_as_float32)
    if not network.plugin_nodes:
        raise UnsupportedError(f"{exported.model}: no norm was found that the plugin could run.")
    if not _all_in_plugin(network):
        left = [norm.path for norm in network.norms if not norm.is_plugin]
        reasons = {refusal.path: refusal.reason for refusal in rewritten.rewritten.refusals}
        raise UnsupportedError(
            f"{exported.model}: {len(left)} norms cannot be the plugin's; the first is {left[0]}: "
            f"{reasons.get(left[0], 'the plugin does not compute its formula')}. Build it with --norm auto."
        )
    return network


def _all_in_plugin(network: NetworkFile) -> bool:
    return all(norm.is_plugin for norm in network.norms)


def _longest(exported: Exported) -> int | None:
    """How many positions the model has, by the config beside it."""
    file = (exported.folder or exported.model.parent) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for content in (config, config.get("text_config") if isinstance(config, dict) else None):
        if not isinstance(content, dict):
            continue
        for key in _LIMITS:
            if isinstance(content.get(key), int) and content[key] > 0:
                return int(content[key])
    return None


def request_of(plan: BuildPlan) -> dict[str, Any]:
    """What the worker is asked to do."""
    network = plan.network
    return {
        "model": str(network.path.absolute()),
        "shown": str(plan.source.model),
        "options": plan.options.to_dict(),
        "architectures": list(plan.architectures),
        "profiles": [profile.to_dict() for profile in plan.profiles],
        "plugin": {
            "kind": plan.plugin.kind,
            "library": None if plan.plugin.library is None else str(plan.plugin.library),
        },
        "plugin_nodes": network.plugin_nodes,
        "norms": [
            {"path": n.path, "form": n.form, "node": n.node, "nodes": sorted(n.nodes), "is_plugin": n.is_plugin}
            for n in network.norms
        ],
        "events": None,
    }
