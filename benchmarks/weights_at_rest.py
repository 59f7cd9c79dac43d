"""Compare a file whose weights stayed in the checkpoint with the file that the loaded module gives, in ONNX Runtime.

A Llama of 1.1e9 random float32 parameters is saved, then exported twice: from its folder, where the weights stay as
they are in the file, and from the module that transformers loaded, whose weights are written again. Each session is
made in a process of its own, in rotating order, after a round that is not counted: seconds to make it, seconds of a
run (the median of a process, then of the processes), the largest resident memory of the process less that before, and
the sha256 of all results.

    python -m benchmarks.weights_at_rest              # requires 15 GB of disk, 12 GB of memory, about 8 minutes
    python -m benchmarks.weights_at_rest --layers 2   # a quick look
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .export_cost import SHAPES, status_bytes

KINDS = ("at rest", "usual")


def save(folder: Path, layers: int | None) -> None:
    """Write the checkpoint and both exports under `folder`."""
    import torch
    import transformers

    from rmsnorm_deploy import export_model

    torch.manual_seed(0)
    shape = {**SHAPES["1.1"], **({"num_hidden_layers": layers} if layers else {})}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    model.save_pretrained(folder / "checkpoint")
    export_model(folder / "checkpoint", folder / KINDS[0])
    export_model(model, folder / KINDS[1])


def child(path: Path, runs: int) -> None:
    """Make a session, run it with one token and with 64, and print what was measured as JSON."""
    import numpy as np
    import onnxruntime

    random = np.random.default_rng(0)
    before, start = status_bytes("VmHWM"), time.perf_counter()
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    row: dict[str, Any] = {"load": time.perf_counter() - start}
    digest = hashlib.sha256()
    for tokens in (1, 64):
        ids = random.integers(0, 32000, (1, tokens))
        feeds = {value.name: ids if value.name == "input_ids" else np.ones_like(ids) for value in session.get_inputs()}
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            results = session.run(None, feeds)
            times.append(time.perf_counter() - start)
        row[f"{tokens} tokens"] = statistics.median(times[1:])
        for result in results:
            digest.update(result.tobytes())
    row |= {"memory": status_bytes("VmHWM") - before, "bits": digest.hexdigest()[:16]}
    print(json.dumps(row), flush=True)


def measure(path: Path, runs: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.weights_at_rest", "--child", str(path), "--runs", str(runs)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def report(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The table: one line for each quantity, with the ratio of the medians."""
    lines = ["| quantity | at rest | usual | ratio |", "|---|---|---|---|"]
    for key, unit, scale in (
        ("load", "s", 1.0), ("1 tokens", "ms", 1e3), ("64 tokens", "ms", 1e3), ("memory", "GiB", 2.0**-30),
    ):  # fmt: skip
        mine, usual = (statistics.median(row[key] for row in rows[kind]) * scale for kind in KINDS)
        name = "1 token" if key == "1 tokens" else key
        lines.append(f"| {name}, {unit} | {mine:.2f} | {usual:.2f} | {mine / usual:.3f} |")
    bits = {row["bits"] for each in rows.values() for row in each}
    lines.append(f"| sha256 of the results | {' | '.join(rows[kind][0]['bits'] for kind in KINDS)} | "
                 f"{'equal' if len(bits) == 1 else 'NOT EQUAL'} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weights_at_rest", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, help="layers of the model, for a quick look")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind")
    parser.add_argument("--runs", type=int, default=11, help="runs of each session; the first is not counted")
    parser.add_argument("--folder", type=Path, help="where the files are written; a temporary folder if omitted")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.runs)
        return
    if not Path("/proc/self/status").exists():
        parser.exit(4, "weights_at_rest: expected /proc of Linux, which tells the memory of a process.\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        save(Path(folder), arguments.layers)
        rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for number in range(arguments.rounds + 1):
            for kind in KINDS if number % 2 else reversed(KINDS):
                row = measure(Path(folder) / kind, arguments.runs)
                if number > 0:  # the first round brings the files into memory
                    rows[kind].append(row)
    print(report(rows))


if __name__ == "__main__":
    main()
