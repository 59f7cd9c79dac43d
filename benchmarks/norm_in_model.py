"""Compare exports of this package with plain `torch.onnx.export` of the same model: time, memory and latency.

One run measures all values: a Llama-shaped decoder (hidden 1024, 8 layers, fp32, random weights) is exported by
`torch.onnx.export(dynamo=True)` at its default opset and by this package for each target, each in a separate process
(time and peak memory); then all files run in ONNX Runtime on the CPU, in turns.

    python -m benchmarks.norm_in_model                 # the table, about five minutes on two cores
    python -m benchmarks.norm_in_model --json out.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

TARGETS = ("primitives", "standard", "ort", "plugin")
PLAIN = "torch.onnx.export"
FUSED = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")
VOCABULARY = 8192


def build() -> Any:
    """The model that is exported."""
    from rmsnorm_deploy.models.builtin.decoder import DecoderConfig, random_decoder

    return random_decoder(
        DecoderConfig(
            vocab_size=VOCABULARY, hidden_size=1024, num_layers=8, num_heads=16, num_kv_heads=8, intermediate_size=2816
        ),
        seed=0,
    )


def export_once(way: str, folder: Path) -> dict[str, float]:
    """Export in this process; returns the seconds from the model in memory to the files on disk, and the peak MiB."""
    import torch

    model = build().eval()
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    if way == PLAIN:
        dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        folder.mkdir()
        torch.onnx.export(
            model, (ids,), folder / "model.onnx", dynamo=True, dynamic_shapes=dims, external_data=True, verbose=False
        )
    else:
        from rmsnorm_deploy.export.from_torch.export_model import export_model

        export_model(model, folder, inputs={"input_ids": ids}, target=way)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def export_all(root: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Export with each exporter in new processes, in turns; returns medians."""
    samples: dict[str, list[dict[str, float]]] = defaultdict(list)
    for repeat in range(repeats):
        for way in (PLAIN, *TARGETS):
            folder = root / f"{way}-{repeat}"
            command = [sys.executable, "-m", "benchmarks.norm_in_model", "--export-once", way, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"exporting with {way} failed:\n{done.stderr[-2000:]}")
            samples[way].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"  exported: {way} {samples[way][-1]}", file=sys.stderr)
    return {
        way: {key: statistics.median(sample[key] for sample in rows) for key in rows[0]}
        for way, rows in samples.items()
    }


def session(path: Path, profile: Path | None = None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def norm_nodes(path: Path) -> set[str]:
    """Names of the nodes of norms, by the module scope in the metadata that the exporter wrote."""
    import onnx

    names = set()
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
        if "norm" in scopes:
            names.add(node.name)
    return names


def norm_time(path: Path, feeds: dict[str, np.ndarray], runs: int, is_norm: Any) -> tuple[float, Counter[str]]:
    """Microseconds in norm kernels in one run (median), and the number of kernels by operator."""
    with tempfile.TemporaryDirectory() as scratch:
        running = session(path, Path(scratch) / "profile")
        for _ in range(runs + 2):
            running.run(None, feeds)
        events = json.loads(Path(running.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    per_run = len(kernels) // (runs + 2)
    totals, ops = [], Counter[str]()
    for index in range(2, runs + 2):
        part = kernels[index * per_run : (index + 1) * per_run]
        mine = [e for e in part if is_norm(e["name"].removesuffix("_kernel_time"), e["args"]["op_name"])]
        totals.append(sum(e["dur"] for e in mine))
        ops = Counter(e["args"]["op_name"] for e in mine)
    return statistics.median(totals), ops


def run_all(root: Path, batch: int, length: int, runs: int) -> dict[str, dict[str, Any]]:
    """Latency of the whole model, in turns, and time in its norm kernels."""
    feeds = {"input_ids": np.random.default_rng(0).integers(0, VOCABULARY, (batch, length))}
    paths = {way: root / f"{way}-0" / "model.onnx" for way in (PLAIN, *TARGETS)}
    sessions = {way: session(path) for way, path in paths.items()}
    names = {way: running.get_inputs()[0].name for way, running in sessions.items()}
    times: dict[str, list[float]] = defaultdict(list)
    ways = list(sessions.items())
    for index in range(runs + 2):
        first = index % len(ways)  # rotate the order, so that no file always runs after the same other file
        for way, running in ways[first:] + ways[:first]:
            start = time.perf_counter()
            running.run(None, {names[way]: feeds["input_ids"]})
            times[way].append(time.perf_counter() - start)
    del sessions
    rows: dict[str, dict[str, Any]] = {}
    for way, path in paths.items():
        belongs = norm_nodes(path) if way == PLAIN else set()
        microseconds, ops = norm_time(
            path, {names[way]: feeds["input_ids"]}, runs, lambda name, op, b=belongs: name in b or op in FUSED
        )
        rows[way] = {
            "model_ms": statistics.median(times[way][2:]) * 1e3,
            "model_ratio": statistics.median(a / b for a, b in zip(times[way][2:], times[PLAIN][2:], strict=True)),
            "norm_us": microseconds,
            "norm_kernels": dict(ops),
        }
    return rows


def show(exports: dict[str, dict[str, float]], shapes: dict[str, dict[str, dict[str, Any]]]) -> None:
    plain = exports[PLAIN]
    print("\n| way | export s | ratio | peak MiB | ratio |\n|---|---|---|---|---|")
    for way, row in exports.items():
        print(
            f"| {way} | {row['seconds']:.1f} | {row['seconds'] / plain['seconds']:.2f} "
            f"| {row['peak_mib']:.0f} | {row['peak_mib'] / plain['peak_mib']:.3f} |"
        )
    for shape, rows in shapes.items():
        plain_row = rows[PLAIN]
        print(f"\n{shape}\n\n| way | model ms | ratio | norm kernels us | ratio | norm kernels |")
        print("|---|---|---|---|---|---|")
        for way, row in rows.items():
            kernels = ", ".join(f"{count} {op}" for op, count in sorted(row["norm_kernels"].items()))
            print(
                f"| {way} | {row['model_ms']:.2f} | {row['model_ratio']:.3f} "
                f"| {row['norm_us']:.0f} | {row['norm_us'] / plain_row['norm_us']:.3f} | {kernels} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.norm_in_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each file; 6 times as many for one token")
    parser.add_argument("--repeats", type=int, default=3, help="exports with each exporter (median)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--export-once", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export_once:
        print(json.dumps(export_once(arguments.export_once[0], Path(arguments.export_once[1]))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        exports = export_all(root, arguments.repeats)
        shapes = {
            f"batch {batch}, {length} tokens": run_all(root, batch, length, arguments.runs * more)
            for batch, length, more in ((1, 1, 6), (1, 128, 2), (4, 128, 1))
        }
    show(exports, shapes)
    if arguments.json:
        arguments.json.write_text(json.dumps({"exports": exports, "runs": shapes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
