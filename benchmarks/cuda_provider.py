"""Validate exported models in ONNX Runtime's CUDA provider, and time their norms there.

    python -m benchmarks.cuda_provider                     # both tables
    python -m benchmarks.cuda_provider --jobs 12 --json cuda.json

Requires an NVIDIA GPU and `pip install 'rmsnorm-deploy[gpu,hf]'`.

First table: small models of transformers with random weights, exported with a KV cache for each target in each dtype,
compared with PyTorch on the CPU (`rmsnorm validate --provider cuda:use_tf32=0`; with TF32, which is ONNX Runtime's
default, no float32 model is as accurate as PyTorch). Second table: a decoder of 8 layers in float16, median time of one
run for each target, with the inputs and outputs on the GPU, runs in turns. The exit code is 1 if a model is less
accurate than PyTorch.

    python -m benchmarks.cuda_provider --folder DIR        # keep the exports, and use those that are there
    python -m benchmarks.cuda_provider --folder DIR --provider cpu
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.errors import RmsnormDeployError
from rmsnorm_deploy.runtime.runners.onnxruntime import import_onnxruntime, optimized_op_counts
from rmsnorm_deploy.runtime.validation.api import validate

TARGETS = ("primitives", "standard", "ort", "plugin")
DTYPES = ("float32", "float16", "bfloat16")
MODELS = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "T5ForConditionalGeneration")
RUNS = 50
_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_TIMED: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 2048,
}  # fmt: skip


def built(name: str, sizes: dict[str, Any]) -> nn.Module:
    """A model of transformers with random weights, and norms whose weights differ."""
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model: nn.Module = kind(kind.config_class(**sizes)).eval()
    with torch.no_grad():
        for where, parameter in model.named_parameters():
            if parameter.dim() == 1:
                offset = 0.0 if "gemma" in name.lower() and "norm" in where else 1.0
                parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
    return model


@dataclass(frozen=True)
class Job:
    """One model, exported for one target."""

    model: str
    target: str
    dtype: str
    folder: Path
    provider: str

    @property
    def place(self) -> Path:
        """The exported folder."""
        return self.folder / f"{self.model}-{self.target}-{self.dtype}"


def checked(job: Job) -> dict[str, Any]:
    """Export and validate one model, in this process."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row: dict[str, Any] = {"model": job.model, "target": job.target, "dtype": job.dtype}
    start = time.perf_counter()
    try:
        model = built(job.model, _T5 if job.model.startswith("T5") else _SIZES).to(getattr(torch, job.dtype))
        if not job.place.is_dir():
            export_model(model, job.place, target=job.target, with_past=True)
        report = validate(job.place, model, provider=job.provider)
        parts = {
            "outputs": [one.passed for _, one in report.rows],
            "norms": [norm.passed for norm in report.norms],
            "segments": [segment.verdict.passed for segment in report.segments],
        }
        row |= {part: f"{found.count(True)}/{len(found)}" for part, found in parts.items()}
        row |= {"verdict": report.verdict, "detail": "; ".join([*map(str, report.culprits), *report.notes])[:600]}
    except RmsnormDeployError as error:
        row |= {"verdict": "refused", "detail": " ".join(str(error).split())[:600]}
    except Exception as error:
        row |= {"verdict": "failed", "detail": f"{type(error).__name__}: {error}"[:600]}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def timed_export(place: Path) -> None:
    """Export the model whose time is measured, for the target that is the folder's name."""
    if not place.is_dir():
        export_model(built("LlamaForCausalLM", _TIMED).to(torch.float16), place, target=place.name)


def timed(folder: Path) -> Iterator[dict[str, Any]]:
    """The time of one run of each file that `timed_export` wrote, for several batches and lengths."""
    ort = import_onnxruntime()
    sessions = {
        target: ort.InferenceSession(str(folder / target / "model.onnx"), providers=["CUDAExecutionProvider"])
        for target in TARGETS
    }
    for batch, length in ((1, 1), (1, 128), (1, 2048), (16, 512)):
        feeds = {
            "input_ids": np.ones((batch, length), np.int64) * np.arange(1, length + 1),
            "attention_mask": np.ones((batch, length), np.int64),
        }
        times: dict[str, list[float]] = {target: [] for target in sessions}
        bindings = {}
        for target, session in sessions.items():
            bindings[target] = session.io_binding()
            for given in session.get_inputs():
                value = ort.OrtValue.ortvalue_from_numpy(feeds[given.name], "cuda", 0)
                bindings[target].bind_ortvalue_input(given.name, value)
            for made in session.get_outputs():
                bindings[target].bind_output(made.name, "cuda")
            for _ in range(5):
                session.run_with_iobinding(bindings[target])
        for _ in range(RUNS):
            for target, session in sessions.items():
                start = time.perf_counter()
                session.run_with_iobinding(bindings[target])
                times[target].append((time.perf_counter() - start) * 1000)
        yield {
            "batch": batch,
            "length": length,
            "milliseconds": {target: round(statistics.median(found), 3) for target, found in times.items()},
        }


def norm_operators(folder: Path) -> dict[str, str]:
    """The operators that compute the norms after ONNX Runtime's optimizations, for each target."""
    found = {}
    for target in TARGETS:
        counts = optimized_op_counts(folder / target / "model.onnx", ["cuda"])
        named = {op: n for op, n in counts.items() if "Norm" in op or op == "Pow" or "Memcpy" in op}
        found[target] = ", ".join(f"{n} {op.split('::')[-1]}" for op, n in sorted(named.items()))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cuda_provider", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=4, help="models at the same time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the exports, and use those that are there")
    parser.add_argument("--provider", default="cuda:use_tf32=0", help="as for rmsnorm validate")
    given = parser.parse_args(arguments)
    ort = import_onnxruntime()
    on_gpu = given.provider.lower().startswith("cuda")
    if on_gpu and "CUDAExecutionProvider" not in ort.get_available_providers():
        print("cuda_provider requires an NVIDIA GPU and pip install 'rmsnorm-deploy[gpu]'.", file=sys.stderr)
        return 4
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"onnxruntime": ort.__version__, "provider": given.provider, "models": rows}
    print("| model | target | dtype | verdict | outputs | norms | segments |\n|" + "---|" * 7)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary)
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
            if on_gpu:
                made = [pool.submit(timed_export, folder / target) for target in TARGETS]
            jobs = [Job(m, t, d, folder, given.provider) for m in MODELS for t in TARGETS for d in DTYPES]
            for row in pool.map(checked, jobs):
                rows.append(row)
                cells = [row[key] for key in ("model", "target", "dtype", "verdict")]
                cells += [row.get(part, "") for part in ("outputs", "norms", "segments")]
                print("| " + " | ".join(cells) + " |", row["detail"] if row["verdict"] != "pass" else "", flush=True)
        if on_gpu:
            for one in made:
                one.result()
            result |= {"times": list(timed(folder)), "operators": norm_operators(folder)}
            _print_times(result)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"{sum(row['verdict'] == 'pass' for row in rows)} of {len(rows)} pass.")
    return 1 if any(row["verdict"] not in ("pass", "refused") for row in rows) else 0


def _print_times(result: dict[str, Any]) -> None:
    print("\n| batch x length | " + " | ".join(f"{target}, ms" for target in TARGETS) + " |\n|" + "---|" * 5)
    for row in result["times"]:
        figures = " | ".join(f"{row['milliseconds'][target]:.3f}" for target in TARGETS)
        print(f"| {row['batch']}x{row['length']} | {figures} |")
    for target, operators in result["operators"].items():
        print(f"{target}: {operators}")


if __name__ == "__main__":
    sys.exit(main())
