"""The quick plugins in the real registry and the real `tensorrt.plugin` of `lean_tensorrt.py`, as JSON.

Without a builder there are no expressions of dims. Those here stand in for them: `IDimensionExpr`, `DimsExprs` and
`ISymExpr` are replaced before `tensorrt.plugin` is imported, which computes with them as it does with the real ones.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

FILE: Final = str(Path(__file__))
NAMESPACE: Final = "rmsnorm_deploy"
ARCHITECTURE: Final = 90
# Dims of x before the last: dynamic ones are names, whose values are given where an expression is computed.
DIMS: Final = ("batch", 3)
BATCHES: Final = (0, 1, 2, 300)
# That of `helpers/plugins/kernel_cases.py`.
EPSILON: Final = 1e-6
# Operator, dtype, width, scale_offset and scale_type; the last width is one that clusters would read.
CASES: Final = (
    ("RMSNorm", "float32", 64, 0.0, 1),
    ("RMSNorm", "float16", 1000, 1.0, 10),
    ("RMSNorm", "bfloat16", 4096, 0.0, 1),
    ("AddRMSNorm", "float32", 1000, 1.0, 1),
    ("AddRMSNorm", "float16", 64, 0.0, 1),
    ("AddRMSNorm", "bfloat16", 32768, 1.0, 16),
)
# Grid, block and shared memory.
LAUNCH: Final = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")


class Expression:
    """A dim: a number, a name, or an operation on two others."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return isinstance(self.value, int)

    def get_constant_value(self) -> int:
        return self.value

    def at(self, **values: int) -> int:
        if isinstance(self.value, tuple):
            kind, *parts = self.value
            first, second = (part.at(**values) for part in parts)
            return {
                "PROD": first * second, "SUM": first + second, "MAX": max(first, second),
                "CEIL_DIV": -(-first // (second or 1)),
            }[kind]  # fmt: skip
        return self.value if self.is_constant() else values[self.value]


class Symbol:
    """An argument of a kernel: an expression with its types."""

    type: Any
    dtype: Any
    expr: Expression


def plugins_of(trt: Any) -> Any:
    """`tensorrt.plugin`, imported after its expressions of dims are replaced."""
    trt.IDimensionExpr, trt.ISymExpr, trt.DimsExprs = Expression, Symbol, lambda length: [None] * length
    sys.modules["tensorrt"] = trt
    import tensorrt_bindings.plugin as trtp

    sys.modules["tensorrt.plugin"] = trtp
    return trtp


class Attempt:
    """One plugin of a network, taken through the calls of a build."""

    def __init__(self, trt: Any, name: str, values: dict[str, Any], request: Any = None) -> None:
        import numpy as np

        self.trt = trt
        # As the parser makes them of the node's attributes.
        arrays = [np.array([value], np.float32 if isinstance(value, float) else np.int32) for value in values.values()]
        kinds = [getattr(trt.PluginFieldType, str(array.dtype).upper()) for array in arrays]
        fields = [trt.PluginField(*row) for row in zip(values, arrays, kinds, strict=True)]
        self.kept = (arrays, fields, trt.PluginFieldCollection(fields))
        creator = trt.get_plugin_registry().get_creator(name, "1", NAMESPACE)
        request = trt.QuickPluginCreationRequest.UNKNOWN if request is None else request
        self.plugin = creator.create_plugin(name, NAMESPACE, self.kept[-1], trt.TensorRTPhase.BUILD, request)
        self.inputs = {"RMSNorm": 2, "AddRMSNorm": 3}[name]

    def shape(self, dtype: Any, width: Any, scale_width: int = 0) -> tuple[list[str], list[list[int]]]:
        """Dtypes and shapes of the outputs for an x of [batch, 3, width], the shapes with a batch of 2."""
        self.builder = SimpleNamespace(
            constant=Expression, operation=lambda kind, first, second: Expression((kind.name, first, second))
        )
        dims = [Expression(dim) for dim in (*DIMS, width)]
        shapes = [*[dims] * (self.inputs - 1), [Expression(scale_width)] if scale_width else dims[-1:]]
        types = self.plugin.get_output_data_types([dtype] * self.inputs, [len(shape) for shape in shapes])
        outputs = self.plugin.get_output_shapes(shapes, [], self.builder)
        self.descriptions = [
            self._described(dtype, [dim.value if dim.is_constant() else -1 for dim in shape])
            for shape in [*shapes, *outputs]
        ]
        return [kind.name for kind in types], [[dim.at(batch=2, width=0) for dim in shape] for shape in outputs]

    def _described(self, dtype: Any, dims: list[int]) -> Any:
        dynamic = self.trt.DynamicPluginTensorDesc()
        inner = dynamic.desc
        inner.type, inner.format, inner.dims = dtype, self.trt.TensorFormat.LINEAR, self.trt.Dims(dims)
        dynamic.desc = inner
        return dynamic

    def combinations(self) -> list[list[str]]:
        """Dtype and format of all inputs and outputs together, for each combination."""
        found = self.plugin.get_supported_format_combinations(self.descriptions, self.inputs)
        rows = [f"{tensor.type.name} {tensor.format.name}" for tensor in found]
        size = len(self.descriptions)
        return [rows[begin : begin + size] for begin in range(0, len(rows), size)]

    def tactics(self) -> list[int]:
        self.plugin.configure_plugin(self.descriptions[: self.inputs], self.descriptions[self.inputs :])
        return self.plugin.get_valid_tactics()

    def kernel(self, tactic: int) -> dict[str, Any]:
        """Launch, arguments and image of the kernel."""
        copy = self.plugin.clone()
        copy.set_tactic(tactic)
        launch, symbols = SimpleNamespace(), _Symbols()
        copy.get_launch_params(None, self.descriptions, self.inputs, launch, symbols, self.builder)
        tensors = [tensor.desc for tensor in self.descriptions]
        name, image = copy.get_kernel(tensors[: self.inputs], tensors[self.inputs :])
        arguments = [symbols[place] for place in range(symbols.nbSymExprs)]
        return {
            "name": name,
            "image": base64.b64encode(image).decode(),
            "launch": {
                batch: {part: getattr(launch, part).expr.at(batch=batch) for part in LAUNCH} for batch in BATCHES
            },
            "arguments": {batch: [argument.expr.at(batch=batch) for argument in arguments] for batch in BATCHES},
            "argument_types": [f"{argument.type.name} {argument.dtype.name}" for argument in arguments],
        }


class _Symbols(dict[int, Any]):
    nbSymExprs = 0  # noqa: N815


def message(call: Any) -> str | None:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def values_of(scale_offset: float = 0.0, scale_type: int = 1) -> dict[str, Any]:
    return {"epsilon": EPSILON, "scale_offset": scale_offset, "scale_type": scale_type}


def kernels(trt: Any) -> list[dict[str, Any]]:
    """What the plugins of `CASES` say while an engine is built."""
    plugins_of(trt)
    from rmsnorm_deploy.plugins.tensorrt.quick import register_quick_plugins

    register_quick_plugins(architecture=ARCHITECTURE)
    rows = []
    for name, dtype, width, *attributes in CASES:
        attempt = Attempt(trt, name, values_of(*attributes))
        types, shapes = attempt.shape(getattr(trt, dtype), width)
        rows.append({"types": types, "shapes": shapes, "combinations": attempt.combinations()})
        tactics = attempt.tactics()
        rows[-1] |= {"tactics": tactics, "kernels": [attempt.kernel(tactic) for tactic in tactics]}
    return rows


def registration(trt: Any) -> dict[str, Any]:
    """What the registry has, which requests it creates plugins for, and what is refused."""
    trtp = plugins_of(trt)
    from rmsnorm_deploy.plugins.tensorrt.creators import Plugins
    from rmsnorm_deploy.plugins.tensorrt.quick import register_quick_plugins as register

    def keys() -> list[list[str]]:
        found = [[c.name, c.plugin_version, c.plugin_namespace] for c in trt.get_plugin_registry().all_creators]
        return sorted(row for row in found if row[2])

    module = register(architecture=ARCHITECTURE)
    requests = {}
    for request in ("UNKNOWN", "PREFER_AOT", "PREFER_JIT", "STRICT_AOT", "STRICT_JIT"):
        member = getattr(trt.QuickPluginCreationRequest, request)
        for name in ("RMSNorm", "AddRMSNorm"):
            made: list[Any] = []
            failed = message(lambda: made.append(Attempt(trt, name, values_of(), member).plugin))  # noqa: B023
            requests[f"{name} {request}"] = failed or isinstance(made[0], trt.IPluginV3QuickAOTBuild)
    fields = {
        name: [field.name for field in trt.get_plugin_registry().get_creator(name, "1", NAMESPACE).field_names]
        for name in ("RMSNorm", "AddRMSNorm")
    }
    out = {
        "keys": keys(),
        "fields": fields,
        "requests": requests,
        "again": register(architecture=ARCHITECTURE) is module is getattr(trtp.op, NAMESPACE),
        "refused": {
            "other target": message(lambda: register(architecture=80)),
            "creators behind": message(Plugins(trt, (86,)).register),
            **{name: message(lambda: register(name)) for name in ("trt", "a.b", "")},  # noqa: B023
        },
    }  # fmt: skip
    wrong = {
        "dynamic width": ("RMSNorm", "float32", "width", 0.0, 1), "dtype": ("RMSNorm", "int8", 64, 0.0, 1),
        "scale_offset": ("RMSNorm", "float16", 64, 0.5, 1), "scale_type": ("AddRMSNorm", "float16", 64, 0.0, 16),
        "width of the scale": ("AddRMSNorm", "float16", 64, 0.0, 1),
    }  # fmt: skip
    for what, (name, dtype, width, *attributes) in wrong.items():
        attempt = Attempt(trt, name, values_of(*attributes))
        attempt.shape(getattr(trt, dtype), width, 32 if what == "width of the scale" else 0)
        out["refused"][what] = message(lambda: attempt.kernel(1))  # noqa: B023
    register("second", architecture=80, kind="cubin")
    return {**out, "both": keys()}


def registration_behind_others(trt: Any) -> dict[str, Any]:
    """Where the creators in Python are registered first."""
    plugins_of(trt)
    from rmsnorm_deploy.plugins.tensorrt.creators import Plugins
    from rmsnorm_deploy.plugins.tensorrt.quick import register_quick_plugins

    Plugins(trt, (86,), without_kernels=True).register()
    return {
        "refused": message(register_quick_plugins),
        "second": message(lambda: register_quick_plugins("second").RMSNorm),
    }


def file(trt: Any) -> list[list[Any]]:
    """What becomes of the norms of the ONNX file MODEL: operator, kernel's name and number of its arguments."""
    import onnx
    from onnx import helper

    plugins_of(trt)
    from rmsnorm_deploy.plugins.tensorrt.quick import register_quick_plugins

    register_quick_plugins(architecture=ARCHITECTURE)
    graph = onnx.load(os.environ["MODEL"]).graph
    weights, rows = {weight.name: weight for weight in graph.initializer}, []
    for node in graph.node:
        values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        version, namespace = (values.get(f"plugin_{name}", b"").decode() for name in ("version", "namespace"))
        creator = trt.get_plugin_registry().get_creator(node.op_type, version, namespace) if namespace else None
        if creator is None:
            continue
        # As the parser does: the attributes that the creator knows, in its order.
        attempt = Attempt(trt, node.op_type, {field.name: values[field.name] for field in creator.field_names})
        assert attempt.inputs == len(node.input)
        weight = weights[node.input[-1]]
        assert weight.data_type == onnx.TensorProto.FLOAT16
        types, _ = attempt.shape(trt.float16, weight.dims[0])
        assert len(types) == len(node.output)
        kernel = attempt.kernel(1)
        rows.append([node.op_type, kernel["name"], len(node.input) + len(kernel["argument_types"]) + len(types)])
    return rows


TASKS: Final = {
    task.__name__: task for task in (kernels, registration, registration_behind_others, file)
}  # fmt: skip

if __name__ == "__main__":
    import importlib

    print(json.dumps(TASKS[sys.argv[2]](importlib.import_module(sys.argv[1]))), flush=True)
