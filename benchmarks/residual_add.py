"""Compare residual add and norm as two operators with ONNX Runtime's fused operator on the CPU, for the `ort` target.

    python -m benchmarks.residual_add

For each shape: median microseconds over interleaved runs, and the largest error against float64 in ULP of float32, on
normal rows and on rows with outlier channels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.accuracy.compare_output import figures

EPS = 1e-6
WAYS = ("Add, SimplifiedLayerNormalization", "Add, RMSNormalization", "SkipSimplifiedLayerNormalization")


def session(way: str, width: int, threads: int) -> Any:
    """A session of a graph with only the residual add and the norm."""
    attributes = {"epsilon": EPS}
    if way.startswith("Skip"):
        outputs = ["y", "", "", "s"]
        nodes = [helper.make_node(way, ["x", "r", "w"], outputs, domain="com.microsoft", **attributes)]
    else:
        norm = helper.make_node(way.split(", ")[1], ["s", "w"], ["y"], axis=-1, **attributes)
        nodes = [helper.make_node("Add", ["x", "r"], ["s"]), norm]
    shape = [1, "rows", width]
    graph = helper.make_graph(
        nodes,
        "residual",
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
            for n, s in (("x", shape), ("r", shape), ("w", [width]))
        ],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("y", "s")],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(rows: int, width: int, outliers: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x, r = (rng.standard_normal((1, rows, width)).astype(np.float32) for _ in range(2))
    if outliers:
        x[..., rng.choice(width, 4, replace=False)] *= 100
    return {"x": x, "r": r, "w": rng.uniform(0.5, 1.5, width).astype(np.float32)}


def error(running: Any, feeds: dict[str, np.ndarray]) -> float:
    y, total = running.run(None, feeds)
    return figures(y, reference(NormSpec(eps=EPS), total, feeds["w"])).max_ulp


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.residual_add", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="0 lets ONNX Runtime choose")
    arguments = parser.parse_args()
    print("| rows x width | way | us | ratio to the first | max ULP | max ULP, outlier channels |")
    print("|---|---|---|---|---|---|")
    for rows, width in ((1, 4096), (128, 1024), (512, 4096)):
        sessions = {way: session(way, width, arguments.threads) for way in WAYS}
        feeds = inputs(rows, width, outliers=False)
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(arguments.runs + 3):
            for way, running in sessions.items():
                start = time.perf_counter()
                running.run(None, feeds)
                times[way].append(time.perf_counter() - start)
        medians = {way: statistics.median(values[3:]) * 1e6 for way, values in times.items()}
        for way, running in sessions.items():
            errors = [error(running, inputs(rows, width, outliers)) for outliers in (False, True)]
            print(
                f"| {rows}x{width} | {way} | {medians[way]:.1f} | {medians[way] / medians[WAYS[0]]:.2f} "
                f"| {errors[0]:.1f} | {errors[1]:.1f} |"
            )


if __name__ == "__main__":
    main()
