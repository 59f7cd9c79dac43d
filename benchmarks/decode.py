"""Time one step of a decoder in ONNX Runtime: attention as one node, decomposed, and onnxruntime-genai's file.

Decoders of 8 layers and width 1024 with random float32 weights and a vocabulary of 8192 are saved and exported. Each
file runs in processes of its own, in rotating order. A step reads a batch of tokens behind a cache of some length; its
tensors stay where ONNX Runtime put them; the time is the CPU time of `session.run_with_ort_values`, the median of a
process, then of the processes. Ratios are to the decomposed file of the same run. The last line of a model is the
largest difference of a file's last logits from those of the decomposed file, over all cases.

    python -m benchmarks.decode                              # about 20 minutes, with onnxruntime-genai if installed
    python -m benchmarks.decode --models llama --past 1000   # a part
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from .export_cost import genai

SIZE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 8192, "max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 128}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 128, "sliding_window": 512}),
}
BASE = "decomposed"
KINDS = (BASE, "node", "genai")
PREFILL = ((1, 128, 0), (1, 1024, 0))


def build(name: str) -> Any:
    """A decoder with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    model, config, options = MODELS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**SIZE, **options)).eval()


def make(name: str, folder: Path, target: str) -> list[str]:
    """Write the files of a decoder, and the kinds that there are."""
    from rmsnorm_deploy import export_model

    model = build(name)
    model.save_pretrained(folder / "checkpoint")
    for kind in ("decomposed", "node"):
        export_model(model, folder / kind, target=target, with_past=True, attention=kind)
    found = [BASE, "node"]
    try:
        genai(folder / "checkpoint", folder / "genai")
    except ImportError:
        print("onnxruntime-genai is not installed", file=sys.stderr)
    else:
        found.append("genai")
    return found


def feeds_for(session: Any, config: dict[str, Any], batch: int, tokens: int, past: int) -> dict[str, Any]:
    """Random tokens behind a random cache."""
    import numpy as np
    import onnxruntime

    arrays: dict[str, Any] = {}
    for value in session.get_inputs():
        random = np.random.default_rng(zlib.crc32(value.name.encode()))  # the same in every file
        if value.name.startswith("past_key_values."):
            shape = (batch, config["num_key_value_heads"], past, config["head_dim"])
            arrays[value.name] = random.standard_normal(shape, dtype=np.float32)
        elif value.name == "attention_mask":
            arrays[value.name] = np.ones((batch, past + tokens), np.int64)
        elif value.name == "position_ids":
            arrays[value.name] = np.tile(np.arange(past, past + tokens), (batch, 1))
        else:
            arrays[value.name] = random.integers(3, 8000, (batch, tokens))
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def child(path: Path, threads: int, cases: list[list[int]], runs: int) -> None:
    """Time each case, and print the seconds of CPU time as JSON."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    config = json.loads((path.parent / "checkpoint" / "config.json").read_text())
    rows, logits = [], []
    for batch, tokens, past in cases:
        feeds, times = feeds_for(session, config, batch, tokens, past), []
        for _ in range(max(3, runs // (8 if tokens > 100 else 1))):
            start = time.process_time()
            results = session.run_with_ort_values(names, feeds)
            times.append(time.process_time() - start)
        rows.append(statistics.median(times[1:]))
        logits.append(results[names.index("logits")].numpy()[:, -1])
        del results, feeds
    np.savez(path / "logits.npz", *logits)
    print(json.dumps(rows), flush=True)


def differences(folder: Path, kinds: list[str]) -> dict[str, float]:
    """The largest difference of each kind's logits from those of the decomposed file, over all cases."""
    import numpy as np

    stored = {kind: np.load(folder / kind / "logits.npz") for kind in kinds}
    return {
        kind: max(float(np.abs(stored[kind][key] - stored[BASE][key]).max()) for key in stored[BASE].files)
        for kind in kinds
    }


def measure(path: Path, threads: int, cases: list[tuple[int, int, int]], runs: int) -> list[float]:
    """The seconds of each case in a process of its own."""
    given = ["--child", str(path), "--threads", str(threads), "--runs", str(runs), "--cases", json.dumps(cases)]
    command = [sys.executable, "-m", "benchmarks.decode", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{path.name} failed: {done.stderr[-500:]}")
    return list(json.loads(done.stdout.splitlines()[-1]))


def run(name: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the lines of one model."""
    kinds = make(name, folder, arguments.target)
    cases = [(batch, 1, past) for past in arguments.past for batch in arguments.batch] + list(PREFILL)
    times: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for number in range(arguments.rounds):
        for kind in (*kinds[number % len(kinds) :], *kinds[: number % len(kinds)]):
            times[kind].append(measure(folder / kind, arguments.threads, cases, arguments.runs))
    off = differences(folder, kinds)
    for position, (batch, tokens, past) in enumerate(cases):
        medians = {kind: statistics.median(row[position] for row in rows) for kind, rows in times.items()}
        cells = [f"{medians[kind] * 1e3:.1f} ({medians[kind] / medians[BASE]:.2f})" for kind in kinds]
        print(f"| {name} | {batch}, {tokens}, {past} | {' | '.join(cells)} |", flush=True)
    print(f"| {name} | logits off by | {' | '.join(f'{off[kind]:.1e}' for kind in kinds)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--past", nargs="+", type=int, default=[128, 1000, 4000], help="tokens in the cache")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], help="rows of a batch")
    parser.add_argument("--target", default="ort", help="the target of both of our files")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each file")
    parser.add_argument("--runs", type=int, default=40, help="runs of each case; the first is not counted")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.threads, arguments.cases, arguments.runs)
        return
    print(f"| model | batch, tokens, past | {' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}", flush=True)
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            run(name, Path(folder), arguments)


if __name__ == "__main__":
    main()
