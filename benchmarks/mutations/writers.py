"""Tools that write a fault-free file anew without changing what it computes (`WRITERS`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import onnx_ir as ir

Writer = Callable[[Path, Path], None]


def optimized(level: str) -> Writer:
    """The graph after ONNX Runtime's optimization of a level."""

    def write(source: Path, target: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 3
        content = onnx.load(source).SerializeToString()  # with the weights, which ONNX Runtime then writes too
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    return write


def slimmed(source: Path, target: Path) -> None:
    """The graph simplified by onnxslim."""
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), target)


def simplified(source: Path, target: Path) -> None:
    """The graph simplified by onnxsim."""
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(model, target)


def saved_by_onnx(source: Path, target: Path) -> None:
    """One file without external data."""
    onnx.save(onnx.load(source), target)


def saved_by_onnx_ir(source: Path, target: Path) -> None:
    """Read and written by onnx_ir, with all weights in one file of external data."""
    ir.save(ir.load(source), target, external_data="weights.bin")


def many_files(source: Path, target: Path) -> None:
    """Each weight in a file of its own."""
    onnx.save(onnx.load(source), target, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=64)


def inferred(source: Path, target: Path) -> None:
    """The shapes of all values written by onnx's shape inference."""
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(source), data_prop=True), target)


def raised_opset(source: Path, target: Path) -> None:
    """The next opset, by onnx's own converter, which knows neither ONNX Runtime's operators nor functions."""
    model = onnx.load(source)
    found = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    onnx.save(onnx.version_converter.convert_version(model, found + 1), target)


def renamed(source: Path, target: Path) -> None:
    """Every node and every value inside the graph has another name; inputs and outputs keep theirs."""
    model = onnx.load(source)
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    names: dict[str, str] = {}

    def new(name: str) -> str:
        return name if not name or name in kept else names.setdefault(name, f"v{len(names)}")

    for tensor in model.graph.initializer:
        tensor.name = new(tensor.name)
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
        _rename(node.input, new)
        _rename(node.output, new)
        for entry in node.metadata_props:  # the names of a norm's values are data of its metadata
            entry.value = _in_metadata(entry.key, entry.value, new)
    del model.graph.value_info[:]
    onnx.save(model, target)


def _rename(names: list[str], new: Callable[[str], str]) -> None:  # a repeated field of protobuf
    names[:] = [new(name) for name in names]


def _in_metadata(key: str, value: str, new: Callable[[str], str]) -> str:
    import json

    from rmsnorm_deploy.export.graph.metadata import VALUES_KEY

    return json.dumps({k: new(v) for k, v in json.loads(value).items()}) if key == VALUES_KEY else value


def outputs_renamed(source: Path, target: Path) -> None:
    """Other names of the outputs of a file without a KV cache."""
    model = ir.from_proto(onnx.load(source))
    for number, value in enumerate(model.graph.outputs):
        value.name = f"result_{number}"
    ir.save(model, target)


def reordered(source: Path, target: Path) -> None:
    """The nodes in another order in which each follows those that it reads."""
    model = onnx.load(source)
    rng = random.Random(0)
    made = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    waiting, ordered = list(model.graph.node), []
    while waiting:
        ready = [node for node in waiting if set(node.input) <= made]
        chosen = rng.choice(ready)
        waiting.remove(chosen)
        ordered.append(chosen)
        made |= set(chosen.output)
    _replace_nodes(model, ordered)
    onnx.save(model, target)


def unsorted(source: Path, target: Path) -> None:
    """The nodes in reverse order, which ONNX forbids and ONNX Runtime runs."""
    model = onnx.load(source)
    _replace_nodes(model, list(reversed(model.graph.node)))
    onnx.save(model, target)


def _replace_nodes(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def without_metadata(source: Path, target: Path) -> None:
    """Every metadata entry dropped."""
    model = onnx.load(source)
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.metadata_props[:]
    onnx.save(model, target)


WRITERS: dict[str, Writer] = {
    "onnx": saved_by_onnx,
    "onnx_ir": saved_by_onnx_ir,
    "one file per weight": many_files,
    "shapes inferred": inferred,
    "ORT basic": optimized("ENABLE_BASIC"),
    "ORT extended": optimized("ENABLE_EXTENDED"),
    "ORT all": optimized("ENABLE_ALL"),
    "onnxslim": slimmed,
    "onnxsim": simplified,
    "opset raised": raised_opset,
    "values renamed": renamed,
    "outputs renamed": outputs_renamed,
    "nodes in another order": reordered,
    "nodes unsorted": unsorted,
    "metadata dropped": without_metadata,
}
"""How each tool writes a file anew, by name."""

TARGETS_OF: dict[str, tuple[str, ...]] = {
    "opset raised": ("primitives", "standard"),
    # In a file for `standard`, onnxsim 0.8.1 gives the caches of RotaryEmbedding a fixed batch of 1: ONNX Runtime
    # 1.32 refuses other batches also without optimization, so that `validate` fails such a file rightly.
    "onnxsim": ("primitives", "ort", "plugin"),
}
"""The targets whose files a tool writes anew without a fault, if not those of all."""
