"""The process in which TensorRT parses and builds: `python -m rmsnorm_deploy.runtime.tensorrt.worker FOLDER`.

The builder may end its process, ignore Ctrl-C, or be killed because of its memory. In a separate process, that is only
an error message for the process that started it. `FOLDER/request.json` is the request; `FOLDER/engine` and
`FOLDER/result.json` are the result. Standard output and error are the build's log; progress is written to the file
descriptor that the request names, one JSON object per line.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ...export.lowering.attention_writer import decompose_operators, has_operators
from ...export.lowering.plugin_functions import FUNCTION_NODE_PREFIXES
from ...export.lowering.rotary import decompose_rotary, has_rotary
from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError, UsageError
from ...plugins import contract
from ...plugins.tensorrt import library as plugin_library
from ..engines.api import Api
from ..engines.messages import logger_class
from ..engines.plugin_creators import creator_key, load_library
from .layers import LOG_BEGINS, Layer, NormDtypes, Source, layers_of_inspector, layers_of_log, nodes_of, norm_layers
from .network import FileNorm

REQUEST, RESULT, ENGINE, LOG = "request.json", "result.json", "engine", "build.log"
# A warning for every file with token ids.
_EXPECTED_WARNING: Final = "has Int64 binding"
# A warning for every file whose local functions run several norms: the parser identifies nodes by name only, and a node
# in a function has one name for all calls. Measured with TensorRT-RTX 1.7: nodes without names, unique node names,
# and one overload of the function for each call all give the warning. Only functions with different names avoid it, and
# then no plugin is found. The warning is harmless: this module does not look up a node's outputs in the parser.
_REPEATED_NODE: Final = tuple(f"A node named {prefix}" for prefix in FUNCTION_NODE_PREFIXES.values())
_PR_SET_PDEATHSIG: Final = 1


def main(folder: Path) -> int:
    """Execute the request in `folder`; returns 0, or 1 with the error in the result."""
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    _die_with_parent(request["parent"])
    faulthandler.enable()  # a crash in TensorRT or in a plugin leaves the call that led to it in the log
    try:
        result = _Build(request, folder).run()
    except RmsnormDeployError as error:
        result = {"error": {"kind": type(error).__name__, "message": str(error)}}
    except Exception as error:
        import traceback

        traceback.print_exc()
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        result = {"error": {"kind": "RmsnormDeployError", "message": message}}
    partial = folder / f"{RESULT}.partial"
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.rename(folder / RESULT)
    return 1 if "error" in result else 0


def _die_with_parent(parent: int) -> None:
    """End this process if its parent is killed.

    A parent with process id 1 does not mean that: it is the parent in a container that was started for one build.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that requested this build has ended.")


class _Build:
    """One build, step by step."""

    def __init__(self, request: dict[str, Any], folder: Path) -> None:
        self.request, self.folder = request, folder
        self.options: dict[str, Any] = request["options"]
        self.norms = [FileNorm(**{**row, "nodes": frozenset(row["nodes"])}) for row in request["norms"]]
        self.api = Api(self.options["runtime"])
        self.trt = self.api.trt
        self.logger: Any = logger_class(self.trt)(_print_now, self.options["verbose"], LOG_BEGINS)
        self.events = os.fdopen(request["events"], "w", encoding="utf-8") if request["events"] is not None else None
        self.plugins: Any = None

    def run(self) -> dict[str, Any]:
        trt, api = self.trt, self.api
        self._register_plugins()
        builder = trt.Builder(self.logger)
        network = api.network(builder)
        parser = trt.OnnxParser(network, self.logger)
        began = time.monotonic()
        self._tell("parsing")
        self._parse(parser, network)
        plugin_layers = self._check_plugins(network)
        dtypes = self._dtypes(network)
        parsed = time.monotonic()
        config = self._config(builder, network)
        serialized = builder.build_serialized_network(network, config)
        problems = self._problems()
        if serialized is None or problems:
            raise RmsnormDeployError(self._failure("the builder returned no engine", problems))
        built = time.monotonic()
        self._save_timings(config)
        with (self.folder / ENGINE).open("wb") as file:
            file.write(serialized)
        layers, source = self._layers()
        rows = norm_layers(self.norms, layers, dtypes)
        return {
            "version": api.version,
            "plugin_layers": plugin_layers,
            "norms": [row.to_dict() for row in rows],
            "layers": len(layers),
            "layer_source": source,
            "kernels": self._kernels(),
            "warnings": [text for text in self.logger.warnings if not self._is_expected(text)],
            "parse_seconds": round(parsed - began, 3),
            "build_seconds": round(built - parsed, 3),
        }

    def _is_expected(self, warning: str) -> bool:
        """Whether a warning is harmless for this model."""
        if _EXPECTED_WARNING in warning:
            return True
        return self.options["norm"] == "native" and any(text in warning for text in _REPEATED_NODE)

    # Plugins

    def _register_plugins(self) -> None:
        plugin = self.request["plugin"]
        if plugin["kind"] == "python":
            from ...plugins.kernel.compiler import import_nvrtc
            from ...plugins.tensorrt.creators import Plugins

            import_nvrtc()  # fail with EnvironmentMissingError now, before the build
            self.plugins = Plugins(self.trt, tuple(self.request["architectures"]))
            self.plugins.register()
        elif plugin["kind"] == "library":
            load_library(self.trt, Path(plugin["library"]))

    def _kernels(self) -> list[dict[str, Any]]:
        if self.plugins is not None:
            return self.plugins.report()
        if self.request["plugin"]["kind"] == "library":
            return plugin_library.kernels_report(Path(self.request["plugin"]["library"]))
        return []

    def _problems(self) -> list[str]:
        if self.plugins is not None:
            return list(self.plugins.problems)
        if self.request["plugin"]["kind"] == "library":
            found = plugin_library.last_error(Path(self.request["plugin"]["library"]))
            return [found] if found else []
        return []

    # Parsing

    def _parse(self, parser: Any, network: Any) -> None:
        path = self.request["model"]
        parsed = parser.parse(_for_tensorrt(Path(path)), path)
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        if not parsed or errors:
            raise UnsupportedError(
                self._failure(f"{self.request['shown']}: TensorRT's parser rejects it", [*self._problems(), *errors])
            )
        if network.num_layers == 0:
            raise UsageError(f"{self.request['shown']}: TensorRT's parser found no layers; expected an ONNX model.")

    def _check_plugins(self, network: Any) -> int:
        """Compare the plugin layers with the file's nodes, because TensorRT falls back to local functions silently."""
        trt = self.trt
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        plugin_layers = [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
        expected: list[str] = self.request["plugin_nodes"]
        if self.request["plugin"]["kind"] == "none":
            return len(plugin_layers)
        names = {layer.name for layer in plugin_layers}
        ours = [layer for layer in plugin_layers if layer.name in expected or not all(expected)]
        lost = [name for name in expected if name and name not in names]
        if lost or len(ours) < len(expected):
            shown = ", ".join(lost[:5]) or "nodes without a name"
            raise UnsupportedError(
                f"{self.request['shown']}: the plugin runs {len(ours)} of {len(expected)} norms, and TensorRT would "
                f"use the local function for the others: {shown}. Its registry has {self._registered()}; expected "
                f"namespace {contract.PLUGIN_NAMESPACE!r}, version {contract.PLUGIN_VERSION!r}, and TensorRT 10.7 or "
                "later."
            )
        for layer in ours:
            problems = self._layer_problems(layer)
            if problems:
                raise UnsupportedError(f"{self.request['shown']}: {layer.name}: {'; '.join(problems)}.")
        return len(ours)

    def _registered(self) -> str:
        keys = [creator_key(c) for c in self.trt.get_plugin_registry().all_creators]
        ours = [
            f"{name} version {version} of namespace {space!r}"
            for name, version, space in keys
            if name in contract.INPUTS
        ]
        return ", ".join(ours) or f"no creator of {' or '.join(contract.QUANTIZED)}"

    def _layer_problems(self, layer: Any) -> list[str]:
        """The reasons why the plugin does not support a layer; an error during the build could end the process."""
        trt = self.trt
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        # An operator has a y_scale if its first output is quantized.
        y_scale = inputs.pop() if layer.get_output(0).dtype in (trt.int8, trt.fp8) else None
        x, scale = inputs[0], inputs[-1]
        problems = []
        if self.api.dtype_name(x.dtype) not in contract.DTYPES:
            problems.append(f"x: expected {', '.join(contract.DTYPES)}, got {x.dtype}")
        others = [tensor.name for tensor in inputs if tensor.dtype != x.dtype]
        if others:
            problems.append(f"expected inputs of one dtype, got another for {', '.join(others)}")
        if len(x.shape) < 1 or x.shape[-1] < 1:
            problems.append(
                f"x: expected a last dim that is known when the engine is built, got shape {tuple(x.shape)}"
            )
        elif tuple(scale.shape) != (x.shape[-1],):
            problems.append(f"scale: expected shape ({x.shape[-1]},), got {tuple(scale.shape)}")
        if y_scale is not None and y_scale.dtype != trt.float32:
            problems.append(f"y_scale: expected float32, got {y_scale.dtype}")
        if y_scale is not None and any(dim != 1 for dim in y_scale.shape):
            problems.append(f"y_scale: expected one element, got shape {tuple(y_scale.shape)}")
        if len(inputs) == 3 and tuple(inputs[1].shape) != tuple(x.shape):
            problems.append(f"residual: expected x's shape {tuple(x.shape)}, got {tuple(inputs[1].shape)}")
        return problems

    def _dtypes(self, network: Any) -> dict[str, NormDtypes]:
        """The dtypes of each norm's result and statistics in the strongly typed network."""
        trt = self.trt
        by_node = {node: norm for norm in self.norms for node in norm.nodes}
        results: dict[str, str] = {}
        statistics: dict[str, str] = {}
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            norms = [by_node[node] for node in nodes_of(layer.metadata) if node in by_node]
            if not norms or layer.num_outputs == 0:
                continue
            word = self.api.dtype_name(layer.get_output(0).dtype)
            for norm in norms:
                results[norm.path] = word  # the last layer's: layers are in the graph's order
                if layer.type in (trt.LayerType.REDUCE, trt.LayerType.NORMALIZATION):
                    statistics.setdefault(norm.path, word)
                elif norm.is_plugin and layer.type == trt.LayerType.PLUGIN_V3:
                    statistics[norm.path] = "float32"  # the kernel always computes them in float32
        return {path: NormDtypes(word, statistics.get(path)) for path, word in results.items()}

    # Building

    def _config(self, builder: Any, network: Any) -> Any:
        trt, api, options = self.trt, self.api, self.options
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        monitor = _monitor_class(trt)(self._tell)
        config.progress_monitor = monitor
        self._kept = monitor
        if options["workspace"] is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace"] << 20)
        if options["version_compatible"]:
            api.set_flag(config, "VERSION_COMPATIBLE")
        if options["refit"]:
            api.set_flag(config, "REFIT")
        api.set_architectures(config, self.request["architectures"])
        timings = options["timing_cache"]
        if timings is not None and api.has_timing_cache:
            content = Path(timings).read_bytes() if Path(timings).is_file() else b""
            config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)
        inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
        for number, profile in enumerate(self.request["profiles"]):
            self._add_profile(builder, config, inputs, profile, number)
        return config

    def _save_timings(self, config: Any) -> None:
        place = self.options["timing_cache"]
        cache = config.get_timing_cache() if place is not None and self.api.has_timing_cache else None
        if cache is None:
            return
        partial = Path(f"{place}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            file.write(cache.serialize())
        partial.replace(place)

    def _add_profile(
        self, builder: Any, config: Any, inputs: dict[str, Any], shapes: dict[str, Any], number: int
    ) -> None:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            if name not in inputs:
                raise UsageError(f"profile {number}: the network has no input {name!r}; it has {', '.join(inputs)}.")
            if inputs[name].is_shape_tensor:
                raise UnsupportedError(f"input {name} is a shape tensor, for which no profile can be made.")
            profile.set_shape(name, tuple(least), tuple(usual), tuple(most))
        dynamic = [name for name, tensor in inputs.items() if -1 in tuple(tensor.shape)]
        missing = [name for name in dynamic if name not in shapes]
        if missing:
            raise UsageError(f"profile {number}: no shapes for input {missing[0]}, whose dims are dynamic.")
        if config.add_optimization_profile(profile) < 0:
            # TensorRT reports wrong ranks and orders only here, by a negative number.
            raise UsageError(self._failure(f"profile {number}: TensorRT rejects the shapes {json.dumps(shapes)}", []))

    def _layers(self) -> tuple[list[Layer], Source]:
        if self.api.can_read_engines:
            runtime = self.trt.Runtime(self.logger)
            engine = runtime.deserialize_cuda_engine((self.folder / ENGINE).read_bytes())
            if engine is not None:
                inspector = engine.create_engine_inspector()
                return layers_of_inspector(
                    inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
                ), "inspector"
        return [layer for message in self.logger.kept for layer in layers_of_log(message)], "builder log"

    def _failure(self, what: str, causes: list[str]) -> str:
        """The text of an error with the known causes, or else the last errors of TensorRT's log."""
        causes = causes or list(self.logger.errors)[-5:]
        return f"{what}: {'; '.join(dict.fromkeys(causes))}" if causes else f"{what}, without a reason."

    def _tell(self, phase: str, step: int | None = None, steps: int | None = None) -> None:
        if self.events is not None:
            print(json.dumps({"phase": phase, "step": step, "steps": steps}), file=self.events, flush=True)


def _print_now(line: str) -> None:
    print(line, flush=True)


def _for_tensorrt(path: Path) -> bytes:
    """The bytes of a file, with primitives in place of operators that TensorRT builds only in part."""
    content = path.read_bytes()
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError:  # TensorRT's parser says what it finds
        return content
    if not (has_operators(model) or has_rotary(model)):
        return content
    graph = ir.from_proto(model)
    decompose_operators(graph)
    decompose_rotary(graph)
    return ir.to_proto(graph).SerializeToString()


def _parser_error(error: Any) -> str:
    name, operator = error.node_name(), error.node_operator()
    where = f"node {name or error.node()} ({operator}): " if operator else ""
    text = " ".join(error.desc().split())
    stack = [str(entry) for entry in error.local_function_stack()]
    inside = f" (inside {' > '.join(stack)})" if stack else ""
    return f"{where}{text}{inside}"


def _monitor_class(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Reports the progress of the build. It must not raise an exception, which would end the build."""

        def __init__(self, tell: Callable[[str, int | None, int | None], None]) -> None:
            super().__init__()
            self.tell = tell
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self.report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.report(phase_name, step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def report(self, phase: str, step: int) -> None:
            try:
                self.tell(phase, step, self.steps.get(phase))
            except OSError:  # the receiver has closed the pipe
                self.tell = lambda *_: None

    return Monitor


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise EnvironmentMissingError("worker: expected one argument, the folder of a request.")
    raise SystemExit(main(Path(sys.argv[1])))
