"""Measure a validation: peak memory, and time compared with the forward passes that it requires.

A Llama with random weights (1.1e9 parameters, float32, the shape of TinyLlama) is saved, exported and validated, each
in a separate process. The forward passes are then timed separately: the file in ONNX Runtime, the model in PyTorch, and
the model in float64, on every case; a validation runs each of them once for the outputs, and once more on the largest
case for the norms. The time to load the model and the file is listed separately, because every run requires it.

    python -m benchmarks.validate_cost                # the table; requires 12 GB of disk and about ten minutes
    python -m benchmarks.validate_cost --layers 2     # a quick look
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = ((1, 1), (1, 7), (3, 33))


def save(folder: Path, layers: int) -> dict[str, Any]:
    """Save the checkpoint."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "checkpoint")
    return {"parameters": sum(p.numel() for p in model.parameters())}


def export(folder: Path) -> dict[str, Any]:
    """Export the checkpoint."""
    from rmsnorm_deploy import export_model, load_model

    start = time.perf_counter()
    export_model(load_model(str(folder / "checkpoint")).model, folder / "exported", target="ort")
    return {"seconds": time.perf_counter() - start}


def validate(folder: Path) -> dict[str, Any]:
    """Validate the export; the text of every step is printed to stderr with its time."""
    from rmsnorm_deploy import load_model
    from rmsnorm_deploy.runtime.validation.api import validate as validate_model

    start = time.perf_counter()
    model = load_model(str(folder / "checkpoint")).model
    loaded = time.perf_counter()
    report = validate_model(
        folder / "exported",
        model,
        progress=lambda text: print(f"{time.perf_counter() - loaded:7.1f} s {text}", file=sys.stderr),
    )
    return {
        "load_seconds": loaded - start,
        "seconds": time.perf_counter() - loaded,
        "verdict": report.verdict,
        "summary": report.summary,
    }


def forward(folder: Path) -> dict[str, Any]:
    """Time the forward passes."""
    from rmsnorm_deploy import OrtRunner, TorchRunner, load_model
    from rmsnorm_deploy.runtime.norms.float64_model import in_float64
    from rmsnorm_deploy.runtime.validation.run_cases import made_up_cases

    seconds: dict[str, list[float]] = {}

    def timed(side: str, runner: Any, feeds: Any) -> None:
        start = time.perf_counter()
        runner.run(feeds)
        seconds.setdefault(side, []).append(time.perf_counter() - start)

    model = load_model(str(folder / "checkpoint")).model
    start = time.perf_counter()
    with OrtRunner(folder / "exported" / "model.onnx") as runner:
        opening = time.perf_counter() - start
        cases = made_up_cases(runner.inputs(), model, CASES, seed=0)
        for case in cases:
            timed("ONNX Runtime", runner, case.feeds)
    runner_of = TorchRunner(model)
    for case in cases:
        timed("PyTorch", runner_of, case.feeds)
    with in_float64(model):
        for case in cases:
            timed("PyTorch in float64", runner_of, case.feeds)
    return {"opening_seconds": opening, "forward": seconds}


def step(name: str, folder: Path, layers: int) -> dict[str, Any]:
    """Run one step in a separate process, and add its peak memory."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.validate_cost",
        "--step",
        name,
        "--work",
        str(folder),
        "--layers",
        str(layers),
    ]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.validate_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--step", choices=("save", "export", "validate", "forward"))
    arguments = parser.parse_args()
    if arguments.step:
        steps = {"export": export, "validate": validate, "forward": forward}
        name, folder = arguments.step, arguments.work
        found = save(folder, arguments.layers) if name == "save" else steps[name](folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**found, "peak_gib": peak}))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        steps_done = {s: step(s, Path(name), arguments.layers) for s in ("save", "export", "validate", "forward")}
    show(steps_done)
    if arguments.json:
        arguments.json.write_text(json.dumps(steps_done, indent=2) + "\n")


def show(done: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    forward_passes = done["forward"]["forward"]
    needed = sum(sum(times) + max(times) for times in forward_passes.values())
    total, opening = done["validate"]["seconds"], done["forward"]["opening_seconds"]
    print(f"{done['save']['parameters'] / 1e9:.2f}e9 parameters, float32; verdict: {done['validate']['verdict']}")
    print(f"{done['validate']['summary']}")
    for side, times in forward_passes.items():
        print(f"  {side:20}" + "  ".join(f"{b}x{n} {t:6.2f} s" for (b, n), t in zip(CASES, times, strict=True)))
    print(f"peak memory: export {done['export']['peak_gib']:.1f} GiB, validate {done['validate']['peak_gib']:.1f} GiB")
    print(f"validate: {total:.1f} s in total; required forward passes {needed:.1f} s; opening the file {opening:.1f} s")
    print(f"overhead: {(total - needed - opening) / needed:.2f}x the forward passes ({total / needed:.2f}x in total)")


if __name__ == "__main__":
    main()
