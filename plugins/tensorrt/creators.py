"""The TensorRT plugins in Python, for a machine without the C++ library. Running an engine with them requires a GPU.

TensorRT holds no references to Python objects, and an exception in some of these methods ends the process or leaves an
engine without the plugin's fields. Therefore every object is kept until the process ends, `create_plugin` checks all
values (its exception becomes a parser error), and the other methods record errors in `Plugins.problems` and return a
value with which the build fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...models.errors import RmsnormDeployError, UsageError
from ...plugins import contract
from .images import KernelImages, compile_images, kernel_of, unpack
from .launcher import Launcher, cuda_driver


class Plugins:
    """The creators of all operators, registered in one plugin registry.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        architectures: compute capabilities to compile kernels for, without the point.
        driver: returns `cuda.bindings.driver`; called at the first launch of a kernel.
        without_kernels: do not serialize kernels, for tests and for machines without NVRTC.

    Attributes:
        problems: errors in methods that must not raise.
        images: the compiled kernels, by operator, dtype, width and attributes.
        packed: the same as bytes, which all plugins share: TensorRT configures each plugin thousands of times.
    """

    def __init__(
        self,
        trt: Any,
        architectures: tuple[int, ...],
        driver: Callable[[], Any] = cuda_driver,
        without_kernels: bool = False,
    ) -> None:
        self.trt = trt
        self.architectures = architectures
        self.driver = driver
        self.without_kernels = without_kernels
        self.problems: list[str] = []
        self.images: dict[tuple[Any, ...], KernelImages] = {}
        self.packed: dict[tuple[Any, ...], bytes] = {}
        self.kept: list[Any] = []
        self.types = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}
        self.quant_types = {contract.QUANT_TYPES["int8"]: trt.int8, contract.QUANT_TYPES["float8_e4m3"]: trt.fp8}
        creator_class = _creator_class(trt)
        self.creators = [creator_class(self, name) for name in contract.INPUTS]

    def register(self) -> None:
        """Register the creators in the plugin registry.

        Raises:
            RmsnormDeployError: creators of the same name are registered already.
        """
        registry = self.trt.get_plugin_registry()
        for creator in self.creators:
            if not registry.register_creator(creator, contract.PLUGIN_NAMESPACE):
                raise RmsnormDeployError(
                    f"TensorRT's registry refused {creator.name}: another creator of namespace "
                    f"{contract.PLUGIN_NAMESPACE}, version {contract.PLUGIN_VERSION} is registered already."
                )

    def compiled(self, name: str, dtype: str, width: int, values: Mapping[str, float | int]) -> bytes:
        """The packed kernels of a norm, compiled once for equal norms."""
        key = (name, dtype, width, *sorted(values.items()))
        if key not in self.images:
            quant_type = int(values["quant_type"]) if name in contract.UNQUANTIZED else None
            kernel = kernel_of(
                name, dtype, width, values["epsilon"], values["scale_offset"], int(values["scale_type"]), quant_type
            )
            self.images[key] = compile_images(kernel, self.architectures)
            self.packed[key] = self.images[key].pack()
        return self.packed[key]

    def report(self) -> list[dict[str, Any]]:
        """The compiled kernels as JSON: operator, width, dtype, dtype of a quantized y, architectures, bytes."""
        names = {number: name for name, number in contract.QUANT_TYPES.items()}
        return [
            {
                "operator": name,
                "width": width,
                "dtype": dtype,
                **({"quantized": names[images.quant_type]} if images.quant_type else {}),
                "architectures": images.architectures,
                "bytes": len(self.packed[key]),
            }
            for key, images in self.images.items()
            for name, dtype, width, *_ in [key]
        ]


def read_fields(
    op_type: str, fields: Any, runtime: bool, where: str = ""
) -> tuple[dict[str, float | int], bytes | None]:
    """The values of a plugin's fields, and the packed kernels or None.

    Args:
        op_type: the operator.
        fields: a `PluginFieldCollection`.
        runtime: whether the fields are read from an engine, which must have kernels.
        where: the node's name for messages; empty for the operator's name.

    Raises:
        UsageError: a value is missing or violates the contract.
    """
    kinds = contract.OPERATOR_ATTRIBUTES[op_type]
    values: dict[str, float | int] = {}
    kernels = None
    for field in fields:
        if field.name == contract.KERNELS_FIELD:
            kernels = np.asarray(field.data).tobytes()
        elif field.name in kinds:
            (value,) = np.asarray(field.data).reshape(-1)[:1]
            values[field.name] = float(value) if kinds[field.name] == "FLOAT" else int(value)
    problems = contract.attribute_problems(values, op_type)
    if runtime and kernels is None:
        problems.append(f"field {contract.KERNELS_FIELD} is missing, so the engine has no kernel")
    if problems:
        raise UsageError(f"{where or op_type}: {'; '.join(problems)}.")
    return values, kernels


def _creator_class(trt: Any) -> Any:
    """The class of the creators; it and the class of the plugins are derived from classes of `trt`."""

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        """One norm; clones share everything except what depends on the current shapes."""

        def __init__(self, owner: Plugins, name: str, values: dict[str, float | int], kernels: bytes | None) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.owner, self.name, self.values, self.kernels = owner, name, values, kernels
            self.plugin_name, self.plugin_version = name, contract.PLUGIN_VERSION
            self.plugin_namespace = contract.PLUGIN_NAMESPACE
            self.num_outputs = len(contract.OUTPUTS[name])
            self.is_quantized = name in contract.UNQUANTIZED
            self.timing_cache_id = "-".join(f"{value:g}" for _, value in sorted(values.items()))
            self._launcher: Launcher | None = None
            self._fields: list[Any] = []
            owner.kept.append(self)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.owner, self.name, self.values, self.kernels)

        # Build

        def get_output_data_types(self, input_types: list[Any]) -> list[Any]:
            first = self.owner.quant_types[int(self.values["quant_type"])] if self.is_quantized else input_types[0]
            return [first, *[input_types[0]] * (self.num_outputs - 1)]

        def get_output_shapes(self, inputs: list[Any], shape_inputs: list[Any], expressions: Any) -> list[Any]:
            return [trt.DimsExprs(inputs[0]) for _ in range(self.num_outputs)]

        def supports_format_combination(self, position: int, tensors: list[Any], inputs: int) -> bool:
            described, first = tensors[position].desc, tensors[0].desc
            if described.format != trt.TensorFormat.LINEAR:
                return False
            if self.is_quantized and position == inputs - 1:  # y_scale
                return bool(described.type == trt.float32)
            if self.is_quantized and position == inputs:  # y
                return bool(described.type == self.owner.quant_types[int(self.values["quant_type"])])
            if described.type not in self.owner.types:
                return False
            if position == 0:
                allowed = contract.scale_type_problem(int(self.values["scale_type"]), self.owner.types[described.type])
                return allowed is None
            return bool(described.type == first.type)

        def configure_plugin(self, inputs: list[Any], outputs: list[Any]) -> None:
            """Compile the kernels. TensorRT calls this thousands of times; equal norms are compiled once."""
            described = inputs[0].desc
            width = list(described.dims)[-1]
            if width < 1:
                self._failed(f"width of x: expected a static width when the engine is built, got {width}")
                return
            if self.owner.without_kernels:
                return
            try:
                self.kernels = self.owner.compiled(self.name, self.owner.types[described.type], width, self.values)
            except RmsnormDeployError as error:
                self._failed(str(error))

        def get_workspace_size(self, inputs: list[Any], outputs: list[Any]) -> int:
            return 0

        def get_valid_tactics(self) -> list[int]:
            return []

        # Run

        def set_tactic(self, tactic: int) -> None:
            return None

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def on_shape_change(self, inputs: list[Any], outputs: list[Any]) -> None:
            return None

        def get_fields_to_serialize(self) -> Any:
            arrays = {
                name: np.array([self.values[name]], np.float32 if kind == "FLOAT" else np.int32)
                for name, kind in contract.OPERATOR_ATTRIBUTES[self.name].items()
            }
            kinds = {
                name: getattr(trt.PluginFieldType, contract.FIELD_TYPES[kind])
                for name, kind in contract.OPERATOR_ATTRIBUTES[self.name].items()
            }
            if self.kernels is not None:
                arrays[contract.KERNELS_FIELD] = np.frombuffer(self.kernels, np.int8)
                kinds[contract.KERNELS_FIELD] = trt.PluginFieldType.INT8
            self._fields = [arrays, [trt.PluginField(name, array, kinds[name]) for name, array in arrays.items()]]
            return trt.PluginFieldCollection(self._fields[1])

        def enqueue(
            self,
            input_desc: list[Any],
            output_desc: list[Any],
            inputs: list[int],
            outputs: list[int],
            workspace: int,
            stream: int,
        ) -> None:
            if self._launcher is None:
                if self.kernels is None:
                    raise RmsnormDeployError(f"{self.name}: the engine has no kernel. Build it again.")
                images = unpack(self.kernels)
                if images.quant_type != self.values.get("quant_type", 0):
                    raise RmsnormDeployError(f"{self.name}: the engine's kernels are for another quantized data type.")
                self._launcher = Launcher(images, contract.KERNEL_OPS[self.name], self.owner.driver())
            rows = math.prod(list(input_desc[0].dims)[:-1])
            self._launcher.launch([*inputs, *outputs], len(inputs), rows, stream)

        def _failed(self, problem: str) -> None:
            text = f"{self.name}: {problem}"
            if text not in self.owner.problems:
                self.owner.problems.append(text)

    class Creator(trt.IPluginCreatorV3One):
        """Creates the plugins of one operator, from a node's attributes or an engine's fields."""

        def __init__(self, owner: Plugins, name: str) -> None:
            super().__init__()
            self.owner, self.name = owner, name
            self.plugin_version, self.plugin_namespace = contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE
            # The attributes that the parser reads; the kernels are a field of serialized plugins only.
            self._fields = [
                trt.PluginField(field, np.array([]), getattr(trt.PluginFieldType, contract.FIELD_TYPES[kind]))
                for field, kind in contract.OPERATOR_ATTRIBUTES[name].items()
            ]
            self.field_names = trt.PluginFieldCollection(self._fields)

        def create_plugin(self, node: str, fields: Any, phase: Any) -> Any:
            """Create a plugin. `node` is the ONNX node's name in parsing, and the operator's name in an engine."""
            where = self.name if node == self.name else f"{node} ({self.name})"
            try:
                values, kernels = read_fields(self.name, fields, phase == trt.TensorRTPhase.RUNTIME, where)
            except UsageError as error:
                self.owner.problems.append(str(error))
                raise
            return Plugin(self.owner, self.name, values, kernels)

    return Creator
