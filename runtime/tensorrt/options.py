"""The options of a build (`BuildOptions`), shared by the command line, Python, the worker and the engine's record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...models.errors import UsageError
from ...plugins.tensorrt.images import known_architectures
from ..engines.api import RuntimeName, flavor_of

NormChoice = Literal["auto", "plugin", "native"]
PluginChoice = Literal["auto", "library", "python"]
NORM_CHOICES: tuple[NormChoice, ...] = get_args(NormChoice)
PLUGIN_CHOICES: tuple[PluginChoice, ...] = get_args(PluginChoice)
# TensorRT takes the number of bytes as a signed integer of 64 bits.
_MOST_MIB = (1 << 43) - 1


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        runtime: `tensorrt` or `rtx`.
        profiles: one text for each optimization profile, or a single text; empty for default ranges. See
            `runtime/tensorrt/profiles.py`.
        norm: `plugin` runs every norm in the plugin, `native` none, `auto` the norms that are plugin nodes in the file.
        plugin: `library` (the C++ library), `python` (the plugins in Python), or `auto` (the library if it exists).
        plugin_library: the library's file; None for the one that `rmsnorm plugin path` prints.
        architectures: compute capabilities, as 89, `sm_89` or `8.9`; empty for the local GPU, or for the default
            architectures of TensorRT-RTX.
        timing_cache: a file of kernel timings that the full TensorRT reads and writes, or None.
        workspace: maximum memory that one layer may use while it runs, in MiB; None for TensorRT's own limit.
        memory_limit: maximum memory of the builder, in MiB, beyond which it is terminated; None for no limit.
        float64_as_float32: accept a file with float64 values, which TensorRT computes in float32.
        version_compatible: build an engine that later versions of TensorRT can load too.
        refit: build an engine whose weights can be replaced.
        verbose: write every message of TensorRT to the log.

    Raises:
        UsageError: a value is invalid.
    """

    runtime: RuntimeName = "rtx"
    profiles: tuple[str, ...] = ()
    norm: NormChoice = "auto"
    plugin: PluginChoice = "auto"
    plugin_library: str | None = None
    architectures: tuple[int, ...] = ()
    timing_cache: str | None = None
    workspace: int | None = None
    memory_limit: int | None = None
    float64_as_float32: bool = False
    version_compatible: bool = False
    refit: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        flavor_of(self.runtime)
        profiles = (self.profiles,) if isinstance(self.profiles, str) else tuple(self.profiles)
        object.__setattr__(self, "profiles", profiles)
        wanted = (self.architectures,) if isinstance(self.architectures, str | int) else self.architectures
        object.__setattr__(self, "architectures", known_architectures([str(number) for number in wanted]))
        for name, allowed in (("norm", NORM_CHOICES), ("plugin", PLUGIN_CHOICES)):
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}.")
        for name in ("workspace", "memory_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: expected at least 1 MiB, got {value}.")
            if value is not None and value > _MOST_MIB:
                raise UsageError(f"{name}: expected at most {_MOST_MIB} MiB, got {value}.")

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values, with lists in place of tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
