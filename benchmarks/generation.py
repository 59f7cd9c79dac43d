"""Tokens per second of whole generations, beside onnxruntime-genai's loop and PyTorch's, and where our time goes.

    python -m benchmarks.generation [--models llama qwen3 gemma3] [--weights fp32 int4] [--batch 1 4] [--prompt 128]
                                    [--new 64] [--rounds 3]

Models are those of `benchmarks.decode`. Each column runs in a process of its own, in rotating order, with all cores;
prefill counts. Ours is `Generator` with `--attention in-place`, and `outside` is the part of its time outside ONNX
Runtime's runs. onnxruntime-genai is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .decode import MODELS, OURS, build
from .export_cost import genai

COLUMNS = (OURS, "genai", "PyTorch")
_FIRST, _LAST = 3, 8000  # the tokens of prompts


def make(name: str, weights: str, folder: Path) -> list[str]:
    """Write the files of a decoder; returns the columns that there are."""
    from rmsnorm_deploy import export_model

    model = build(name)
    model.save_pretrained(folder / "checkpoint")
    quantize: Any = None if weights == "fp32" else weights
    export_model(model, folder / OURS, target="ort", with_past=True, attention="in-place", quantize=quantize)
    try:
        genai(folder / "checkpoint", folder / "genai", weights)
    except Exception as error:
        print(f"{name}, {weights}: genai left out: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return [OURS] + (["PyTorch"] if weights == "fp32" else [])
    return [kind for kind in COLUMNS if kind != "PyTorch" or weights == "fp32"]


def prompts(batch: int, length: int) -> Any:
    """Random tokens, `[batch, length]`."""
    import numpy as np

    return np.random.default_rng(0).integers(_FIRST, _LAST, (batch, length))


def run_ours(folder: Path, batch: int, length: int, new: int) -> tuple[float, float]:
    """Seconds of a generation, and of ONNX Runtime's runs in it."""
    from onnxruntime.capi.onnxruntime_inference_collection import Session

    from rmsnorm_deploy.runtime.generation.api import Generator

    inside = 0.0
    for method in ("run_with_ort_values", "run_with_iobinding"):
        original = getattr(Session, method)

        def timed(*given: Any, original: Any = original, **named: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            result = original(*given, **named)
            inside += time.perf_counter() - start
            return result

        setattr(Session, method, timed)
    rows = prompts(batch, length).tolist()
    with Generator(folder) as generator:
        generator.generate_batch(rows, max_new_tokens=2)
        inside, start = 0.0, time.perf_counter()
        found = generator.generate_batch([[*row[1:], row[0]] for row in rows], max_new_tokens=new)
        seconds = time.perf_counter() - start
    assert [len(one.ids) for one in found] == [new] * batch
    return seconds, inside


def run_genai(folder: Path, batch: int, length: int, new: int) -> tuple[float, float]:
    """Seconds of a generation with onnxruntime-genai."""
    import onnxruntime_genai as og

    model, seconds = og.Model(str(folder)), 0.0
    for _ in range(2):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(
            max_length=length + new, min_length=length + new, batch_size=batch, do_sample=False
        )
        generator = og.Generator(model, parameters)
        rows = prompts(batch, length)
        start = time.perf_counter()
        generator.append_tokens(rows.astype("int32") if batch > 1 else rows[0].tolist())
        while not generator.is_done():
            generator.generate_next_token()
        seconds = time.perf_counter() - start
        assert len(generator.get_sequence(0)) == length + new
    return seconds, 0.0


def run_torch(name: str, batch: int, length: int, new: int) -> tuple[float, float]:
    """Seconds of a generation with transformers."""
    import torch

    model, seconds = build(name), 0.0
    ids = torch.from_numpy(prompts(batch, length))
    for count in (2, new):
        start = time.perf_counter()
        counts = {"max_new_tokens": count, "min_new_tokens": count}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **counts)
        seconds = time.perf_counter() - start
    return seconds, 0.0


def child(folder: Path, name: str, batch: int, length: int, new: int) -> None:
    """Print the seconds as JSON."""
    if folder.name == "PyTorch":
        result = run_torch(name, batch, length, new)
    else:
        result = (run_genai if folder.name == "genai" else run_ours)(folder, batch, length, new)
    print(json.dumps(result))


def measured(folder: Path, name: str, batch: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """The seconds of one column, in a process of its own."""
    given = ["--child", str(folder), "--models", name, "--batch", str(batch)]
    given += ["--prompt", str(arguments.prompt), "--new", str(arguments.new)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.generation", *given], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{folder.name} failed: {done.stderr[-500:]}")
    seconds, inside = json.loads(done.stdout.splitlines()[-1])
    return seconds, inside


def run(name: str, weights: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the lines of one model."""
    with contextlib.redirect_stdout(sys.stderr):
        kinds = make(name, weights, folder)
    for batch in arguments.batch:
        rows: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for number in range(arguments.rounds):
            for kind in (*kinds[number % len(kinds) :], *kinds[: number % len(kinds)]):
                rows[kind].append(measured(folder / kind, name, batch, arguments))
        cells = []
        own = statistics.median(seconds for seconds, _ in rows[OURS])
        for kind in COLUMNS:
            if kind not in rows:
                cells.append("")
                continue
            seconds = statistics.median(seconds for seconds, _ in rows[kind])
            cells.append(f"{batch * arguments.new / seconds:.1f} ({own / seconds:.2f})")
        outside = statistics.median(1 - inside / seconds for seconds, inside in rows[OURS])
        print(f"| {name}, {weights}, {batch} | {' | '.join(cells)} | {100 * outside:.1f}% |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--weights", nargs="+", choices=["fp32", "int4"], default=["fp32", "int4"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], help="rows of a batch")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each column")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.models[0], arguments.batch[0], arguments.prompt, arguments.new)
        return
    print(f"| model, weights, batch | {' | '.join(COLUMNS)} | outside |", flush=True)
    print(f"|---|{'---|' * (len(COLUMNS) + 1)}", flush=True)
    for name in arguments.models:
        for weights in arguments.weights:
            with tempfile.TemporaryDirectory() as folder:
                run(name, weights, Path(folder), arguments)


if __name__ == "__main__":
    main()
