"""A script that builds the engine of a package with TensorRT's own tool (`build_script`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...export.onnx_io.manifest import read_manifest
from ...models.errors import UnsupportedError
from ..tensorrt.options import BuildOptions
from ..tensorrt.plan import plan_build
from ..tensorrt.trtexec import LIBRARY_PLACE, shell_line, trtexec_command

FILE = "build.sh"
_TARGETS = ("standard", "primitives", "plugin")
ENGINE = "model.engine"


@dataclass(frozen=True, slots=True)
class BuildScript:
    """A script, and what it needs.

    Attributes:
        text: of the script.
        library: the plugin's library, which stands beside it; None without plugin nodes, or if it is not built yet.
        notes: remarks for the user.
    """

    text: str
    library: Path | None
    notes: list[str]


def build_script(folder: Path, model: str) -> BuildScript:
    """The script for the model of an exported folder, with the shapes that `rmsnorm build` would choose.

    Args:
        folder: the exported folder.
        model: the model's file in the package.

    Raises:
        UnsupportedError: TensorRT does not run such a file.
        UsageError: the folder is not an export, or an input has a shape that is not known.
    """
    target = read_manifest(folder).get("target")
    if target not in _TARGETS:
        raise UnsupportedError(
            f"{folder}: expected a file for one of {', '.join(_TARGETS)}, which trtexec parses, got one for {target}. "
            "Export it again with --target, or build with rmsnorm build, which replaces the operators that TensorRT "
            "does not have."
        )
    with plan_build(folder, BuildOptions(runtime="tensorrt"), elsewhere=True) as plan:
        if plan.network.path != plan.source.model:
            raise UnsupportedError(f"{folder}: its graph is changed before a build; build with rmsnorm build.")
        words = trtexec_command(plan, ENGINE)
        uses_plugin, library = plan.plugin.kind != "none", plan.plugin.library
    words = [f"--onnx={model}" if word.startswith("--onnx=") else word for word in words]
    notes = []
    if uses_plugin and library is None:
        notes.append(f"the plugin's library is not built yet: {FILE} asks for it with {LIBRARY_PLACE}")
    if library is not None:
        place = Path(library)
        words = [f"--dynamicPlugins=./{place.name}" if word.startswith("--dynamicPlugins=") else word for word in words]
    lines = [
        "#!/bin/sh",
        "# Builds the engine of this folder's model with TensorRT's own tool; further options are passed on.",
        'cd "$(dirname "$0")" || exit 1',
        f'exec {shell_line(words)} "$@"',
    ]
    return BuildScript("\n".join(lines) + "\n", None if library is None else Path(library), notes)
