"""An engine of TensorRT with the quick deployable plugins of `plugins/tensorrt/quick.py`, built in another process.

A process has one plugin registry, and the quick plugins have the names of the C++ library's. The engine carries its
kernels, so that the process that runs it registers nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from rmsnorm_deploy.models.errors import RmsnormDeployError
from rmsnorm_deploy.plugins.tensorrt.quick import register_quick_plugins
from rmsnorm_deploy.runtime.engines.api import Api
from rmsnorm_deploy.runtime.engines.messages import logger_class

from .products import ROOT

# Smallest, usual and largest batch and length of every input.
QUICK_PROFILE: Final = ((1, 1), (1, 8), (8, 64))
_SECONDS: Final = 240
_CALL: Final = "import sys; from benchmarks.tensorrt_check.quick import build; build(*sys.argv[1:])"


def build_in_process(model: Path, engine: Path) -> dict[str, Any]:
    """Build in a process of its own; the messages are in `engine.log` beside the engine.

    Raises:
        RmsnormDeployError: it failed; the message has the last lines of its output.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CALL, str(model), str(engine)], cwd=ROOT, capture_output=True, text=True,
        timeout=_SECONDS, check=False,
    )  # fmt: skip
    log = engine.with_name(engine.name + ".log")
    log.write_text(f"{done.stdout}\n{done.stderr}", encoding="utf-8")
    if done.returncode != 0:
        last = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise RmsnormDeployError(f"building with quick plugins ended with exit code {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def build(model: str, engine: str) -> None:
    """Build an engine of a file of target `plugin` whose inputs are `[batch, length]`; the last line is JSON.

    Raises:
        RmsnormDeployError: TensorRT refused the file or returned no engine.
    """
    api = Api("tensorrt")
    trt = api.trt
    register_quick_plugins()
    logger: Any = logger_class(trt)(print)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    began = time.perf_counter()
    if not parser.parse(Path(model).read_bytes(), model):
        problems = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise RmsnormDeployError(f"{model}: TensorRT's parser rejects it: {'; '.join(problems)}")
    parsed = time.perf_counter()
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        profile.set_shape(network.get_input(index).name, *QUICK_PROFILE)
    if config.add_optimization_profile(profile) < 0:
        raise RmsnormDeployError(f"{model}: TensorRT refuses the profile {QUICK_PROFILE}.")
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise RmsnormDeployError(f"{model}: the builder returned no engine: {'; '.join(list(logger.errors)[-3:])}")
    Path(engine).write_bytes(bytes(memoryview(serialized)))
    found = {
        "version": api.version,
        "plugin_layers": sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers),
        "seconds": {"parse": round(parsed - began, 3), "build": round(time.perf_counter() - parsed, 3)},
    }
    print(json.dumps(found), flush=True)


def network_flags(trt: Any) -> int:
    """Strongly typed where that is a choice, with kernels compiled ahead of time."""
    kinds, flags = trt.NetworkDefinitionCreationFlag, 0
    for name in ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS"):
        if hasattr(kinds, name):
            flags |= 1 << int(getattr(kinds, name))
    return flags
