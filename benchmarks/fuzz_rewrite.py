"""Throw damaged ONNX files at the rewriter: each must be rewritten to the same numbers, or refused with a clear error.

    python benchmarks/fuzz_rewrite.py --seconds 600 --seed 0 --out fuzz

Small sound models are damaged (bytes, lengths, nodes, edges, names, attributes, tensors, types), read, checked,
rewritten for every target in turn, and written. Where both the damaged file and the rewritten one run in ONNX Runtime,
their outputs must agree to rounding. Any other exception, a changed input file, other numbers, or a case that takes
more than ten seconds is a crash: its file and what happened go to the output folder, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper, parser

from rmsnorm_deploy.export.from_onnx.rewrite import rewrite
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.export.onnx_io.check_graph import check_graph
from rmsnorm_deploy.export.onnx_io.read_model import read_model, to_ir
from rmsnorm_deploy.export.onnx_io.write_model import write_model
from rmsnorm_deploy.models.errors import RmsnormDeployError

SLOW = 10.0  # seconds
MEMORY = 6 << 30  # bytes of address space: what asks for more gets an error in place of the machine
# How far outputs may be apart, relative to the largest of them: a norm rounds a handful of times, and dims are small.
TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 2e-2}
NUMBERS = (-(1 << 63), -(1 << 31), -4, -2, -1, 0, 1, 2, 3, 4, 7, 8, 16, 1 << 31, (1 << 63) - 1)

NORM = """
  two = Constant <value = float {{2.0}}> ()
  square = Pow (x, two)
  mean = ReduceMean <axes = [-1]> (square)
  eps = Constant <value = float {{0.00001}}> ()
  shifted = Add (mean, eps)
  root = Sqrt (shifted)
  {spelling}
  y = Mul (normed, w)
"""
DIV = "normed = Div (x, root)"
RECIPROCAL = "factor = Reciprocal (root)\n  normed = Mul (x, factor)"
WEIGHT = "float[8] w = {0.5, 1.0, 1.5, 2.0, -0.5, 0.25, 3.0, 1.0}"


def seeds() -> list[ModelProto]:
    """Sound models that hold norms, in several spellings, opsets and places."""
    texts = [
        _text(17, "float[n, 8] x", "float[n, 8] y", WEIGHT, NORM.format(spelling=DIV)),
        _text(13, "float[2, 3, 8] x", "float[2, 3, 8] y", WEIGHT, NORM.format(spelling=RECIPROCAL)),
        _text(
            20, "float[n, 8] a, float[n, 8] b", "float[n, 8] y, float[n, 8] x", WEIGHT + ", int64[1] axes = {-1}",
            "x = Add (a, b)" + NORM.format(spelling=DIV).replace("<axes = [-1]> (square)", "(square, axes)"),
        ),
        _text(
            17, "float16[n, 8] h", "float16[n, 8] z", WEIGHT,
            "x = Cast <to = 1> (h)" + NORM.format(spelling=DIV) + "z = Cast <to = 10> (y)",
        ),
        _text(23, "float[n, 8] x", "float[n, 8] y", WEIGHT, "y = RMSNormalization <epsilon = 0.00001> (x, w)"),
        _text(18, "float[n, 8] x", "float[n, 8] y", WEIGHT, "y = SimplifiedLayerNormalization <axis = -1> (x, w)"),
        _text(
            11, "float[2, 1, 8] q", "float[2, 8] z, float[2, 8] y", WEIGHT,
            "x = Squeeze <axes = [1]> (q)" + NORM.format(spelling=DIV) + "z = Softmax <axis = 1> (y)",
        ),
    ]  # fmt: skip
    models = [parser.parse_model(text) for text in texts]
    return [*models, _with_branch(models[0]), _with_function(models[0])]


def _text(opset: int, inputs: str, outputs: str, initializers: str, body: str) -> str:
    return (
        f'<ir_version: 8, opset_import: ["" : {opset}]>\nmain ({inputs}) => ({outputs}) <{initializers}> {{\n{body}\n}}'
    )


def _with_branch(model: ModelProto) -> ModelProto:
    """The norm in one branch of an If."""
    inner = helper.make_graph(list(model.graph.node), "then", [], list(model.graph.output))
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["n"])], "else", [], [onnx.ValueInfoProto(name="n")])
    other.output[0].CopyFrom(model.graph.output[0])
    other.output[0].name = "n"
    node = helper.make_node("If", ["flag"], ["z"], then_branch=inner, else_branch=other)
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    graph = helper.make_graph([node], "main", [*model.graph.input, flag], [], list(model.graph.initializer))
    graph.output.add().CopyFrom(model.graph.output[0])
    graph.output[0].name = "z"
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=8)


def _with_function(model: ModelProto) -> ModelProto:
    """The norm in a local function."""
    body = helper.make_function("own", "Norm", ["x", "w"], ["y"], list(model.graph.node), list(model.opset_import))
    call = helper.make_node("Norm", ["x", "w"], ["y"], domain="own")
    graph = helper.make_graph(
        [call], "main", list(model.graph.input), list(model.graph.output), list(model.graph.initializer)
    )
    imports = [*model.opset_import, helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[body], ir_version=8)


# ---- damage --------------------------------------------------------------------------------------------------------


def damaged(chance: random.Random, model: ModelProto) -> bytes:
    """A copy of the model with one to three things wrong, as a file."""
    if chance.random() < 0.25:
        return _damaged_bytes(chance, model.SerializeToString())
    copy = ModelProto()
    copy.CopyFrom(model)
    for _ in range(chance.randint(1, 3)):
        chance.choice(DAMAGES)(chance, copy)
    data = copy.SerializeToString()
    return _damaged_bytes(chance, data) if chance.random() < 0.05 else data


def _damaged_bytes(chance: random.Random, data: bytes) -> bytes:
    content = bytearray(data)
    if chance.random() < 0.3:
        return bytes(content[: chance.randrange(len(content))])
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(content))
        kind = chance.randrange(3)
        if kind == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place] = chance.randrange(256)
        else:
            content[place:place] = content[place : place + chance.randint(1, 40)]
    return bytes(content)


def _bodies(model: ModelProto) -> list[Any]:
    bodies: list[Any] = [model.graph, *model.functions]
    for body in bodies:  # grows
        bodies.extend(a.g for node in body.node for a in node.attribute if a.HasField("g"))
    return [body for body in bodies if body.node]


def _nodes(model: ModelProto) -> list[Any]:
    return [node for body in _bodies(model) for node in body.node]


def _names(model: ModelProto) -> list[str]:
    nodes = _nodes(model)
    return [name for node in nodes for name in (*node.input, *node.output)] + ["", "x", "nowhere"]


def _pick(chance: random.Random, items: Any) -> Any:
    return chance.choice(items) if len(items) else None


def _drop_node(chance: random.Random, model: ModelProto) -> None:
    body = _pick(chance, _bodies(model))
    if body is not None:
        del body.node[chance.randrange(len(body.node))]


def _repeat_node(chance: random.Random, model: ModelProto) -> None:
    body = _pick(chance, _bodies(model))
    if body is not None:
        node = body.node.add()
        node.CopyFrom(chance.choice(body.node[:-1] or body.node))
        if chance.random() < 0.7:
            node.output[:] = [f"{name}_again" for name in node.output]


def _shuffle_nodes(chance: random.Random, model: ModelProto) -> None:
    body = _pick(chance, _bodies(model))
    if body is not None:
        nodes = [node.SerializeToString() for node in body.node]
        chance.shuffle(nodes)
        for node, data in zip(body.node, nodes, strict=True):
            node.ParseFromString(data)


def _rewire(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, [n for n in _nodes(model) if n.input])
    if node is not None:
        node.input[chance.randrange(len(node.input))] = chance.choice(_names(model))


def _swap_inputs(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, [n for n in _nodes(model) if len(n.input) > 1])
    if node is not None:
        node.input[:] = list(node.input)[::-1]


def _count_inputs(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, _nodes(model))
    if node is not None:
        if node.input and chance.random() < 0.5:
            del node.input[-1]
        else:
            node.input.append(chance.choice(_names(model)))


def _rename_output(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, [n for n in _nodes(model) if n.output])
    if node is not None:
        node.output[chance.randrange(len(node.output))] = chance.choice([*_names(model), "\n", "🙂", "n" * 5000])


def _change_op(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, _nodes(model))
    if node is not None:
        others = ["Mul", "Add", "Div", "Sub", "Pow", "Sqrt", "Reciprocal", "ReduceSum", "ReduceMean", "Cast", "Neg", ""]
        others += ["RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization", "Norm", "If", "Nothing"]
        node.op_type = chance.choice(others)


def _change_domain(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, _nodes(model))
    if node is not None:
        node.domain = chance.choice(["", "ai.onnx", "com.microsoft", "own", "rmsnorm_deploy"])


def _change_attribute(chance: random.Random, model: ModelProto) -> None:
    node = _pick(chance, _nodes(model))
    if node is None:
        return
    if not node.attribute or chance.random() < 0.2:
        name = chance.choice(["axis", "axes", "epsilon", "keepdims", "to", "stash_type", "noop_with_empty_axes"])
        node.attribute.add(name=name, type=AttributeProto.INT, i=chance.choice(NUMBERS))
        return
    attribute = chance.choice(node.attribute)
    kind = chance.randrange(5)
    if kind == 0:
        attribute.type = chance.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13])
    elif kind == 1:
        attribute.i = chance.choice(NUMBERS)
        attribute.ints[:] = [chance.choice(NUMBERS) for _ in range(chance.randrange(3))]
    elif kind == 2:
        attribute.f = chance.choice([0.0, -1.0, 1e-5, 1e30, math.nan, math.inf])
    elif kind == 3:
        attribute.name = chance.choice(["axis", "axes", "value", "k", ""])
    else:
        node.attribute.remove(attribute)


def _tensors(model: ModelProto) -> list[Any]:
    held = [a.t for node in _nodes(model) for a in node.attribute if a.HasField("t")]
    return [*model.graph.initializer, *held]


def _change_tensor(chance: random.Random, model: ModelProto) -> None:
    tensor = _pick(chance, _tensors(model))
    if tensor is None:
        return
    kind = chance.randrange(6)
    if kind == 0:
        tensor.dims[:] = [chance.choice(NUMBERS) for _ in range(chance.randrange(4))]
    elif kind == 1:
        tensor.data_type = chance.randrange(30)
    elif kind == 2:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=chance.choice(["w.bin", "../w.bin", "/etc/passwd", ""]))
    elif kind == 3:
        shape = [chance.choice([1, 2, 8]) for _ in range(chance.randrange(3))]
        dtype = chance.choice([np.float32, np.float16, np.float64, np.int64, np.int32])
        value = np.full(shape, chance.choice([-1, 0, 1, 2, 3]), dtype)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    elif kind == 4:
        tensor.name = chance.choice(_names(model))
    else:
        tensor.float_data[:] = [chance.choice([0.0, 1e-30, -1.0, math.nan, math.inf])]


def _drop_initializer(chance: random.Random, model: ModelProto) -> None:
    if model.graph.initializer:
        del model.graph.initializer[chance.randrange(len(model.graph.initializer))]


def _change_interface(chance: random.Random, model: ModelProto) -> None:
    info = _pick(chance, [*model.graph.input, *model.graph.output])
    if info is None:
        return
    kind = chance.randrange(5)
    tensor = info.type.tensor_type
    if kind == 0:
        tensor.elem_type = chance.choice([0, 1, 7, 10, 11, 16, 99])
    elif kind == 1:
        for dim in tensor.shape.dim:
            dim.dim_value = chance.choice([*NUMBERS, 8, 8])
    elif kind == 2:
        info.ClearField("type")
    elif kind == 3:
        tensor.shape.dim.add().dim_param = "n"
    else:
        info.name = chance.choice(_names(model))


def _change_model(chance: random.Random, model: ModelProto) -> None:
    kind = chance.randrange(4)
    if kind == 0 and model.opset_import:
        chance.choice(model.opset_import).version = chance.choice([0, 1, 7, 12, 13, 18, 20, 23, 24, 1 << 40])
    elif kind == 1:
        model.opset_import.add(domain=chance.choice(["", "ai.onnx", "own"]), version=chance.choice([1, 13, 18]))
    elif kind == 2:
        model.ir_version = chance.choice([0, 1, 3, 4, 10, 1 << 40])
    elif model.functions:
        function = chance.choice(model.functions)
        function.node.add(op_type=function.name, domain=function.domain, input=["x"], output=["deeper"])


DAMAGES: tuple[Callable[[random.Random, ModelProto], None], ...] = (
    *(_drop_node, _repeat_node, _shuffle_nodes, _rewire, _rewire, _swap_inputs, _count_inputs, _rename_output),
    *(_change_op, _change_domain, _change_attribute, _change_attribute, _change_tensor, _change_tensor),
    *(_drop_initializer, _change_interface, _change_model),
)


# ---- judgment -----------------------------------------------------------------------------------------------------


@dataclass
class Outcomes:
    """How many cases ended how, and the files that ended in none of the ways they may."""

    counts: Counter[str] = field(default_factory=Counter)
    crashes: dict[str, Path] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{count:8} {name}" for name, count in self.counts.most_common()]
        return "\n".join([*lines, *(f"CRASH {what}\n      {path}" for what, path in self.crashes.items())])


class WrongError(Exception):
    """The rewriter did something that it must never do."""


def fuzz(seed: int, out: Path, more: Callable[[int], bool]) -> Outcomes:
    """Run cases for as long as `more(number of cases)` says; crashes go to `out`, one file for each kind."""
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)
    ort.set_default_logger_severity(4)
    outcomes, sound = Outcomes(), seeds()
    number = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while more(number):
            chance = random.Random(f"{seed}/{number}")
            data = damaged(chance, sound[number % len(sound)])
            target = TARGETS[number // len(sound) % len(TARGETS)]
            number += 1
            try:
                outcomes.counts[_judged(data, target, Path(folder), seed)] += 1
            except Exception as error:
                outcomes.counts["crash"] += 1
                what = _kind(error, target)
                if what not in outcomes.crashes:
                    out.mkdir(parents=True, exist_ok=True)
                    outcomes.crashes[what] = out / f"crash-{seed}-{number - 1}-{target}.onnx"
                    outcomes.crashes[what].write_bytes(data)
                    outcomes.crashes[what].with_suffix(".txt").write_text(traceback.format_exc())
    return outcomes


def _kind(error: Exception, target: str) -> str:
    """Cases that fail at the same place are of one kind."""
    place = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/export/" in f.filename), None)
    where = f" at {Path(place.filename).name}:{place.lineno}" if place is not None else ""
    text = str(error).splitlines()[0][:160] if str(error) else ""
    return (
        f"{type(error).__name__}{where} ({target}): {text}" if not where else f"{type(error).__name__}{where}: {text}"
    )


def _judged(data: bytes, target: str, folder: Path, seed: int) -> str:
    path, out = folder / "damaged.onnx", folder / "out"
    out.mkdir(exist_ok=True)
    path.write_bytes(data)
    (folder / "w.bin").write_bytes(bytes(32))
    start = time.perf_counter()
    try:
        file = read_model(path)
        check_graph(file.model, file.where)
        result = rewrite(to_ir(file), target)
        for old in out.iterdir():
            old.unlink()
        write_model(result.model, file, out, "new.onnx", "copy")
    except RmsnormDeployError as error:
        if not str(error).isprintable() or len(str(error)) > 2000:
            raise WrongError(f"a message that nobody can read: {str(error)[:80]!r}") from error
        return f"refused ({type(error).__name__})"
    finally:
        if time.perf_counter() - start > SLOW:
            raise WrongError("too slow")
        if path.read_bytes() != data:
            raise WrongError("the input changed")
    if not result.changed:
        return "written, no norm changed"
    return f"written, {_compared(path, out / 'new.onnx', seed)}"


def _compared(old: Path, new: Path, seed: int) -> str:
    """Run both files, where they run at all, in a process of its own: damaged files bring ONNX Runtime down."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), os.fdopen(writer, "w", buffering=1) as stream:
            _run_both(old, new, seed, lambda line: print(line, file=stream))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        lines = stream.read().splitlines()
    os.waitpid(child, 0)
    if not lines:
        return "the original does not run"
    if lines[-1] != "same numbers":
        raise WrongError("the rewritten file brings ONNX Runtime down" if lines[-1] == "runs" else lines[-1])
    return lines[-1]


def _run_both(old: Path, new: Path, seed: int, progress: Callable[[str], None]) -> None:
    session = _session(old)
    feeds = dict(_feeds(session, seed))
    before = session.run(None, feeds)
    progress("runs")
    try:
        after = _session(new).run(None, feeds)
    except Exception as error:
        progress(f"the rewritten file does not run: {str(error).splitlines()[0][:200]}")
        return
    progress(next(filter(None, map(_difference, before, after)), "same numbers"))


def _session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feeds(session: Any, seed: int) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(seed)
    for info in session.get_inputs():
        shape = [dim if isinstance(dim, int) and 0 < dim < 100 else 3 for dim in info.shape]
        dtype = {"float": "float32", "double": "float64"}.get(info.type[7:-1], info.type[7:-1])
        values = rng.standard_normal(shape) if dtype.startswith("float") else np.ones(shape)
        yield info.name, np.asarray(values, dtype)


def _difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> str:
    """How an output is another one; nothing where it is the same to rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"outputs of another type: {a.dtype}{a.shape} and {b.dtype}{b.shape}"
    if a.dtype.kind != "f":
        return "" if np.array_equal(a, b) else "other whole numbers"
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return "NaN or infinity in one and not in the other"
    left, right = a[finite].astype(np.float64), b[finite].astype(np.float64)
    far = left.size and np.abs(left - right).max() > TOLERANCE[a.dtype.name] * np.abs(left).max()
    return "other numbers" if far else ""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, default=Path("fuzz"), help="where files that crash are kept")
    given = arguments.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    end = time.monotonic() + given.seconds
    outcomes = fuzz(given.seed, given.out, lambda _: time.monotonic() < end)
    print(outcomes)
    return 1 if outcomes.crashes else 0


if __name__ == "__main__":
    sys.exit(main())
