"""What this machine can export, build and run (`examine`): versions, providers, GPUs, and what each target lacks."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..export.lowering.table import TARGETS, Target
from ..models.versions import LIBRARIES, newer_than_tested, too_old
from ..plugins import contract
from .doctor_looks import PROVIDERS, is_compiled, look
from .doctor_records import Surroundings, Way
from .doctor_tensorrt import (
    GET_GPU,
    GET_TENSORRT_10,
    conflicts,
    gpu_rows,
    obstacles,
    product_ways,
    suited_target,
)

SCHEMA = "rmsnorm_deploy.doctor/2"

GET_ONNXRUNTIME = 'pip install "rmsnorm-deploy[cpu]"'
GET_ONNXRUNTIME_GPU = 'pip uninstall onnxruntime && pip install "rmsnorm-deploy[gpu]"'
GET_PACKAGE = "pip install rmsnorm-deploy"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found, and the possible uses of each target: export first, then build and run.

    Attributes:
        found: what was found.
        targets: the uses of each target.
        suited: the target that suits this machine, None if nothing can be exported.
        reason: why it does.
        warnings: packages that do not work together, and versions that are not supported.
    """

    found: Surroundings
    targets: dict[str, list[Way]]
    suited: str | None
    reason: str
    warnings: list[str]

    def can_run(self, target: str) -> bool:
        """Whether the target can be run here in any runtime."""
        runs = [way for way in self.targets[target] if way.name != "export" and not way.name.endswith(" build")]
        return any(way.possible for way in runs)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON values."""
        found, cuda = self.found, self.found.driver.cuda
        return {
            "schema": SCHEMA,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": found.versions,
            "gpus": found.gpus,
            "driver": {
                "version": found.driver.version,
                "cuda": None if cuda is None else ".".join(map(str, cuda)),
                "gpus": gpu_rows(found.driver),
            },
            "torch_cuda": found.torch_cuda,
            "onnxruntime": {
                "version": found.onnxruntime,
                "compiled_providers": found.compiled,
                "providers": {name: {"works": not why, "problem": why} for name, why in found.providers.items()},
            },
            "tensorrt": found.products["tensorrt"].to_dict(),
            "tensorrt_rtx": found.products["rtx"].to_dict(),
            "plugin": {
                "namespace": contract.PLUGIN_NAMESPACE,
                "version": contract.PLUGIN_VERSION,
                **asdict(found.plugin),
            },
            "suited": {"target": self.suited, "reason": self.reason},
            "targets": {
                name: {
                    "can_export": ways[0].possible,
                    "can_run": self.can_run(name),
                    "ways": [way.to_dict() for way in ways],
                }
                for name, ways in self.targets.items()
            },
            "warnings": self.warnings,
        }


def examine(progress: Progress | None = None) -> Diagnosis:
    """Examine this machine. Missing or broken packages are reported and do not raise an error.

    Args:
        progress: called with a line of text at each step.
    """
    return diagnose(look(progress))


def diagnose(found: Surroundings) -> Diagnosis:
    """The possible uses of each target, given what was found."""
    targets: dict[str, list[Way]] = {
        target: [
            _export_way(found),
            *(_onnxruntime_way(found, target, provider) for provider in PROVIDERS),
            *product_ways(found, target),
        ]
        for target in TARGETS
    }
    suited, reason = suited_target(found, targets)
    return Diagnosis(found, targets, suited, reason, _warnings(found))


def _export_way(found: Surroundings) -> Way:
    missing = [problem for problem in found.imports.values() if problem]
    return Way("export", missing, [GET_PACKAGE] if missing else [])


def _onnxruntime_way(found: Surroundings, target: Target, provider: str) -> Way:
    name = f"onnxruntime {provider}"
    outdated = obstacles(target, "onnxruntime", found.onnxruntime)
    get_build = GET_ONNXRUNTIME if provider == "cpu" else GET_ONNXRUNTIME_GPU
    if found.onnxruntime is None:
        return Way(name, [found.providers[provider]], [get_build])
    if outdated:
        return Way(name, outdated, [get_build])
    problem = found.providers[provider]
    if not problem:
        return Way(name)
    missing, get = [problem], []
    if provider != "cpu" and not found.gpus:
        missing.append("no NVIDIA GPU was found")
        get.append(GET_GPU)
    if not is_compiled(provider, found.compiled):
        get.append(get_build)
    if provider == "tensorrt":
        get.append(GET_TENSORRT_10)
    return Way(name, missing, get)


def _warnings(found: Surroundings) -> list[str]:
    warnings = conflicts(found)
    warnings += [f"{text}." for library in LIBRARIES if (text := too_old(library.distribution))]
    warnings += [f"{text}." for library in LIBRARIES if (text := newer_than_tested(library.distribution))]
    if not found.versions.get("transformers"):
        warnings.append('models of transformers cannot be loaded: pip install "rmsnorm-deploy[hf]"')
    return warnings
