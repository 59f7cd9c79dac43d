"""What an engine is built with: the same for the command line, Python, the worker and the record beside the engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...models.errors import UsageError
from ...plugins.tensorrt.images import known_architectures
from .api import RuntimeName, flavor_of

NormChoice = Literal["auto", "plugin", "native"]
PluginChoice = Literal["auto", "library", "python"]
NORM_CHOICES: tuple[NormChoice, ...] = get_args(NormChoice)
PLUGIN_CHOICES: tuple[PluginChoice, ...] = get_args(PluginChoice)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        runtime: `tensorrt` or `rtx`.
        profiles: one text for each optimization profile, or a text for one; none for sensible ranges. See
            `runtime/tensorrt/profiles.py`.
        norm: `plugin` runs every norm in the plugin, `native` none, `auto` those that the file gives to the plugin.
        plugin: the C++ library, the plugins in Python, or the library where there is one.
        plugin_library: the library's file; None for the one that `rmsnorm plugin path` names.
        architectures: compute capabilities, as 89, `sm_89` or `8.9`; none for the GPU at hand, or with TensorRT-RTX for
            what it builds for by default.
        timing_cache: a file of kernel timings that the full TensorRT reads and writes; None for none.
        workspace: most memory that one layer may use while it runs, in MiB; None for TensorRT's own limit.
        memory_limit: most memory that the builder may use, in MiB; it is ended beyond. None for no limit.
        float64_as_float32: build a file with float64 values, which TensorRT computes in float32.
        version_compatible: an engine that later versions of TensorRT load too.
        refit: an engine whose weights can be replaced.
        verbose: keep every message of TensorRT in the log.

    Raises:
        UsageError: a value that is not one of these.
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

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON: with lists, as a record that was read has them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
