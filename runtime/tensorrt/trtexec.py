"""A build as a command line of TensorRT's own tool (`trtexec_command`), for builds on other machines."""

from __future__ import annotations

import shlex
from typing import Final

from ..engines.api import flavor_of
from .plan import BuildPlan
from .profiles import Profile

_SHAPE_OPTIONS: Final = ("--minShapes", "--optShapes", "--maxShapes")


def trtexec_command(plan: BuildPlan, engine: str) -> list[str]:
    """The words of the command.

    Args:
        plan: the build. Plugins in Python cannot be used from the command line: the command contains the plan's C++
            library, or a placeholder for it.
        engine: the engine's file.

    Flags are those of NVIDIA's documentation of trtexec (TensorRT 10.7 to 11) and of tensorrt_rtx (TensorRT-RTX 1.4
    and later).
    """
    options, flavor = plan.options, flavor_of(plan.options.runtime)
    words = [flavor.tool, f"--onnx={plan.network.path}", f"--saveEngine={engine}", "--skipInference"]
    if not flavor.architectures:
        words.append("--stronglyTyped")  # TensorRT 11 always builds so, and accepts the flag
    several = len(plan.profiles) > 1
    for number, profile in enumerate(plan.profiles):
        if several:
            words.append(f"--profile={number}")
        words += _shapes(profile)
    if plan.plugin.kind != "none":
        words.append(f"--dynamicPlugins={plan.plugin.library or LIBRARY_PLACE}")
    if options.workspace is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace}M")
    if flavor.architectures:
        words.append("--computeCapabilities=" + ",".join(map(str, plan.architectures)))
    if options.version_compatible:
        words.append("--versionCompatible")
    if options.refit:
        words.append("--refit")
    if options.timing_cache is not None:
        words.append(f"--timingCacheFile={options.timing_cache}")
    words.append("--profilingVerbosity=detailed")
    return words


# The placeholder for a library that is not built yet: the shell replaces it.
LIBRARY_PLACE: Final = "$(rmsnorm plugin path)"


def shell_line(words: list[str]) -> str:
    """The words as one line for a shell, which replaces the placeholder of the library."""
    return " ".join(
        shlex.quote(word) if LIBRARY_PLACE not in word else word.replace(LIBRARY_PLACE, f'"{LIBRARY_PLACE}"')
        for word in words
    )


def _shapes(profile: Profile) -> list[str]:
    found = []
    for index, option in enumerate(_SHAPE_OPTIONS):
        shapes = ",".join(
            f"{_quoted(name)}:{'x'.join(map(str, three[index])) or '1'}" for name, three in profile.shapes.items()
        )
        found.append(f"{option}={shapes}")
    return found


def _quoted(name: str) -> str:
    """The name, in quotes if it contains a separator of names and shapes."""
    return f"'{name}'" if ":" in name or "," in name else name
