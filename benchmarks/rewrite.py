"""Measure the time and memory of rewriting, and the number of fused norms compared with two other optimizers.

    python -m benchmarks.rewrite              all parts
    python -m benchmarks.rewrite --only nodes | large | fused | corpus

nodes: seconds for graphs of 1e3, 1e4 and 1e5 nodes without the proof, from reading to writing the file.
large: a file of 1.1e9 float32 parameters with external data (sparse on disk): seconds and memory without the proof.
fused: norms in ONNX Runtime's fused form after this package, after onnxscript's `optimize_for_ort`, and after
    `onnxruntime.transformers.optimizer`, on the same files, which `torch.onnx.export` writes at its default settings;
    and the difference between the outputs of the result and of the original file.
corpus: the same three tools on every spelling of the tests' corpus: the number of files in which all norms are fused,
    of wrong results, and of failures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 64
NORM_OPS = {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization"}


def layer(index: int, x: str, weights: tuple[str, str]) -> tuple[list[onnx.NodeProto], str]:
    """Ten nodes: a norm as torch writes it, a linear layer, an activation, and the residual add."""
    name = f"layer{index}."
    steps = [
        ("Pow", [x, "two"]), ("ReduceMean", ["0", "axes"]), ("Add", ["1", "eps"]), ("Sqrt", ["2"]),
        ("Reciprocal", ["3"]), ("Mul", [x, "4"]), ("Mul", [weights[0], "5"]), ("MatMul", ["6", weights[1]]),
        ("Relu", ["7"]), ("Add", [x, "8"]),
    ]  # fmt: skip
    nodes = [
        helper.make_node(
            op, [name + i if i.isdigit() else i for i in inputs], [f"{name}{number}"], name=f"{name}{op}{number}"
        )
        for number, (op, inputs) in enumerate(steps)
    ]
    return nodes, nodes[-1].output[0]


def constants() -> list[TensorProto]:
    """The constants that every layer reads."""
    values = {"two": np.float32(2), "eps": np.float32(1e-6), "axes": np.array([-1])}
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def graph(layers: int) -> onnx.ModelProto:
    """`layers` times ten nodes with shared weights."""
    nodes, x = [], "x"
    for index in range(layers):
        added, x = layer(index, x, ("norm.weight", "linear"))
        nodes += added
    weights = [
        numpy_helper.from_array(np.linspace(0.5, 1.5, WIDTH, dtype=np.float32), "norm.weight"),
        numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "linear"),
    ]
    return model(nodes, x, WIDTH, [*constants(), *weights])


def model(nodes: list[onnx.NodeProto], last: str, width: int, initializers: list[TensorProto]) -> onnx.ModelProto:
    """A model from x to `last`."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", width]) for name in ("x", last)
    ]
    proto = helper.make_graph(nodes, "graph", values[:1], values[1:], initializers)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def large(folder: Path, parameters: float = 1.1e9, width: int = 4096) -> Path:
    """A file whose linear layers have `parameters` in total; the data file is sparse, and they are zeros."""
    layers = round(parameters / width**2)
    nodes, initializers, offset, x = [], constants(), 0, "x"
    data = folder / "large.onnx.data"
    with data.open("wb") as file:
        for index in range(layers):
            names = (f"layers.{index}.norm.weight", f"layers.{index}.linear")
            added, x = layer(index, x, names)
            nodes += added
            norm = np.full(width, 1 + index / 100, np.float32).tobytes()
            file.seek(offset)
            file.write(norm)
            for name, shape, size in ((names[0], [width], len(norm)), (names[1], [width, width], 4 * width**2)):
                tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", data.name), ("offset", offset), ("length", size)):
                    tensor.external_data.add(key=key, value=str(value))
                initializers.append(tensor)
                offset += size
        file.truncate(offset)
    path = folder / "large.onnx"
    path.write_bytes(model(nodes, x, width, initializers).SerializeToString())
    return path


MEASURED = """
import json, resource, sys, time
start = time.perf_counter()
from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model
imported, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = rewrite_model(sys.argv[1], sys.argv[2], target="ort", verify=False, weights="link")
end, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"import_s": imported - start, "s": end - imported, "import_mb": before / 1000, "peak_mb": peak / 1000,
                  "norms": len(result.rewritten.sites), "changed": sum(s.changed for s in result.rewritten.sites)}))
"""


def measured(path: Path, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of one rewriting in a separate process."""
    run = subprocess.run([sys.executable, "-c", MEASURED, str(path), str(folder)], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout)


def nodes_table(folder: Path) -> None:
    print("| nodes | norms | seconds | times the row above | peak MB |\n|---|---|---|---|---|")
    before = None
    for layers in (100, 1000, 10000):
        path = folder / f"nodes{layers}.onnx"
        path.write_bytes(graph(layers).SerializeToString())
        runs = [measured(path, folder / f"out{layers}") for _ in range(3)]
        best = min(runs, key=lambda run: run["s"])
        growth = "-" if before is None else f"{best['s'] / before:.1f}"
        print(
            f"| {10 * layers} | {best['changed']} of {best['norms']} | {best['s']:.2f} | {growth} "
            f"| {best['peak_mb']:.0f} |"
        )
        before = best["s"]


def large_table(folder: Path) -> None:
    path = large(folder)
    size = path.with_name("large.onnx.data").stat().st_size
    row = measured(path, folder / "large-out")
    print(
        f"{size / 4e9:.2f}e9 parameters, {size / 1e9:.1f} GB of external data: "
        f"{row['changed']} of {row['norms']} norms,"
    )
    print(f"{row['s']:.2f} s, peak {row['peak_mb']:.0f} MB, of which {row['import_mb']:.0f} MB are imports")


# Beside other optimizers ------------------------------------------------------------------------------------------


def plain_exports(folder: Path) -> Iterator[tuple[str, str, Path, int]]:
    """Name, dtype, file and number of norms of small models, as `torch.onnx.export` writes them."""
    import torch

    from tests.helpers.models.families import FAMILIES
    from tests.helpers.models.plain_export import plain_export

    for name, dtype in itertools.product(
        ("llama", "qwen3", "gemma3", "olmo2", "t5", "mamba2", "gpt_oss"), ("float32", "float16")
    ):
        path = folder / f"{name}-{dtype}.onnx"
        plain_export(name, getattr(torch, dtype), path)
        yield name, dtype, path, sum(FAMILIES[name].norms.values())


def fused_norms(path: Path) -> int:
    """The number of fused norm operators in the file."""
    from rmsnorm_deploy.export.onnx_io.read_model import all_nodes

    return sum(node.op_type in NORM_OPS for node in all_nodes(onnx.load(path, load_external_data=False)))


def outputs(path: Path, feeds: dict[str, Any] | None = None, rows: bool = False) -> tuple[list[Any], dict[str, Any]]:
    """The outputs of a file on generated tokens or on normally distributed rows, and the feeds."""
    from rmsnorm_deploy.models.dtypes import numpy_dtype
    from rmsnorm_deploy.runtime.inputs.synthetic import make_feeds
    from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner

    with OrtRunner(path) as runner:
        if feeds is None and rows:
            rng = np.random.default_rng(0)
            shapes = [(i, [dim if isinstance(dim, int) else 3 for dim in i.shape or ()]) for i in runner.inputs()]
            feeds = {i.name: np.asarray(rng.standard_normal(shape)).astype(numpy_dtype(i.dtype)) for i, shape in shapes}
        feeds = feeds or make_feeds(runner.inputs(), 2, 7, 0, 90)
        return list(runner.run(feeds).values()), feeds


def difference(path: Path, wanted: list[Any], feeds: dict[str, Any]) -> float:
    """The largest difference from the original file's outputs, relative to the largest value of the output."""
    got, _ = outputs(path, feeds)
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        wide = a.astype(np.float64)
        worst = max(worst, float(np.abs(b.astype(np.float64) - wide).max() / np.abs(wide).max()))
    return worst


def agrees(path: Path, wanted: list[Any], feeds: dict[str, Any]) -> str:
    """The difference as text, or the reason why it is unknown."""
    try:
        return f"{difference(path, wanted, feeds):.1e}"
    except Exception as error:
        return f"does not run: {' '.join(str(error).split())[:60]}"


def ours(path: Path, folder: Path, verify: bool = True) -> Path:
    from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model

    return rewrite_model(path, folder, target="ort", verify=verify).model


def onnxscripts(path: Path, folder: Path) -> Path:
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    optimized, _ = optimize_for_ort(ir.load(path))
    folder.mkdir()
    ir.save(optimized, folder / path.name, external_data=f"{path.name}.data")
    return folder / path.name


def onnxruntimes(path: Path, folder: Path) -> Path:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("gpt2")
    optimized = optimize_model(str(path), model_type="gpt2", num_heads=4, hidden_size=32, optimization_options=options)
    folder.mkdir()
    optimized.save_model_to_file(str(folder / path.name))
    return folder / path.name


def quietly(optimize: Callable[[Path, Path], Path], path: Path, folder: Path) -> Path:
    """The optimized file; the output of the tools is discarded."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return optimize(path, folder)


def corpus_table(folder: Path) -> None:
    from tests.helpers.spellings.norm_places import PLACES
    from tests.helpers.spellings.norm_spellings import SPELLINGS

    ways = {**WAYS, "rmsnorm rewrite": lambda path, place: ours(path, place, verify=False)}
    counts: dict[str, Counter[str]] = {way: Counter() for way in ways}
    spellings = [spelling for spelling in (*SPELLINGS.values(), *PLACES.values()) if spelling.runs]
    for number, spelling in enumerate(spellings):
        path = folder / f"{number}.onnx"
        path.write_bytes(spelling.build().SerializeToString())
        wanted, feeds = outputs(path, rows=True)
        for way, optimize in ways.items():
            try:
                result = quietly(optimize, path, folder / f"{number}-{way.replace(' ', '-')}")
                fused = fused_norms(result) >= len(spelling.expected)
            except Exception:
                counts[way]["fails"] += 1
                continue
            try:
                right = difference(result, wanted, feeds) <= TOLERANCE
            except Exception:
                right = False
            counts[way]["all fused" if fused and right else "not all fused" if right else "wrong"] += 1
    print(f"{len(spellings)} files; wrong: does not run, or differs by more than {TOLERANCE:g} of the outputs' size")
    outcomes = ("all fused", "not all fused", "wrong", "fails")
    print(f"| | {' | '.join(outcomes)} |\n|---|{'---|' * len(outcomes)}")
    for way in WAYS:
        print(f"| {way} | {' | '.join(str(counts[way][outcome]) for outcome in outcomes)} |")


def root_of(error: BaseException) -> BaseException:
    """The first error in the chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


WAYS: dict[str, Callable[[Path, Path], Path]] = {
    "rmsnorm rewrite": ours, "optimize_for_ort": onnxscripts, "onnxruntime.transformers": onnxruntimes,
}  # fmt: skip
# Relative to the outputs' largest value: a few roundings of float16.
TOLERANCE = 5e-3


def fused_table(folder: Path) -> None:
    print("fused norms of all norms; in parentheses the largest difference from the original file's outputs (relative)")
    print(f"| file | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    for name, dtype, path, count in plain_exports(folder):
        wanted, feeds = outputs(path)
        cells = []
        for way, optimize in WAYS.items():
            place = folder / f"{name}-{dtype}-{way.replace(' ', '-')}"
            try:
                result = quietly(optimize, path, place)
                cells.append(f"{fused_norms(result)} of {count} ({agrees(result, wanted, feeds)})")
            except Exception as error:
                cells.append(f"fails: {' '.join(str(root_of(error)).split())[:60]}")
        print(f"| {name} {dtype} | {' | '.join(cells)} |", flush=True)


PARTS = {"nodes": nodes_table, "large": large_table, "fused": fused_table, "corpus": corpus_table}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.rewrite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS)
    chosen = parser.parse_args().only
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for name, part in PARTS.items():
        if chosen in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                print(f"\n### {name}\n", flush=True)
                part(Path(folder))


if __name__ == "__main__":
    main()
