"""Plan a build (`plan_build`): every decision that is made before TensorRT runs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...export.onnx_io.owned_files import sha256
from ...models.errors import EnvironmentMissingError, UnsupportedError, UsageError
from ...models.regular_files import read_json
from ...plugins.tensorrt import library
from ..engines.api import resolve_architectures
from ..inputs.exported import Exported, open_exported
from .network import NetworkFile, read_network
from .options import BuildOptions
from .profiles import Profile, make_profiles

# Keys of a model's config that contain its number of positions.
_LIMITS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length")


@dataclass(frozen=True, slots=True)
class PluginUse:
    """Which plugins a build registers.

    Attributes:
        kind: `library`, `python`, or `none`.
        library: the C++ library's file, or None.
        reason: the reason for the choice, for messages.
    """

    kind: str
    library: Path | None
    reason: str

    def digest(self) -> str | None:
        """SHA-256 of the library, or of the sources of the plugins in Python; None without plugins."""
        if self.library is not None:
            return sha256(self.library)
        return library.python_digest() if self.kind == "python" else None

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON, with the plugin's hash."""
        place = None if self.library is None else str(self.library)
        return {"kind": self.kind, "library": place, "sha256": self.digest(), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Every decision about a build.

    Attributes:
        source: the exported model that the user named.
        network: the ONNX file that is built.
        options: the options that the user gave.
        architectures: architectures that the engine is built for.
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
    """Make every decision that does not require TensorRT. The plan's file may be temporary.

    Args:
        source: an exported folder, or an .onnx file.
        options: the options of the build.
        elsewhere: plan a build on another machine; a GPU and the plugin are not required here.

    Raises:
        UsageError, UnsupportedError, EnvironmentMissingError: as in `build_engine`.
    """
    exported = open_exported(Path(source))
    architectures = resolve_architectures(options.runtime, options.architectures, elsewhere)
    with contextlib.ExitStack() as stack:
        network = read_network(exported.model, options.float64_as_float32)
        if options.norm == "plugin" and not (network.plugin_nodes and _all_in_plugin(network)):
            if elsewhere:
                raise UsageError(
                    f"{exported.model}: some of its norms are not plugin nodes. Convert them first with "
                    "rmsnorm rewrite --target plugin, and name the rewritten file."
                )
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rmsnorm-build-")))
            network = _with_plugins(exported, folder / "model", options)
        longest = _longest(exported)
        profiles = make_profiles(network.inputs, options.profiles, longest)
        # On another machine the library may exist although it does not exist here.
        plugin = choose_plugin(dataclasses.replace(options, plugin="auto") if elsewhere else options, network)
        yield BuildPlan(exported, network, options, architectures, profiles, plugin)


def choose_plugin(options: BuildOptions, network: NetworkFile) -> PluginUse:
    """Choose between the C++ library and the plugins in Python.

    Raises:
        UsageError: the named library does not exist.
        EnvironmentMissingError: the library was requested and does not exist.
        UnsupportedError: `norm` is `native`, but the file contains only plugin nodes without local functions.
    """
    if options.norm == "native" and network.plugin_nodes and not network.functions:
        raise UnsupportedError(
            f"{network.path}: its norms are plugin nodes and the file has no local functions, so --norm native cannot "
            "build it. Export it for target standard or primitives."
        )
    if options.norm == "native" or not network.plugin_nodes:
        return PluginUse(
            "none", None, "no norm of the file is a plugin node" if not network.plugin_nodes else "--norm native"
        )
    if options.plugin == "python":
        return PluginUse("python", None, "--plugin python")
    named = options.plugin_library
    place = Path(named).expanduser().absolute() if named is not None else library.find_library()
    if place is not None and not place.is_file():
        raise UsageError(f"--plugin-library: {place} does not exist. Build it with: rmsnorm plugin build")
    if place is not None:
        return PluginUse("library", place, "the library exists" if named is None else "--plugin-library")
    if options.plugin == "library":
        raise EnvironmentMissingError(
            f"the plugin's library does not exist: expected {library.default_folder() / library.LIBRARY_NAME}, or the "
            f"file that {library.LIBRARY_VARIABLE} names. Build it with: rmsnorm plugin build"
        )
    return PluginUse(
        "python", None, "the library does not exist (build it with rmsnorm plugin build); the engine requires Python"
    )


def _with_plugins(exported: Exported, folder: Path, options: BuildOptions) -> NetworkFile:
    """The file with its norms converted to plugin nodes, as `rmsnorm rewrite --target plugin` writes it."""
    from ..rewriting.rewrite_file import rewrite_model

    rewritten = rewrite_model(exported.model, folder, target="plugin", verify=False)
    network = read_network(rewritten.model, options.float64_as_float32)
    if not network.plugin_nodes:
        raise UnsupportedError(f"{exported.model}: it contains no norm that the plugin supports.")
    if not _all_in_plugin(network):
        left = [norm.path for norm in network.norms if not norm.is_plugin]
        reasons = {refusal.path: refusal.reason for refusal in rewritten.rewritten.refusals}
        raise UnsupportedError(
            f"{exported.model}: the plugin cannot run {len(left)} of the norms; the first is {left[0]}: "
            f"{reasons.get(left[0], 'the plugin does not support its formula')}. Build it with --norm auto."
        )
    return network


def _all_in_plugin(network: NetworkFile) -> bool:
    return all(norm.is_plugin for norm in network.norms)


def _longest(exported: Exported) -> int | None:
    """The model's number of positions, from the config beside it; None if unknown."""
    file = (exported.folder or exported.model.parent) / "config.json"
    try:
        config = read_json(file, "")
    except UsageError:
        return None
    for content in (config, config.get("text_config") if isinstance(config, dict) else None):
        if not isinstance(content, dict):
            continue
        for key in _LIMITS:
            if isinstance(content.get(key), int) and content[key] > 0:
                return int(content[key])
    return None


def request_of(plan: BuildPlan) -> dict[str, Any]:
    """The request to the worker, as JSON values."""
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
