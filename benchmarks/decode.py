"""Time one step of a decoder in ONNX Runtime: our files beside onnxruntime-genai's, transformers' and PyTorch.

Decoders of 8 layers and width 1024 with random weights and a vocabulary of 8192 are saved and exported. Each file runs
in processes of its own, in rotating order. A step reads a batch of tokens behind a cache of some length; its tensors
stay where ONNX Runtime put them. With one thread, the time is the CPU time of `session.run_with_ort_values`, otherwise
the time of a clock; the median of a process, then of the processes. Ratios are to the first column of the same run:

- ours: target ort, with attention as one node; decomposed: with attention in primitive operators.
- in place: target ort with `--attention in-place`; the cache is one buffer, bound as input and as output.
- fusions: transformers' exporter with ort_fusions, a file for the prompt and one for single tokens.
- genai: the file of onnxruntime-genai's builder; genai in place: with one buffer, as its own loop binds it.
- PyTorch: the model in transformers.

The last lines of a model are the largest difference of the last logits from the first column, and the time of the
fastest of our files by that of the fastest other: the median and the largest of all cases.

    python -m benchmarks.decode                              # about 40 minutes, with onnxruntime-genai if installed
    python -m benchmarks.decode --models llama --past 1000 --weights int4   # a part
"""

from __future__ import annotations

import argparse
import contextlib
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

from .export_cost import genai, status_bytes

SIZE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 8192, "max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 128}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 128, "sliding_window": 512}),
}
OURS = "ours"
IN_PLACE = {"in place": "in place", "genai in place": "genai"}  # and the folders of their files
COLUMNS = {
    "fp32": (OURS, "in place", "decomposed", "fusions", "genai", "genai in place", "PyTorch"),
    "int8": (OURS, "in place"),
    "int4": (OURS, "in place", "genai", "genai in place"),
}
ATTENTION: dict[str, Any] = {OURS: "node", "in place": "in-place", "decomposed": "decomposed"}
PREFILL = ((1, 128, 0), (1, 1024, 0))
Case = tuple[int, int, int]


def build(name: str) -> Any:
    """A decoder with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    model, config, options = MODELS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**SIZE, **options)).eval()


def fusions(model: Any, folder: Path) -> None:
    """Write the files of transformers' own exporter."""
    import onnx_ir as ir
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter

    ids = torch.randint(3, 8000, (2, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    made = OnnxExporter().export_for_generation(model, given, config)
    folder.mkdir()
    for name, component in made.components.items():
        ir.save(component.program, folder / f"{name}.onnx", external_data=f"{name}.data")


def make(name: str, weights: str, target: str, folder: Path, columns: list[str]) -> list[str]:
    """Write the files of a decoder; returns those of the columns that there are."""
    from rmsnorm_deploy import export_model

    model, found = build(name), []
    model.save_pretrained(folder / "checkpoint")
    for kind in (kind for kind in COLUMNS[weights] if kind in columns):
        try:
            if kind in ATTENTION:
                export_model(
                    model, folder / kind, target=target, with_past=True, attention=ATTENTION[kind],
                    quantize=None if weights == "fp32" else weights,
                )  # fmt: skip
            elif kind in IN_PLACE and IN_PLACE[kind] not in found:
                continue
            elif kind == "fusions":
                fusions(model, folder / kind)
            elif kind == "genai":
                genai(folder / "checkpoint", folder / kind, weights)
        except Exception as error:  # a peer that is not installed or rejects the model has no column
            if kind == OURS:
                raise
            print(f"{name}, {weights}: {kind} left out: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        else:
            found.append(kind)
    return found


def arrays_for(names: dict[str, str], config: dict[str, Any], case: Case) -> dict[str, Any]:
    """Random tokens behind a random cache, by the names of inputs; the same for every file."""
    import numpy as np

    batch, tokens, past = case
    arrays: dict[str, Any] = {}
    for name, role in names.items():
        random = np.random.default_rng(zlib.crc32(role.encode()))
        if role.startswith("past"):
            shape = (batch, config["num_key_value_heads"], past, config["head_dim"])
            arrays[name] = random.standard_normal(shape, dtype=np.float32)
        elif role == "attention_mask":
            arrays[name] = np.ones((batch, past + tokens), np.int64)
        elif role == "position_ids":
            arrays[name] = np.tile(np.arange(past, past + tokens), (batch, 1))
        else:
            arrays[name] = random.integers(3, 8000, (batch, tokens))
    return arrays


def role_of(name: str) -> str:
    """What an input is, of the names of all writers: `past_key_values.0.key`, `past_key_values_layers_0_keys`."""
    if "past" not in name and "cache" not in name:
        return next(role for role in ("input_ids", "attention_mask", "position_ids") if role in name)
    numbers = [part for part in name.replace("_", ".").split(".") if part.isdigit()]
    return f"past.{numbers[0]}.{'key' if 'key' in name.rsplit(numbers[0], 1)[-1] else 'value'}"


class OrtStep:
    """A step of the file of a case in a folder.

    Args:
        folder: of the files.
        threads: of ONNX Runtime.
        config: the model's config.json.
        in_place: whether the cache is one buffer, bound as input and as output.
    """

    def __init__(self, folder: Path, threads: int, config: dict[str, Any], in_place: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._config, self._in_place = config, in_place
        self._sessions = {
            path.stem: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for path in folder.glob("*.onnx")
        }

    def prepare(self, case: Case) -> Any:
        """What runs a case, and where the logits come out."""
        import numpy as np
        import onnxruntime

        session = self._sessions.get("model") or self._sessions["prefill" if case[2] == 0 else "decode"]
        names = {value.name: role_of(value.name) for value in session.get_inputs()}
        arrays, outputs = arrays_for(names, self._config, case), [value.name for value in session.get_outputs()]
        if self._in_place:
            for name in [name for name, role in names.items() if role.startswith("past")]:
                room = np.zeros((*arrays[name].shape[:2], sum(case[1:]) + 64, arrays[name].shape[3]), np.float32)
                room[:, :, : case[2]] = arrays[name]
                arrays[name] = room
        place = next(place for place, name in enumerate(outputs) if "logits" in name)
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        if not self._in_place:
            return lambda: session.run_with_ort_values(outputs, values)[place]
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            past = name.replace("present", "past_key_values")
            if past in values:
                binding.bind_ortvalue_output(name, values[past])
            else:
                binding.bind_output(name, "cpu")

        def run() -> Any:
            session.run_with_iobinding(binding)
            return binding.get_outputs()[place]

        return run

    def run(self, prepared: Any) -> Any:
        """One step; the last logits."""
        return prepared()

    def logits(self, result: Any) -> Any:
        """The logits of the last tokens."""
        return result.numpy()[:, -1]


class TorchStep:
    """A step of the model in transformers."""

    def __init__(self, name: str, threads: int, config: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(threads)
        self._model, self._config = build(name), config

    def prepare(self, case: Case) -> Any:
        """The inputs of a case; the cache is made by each run, because a run changes it."""
        import torch

        layers = range(self._config["num_hidden_layers"])
        roles = ["input_ids", "attention_mask", "position_ids"]
        roles += [f"past.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
        return {
            name: torch.from_numpy(array)
            for name, array in arrays_for({r: r for r in roles}, self._config, case).items()
        }

    def run(self, prepared: Any) -> Any:
        """One step; the last logits."""
        import torch
        from transformers import DynamicCache

        layers = range(self._config["num_hidden_layers"])
        cache = DynamicCache([(prepared[f"past.{layer}.key"], prepared[f"past.{layer}.value"]) for layer in layers])
        given = {name: value for name, value in prepared.items() if not name.startswith("past")}
        with torch.inference_mode():
            return self._model(**given, past_key_values=cache, logits_to_keep=0).logits

    def logits(self, result: Any) -> Any:
        """The logits of the last tokens."""
        return result[:, -1].numpy()


def child(path: Path, name: str, threads: int, cases: list[Case], runs: int) -> None:
    """Time each case, and print the seconds as JSON, and the largest resident memory after each, in bytes."""
    import numpy as np

    config = json.loads((path.parent / "checkpoint" / "config.json").read_text())
    folder, in_place = path.with_name(IN_PLACE.get(path.name, path.name)), path.name in IN_PLACE
    step: Any = (
        TorchStep(name, threads, config) if path.name == "PyTorch" else OrtStep(folder, threads, config, in_place)
    )
    clock = time.process_time if threads == 1 else time.perf_counter
    rows, memory, logits = [], [], []
    for case in cases:
        prepared, times = step.prepare(case), []
        for _ in range(max(3, runs // (8 if case[1] > 100 else 1))):
            start = clock()
            result = step.run(prepared)
            times.append(clock() - start)
        rows.append(statistics.median(times[1:]))
        logits.append(step.logits(result))
        memory.append(status_bytes("VmHWM"))
        del result, prepared
    np.savez(path.parent / f"{path.name}.npz", *logits)
    print(json.dumps([rows, memory]), flush=True)


def differences(folder: Path, kinds: list[str]) -> list[float]:
    """The largest difference of each kind's logits from ours, over all cases."""
    import numpy as np

    stored = [np.load(folder / f"{kind}.npz") for kind in kinds]
    return [max(float(np.abs(one[key] - stored[0][key]).max()) for key in stored[0].files) for one in stored]


def _size(folder: Path) -> int:
    """The bytes of the models in a folder; 0 without one."""
    kept = (".onnx", ".data", ".safetensors")
    return sum(file.stat().st_size for file in folder.glob("*") if file.suffix in kept) if folder.is_dir() else 0


def measure(path: Path, name: str, threads: int, cases: list[Case], runs: int) -> tuple[list[float], list[int]]:
    """The seconds of each case, and the peak memory up to it, in a process of its own."""
    given = ["--child", str(path), "--models", name, "--threads", str(threads), "--runs", str(runs)]
    command = [sys.executable, "-m", "benchmarks.decode", *given, "--cases", json.dumps(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{path.name} failed: {done.stderr[-500:]}")
    rows, memory = json.loads(done.stdout.splitlines()[-1])
    return rows, memory


def runs(path: Path, name: str, case: Case) -> bool:
    """Whether a file runs; ours must."""
    try:
        measure(path, name, 1, [case], 1)
    except RuntimeError as error:
        if path.name in ATTENTION:
            raise
        print(f"{name}: {path.name} left out: {error}", file=sys.stderr)
        return False
    return True


def run(name: str, weights: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the lines of one model."""
    with contextlib.redirect_stdout(sys.stderr):
        kinds = make(name, weights, arguments.target, folder, [OURS, *arguments.columns])
    cases: list[Case] = [(batch, 1, past) for past in arguments.past for batch in arguments.batch] + list(PREFILL)
    kinds = [kind for kind in kinds if runs(folder / kind, name, cases[0])]
    for threads in arguments.threads:
        print(f"\n{name}, {weights}, threads: {threads}\n", flush=True)
        print(f"| batch, tokens, past | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}", flush=True)
        times: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        memory = {kind: [0] * len(cases) for kind in kinds}
        for number in range(arguments.rounds):
            for kind in (*kinds[number % len(kinds) :], *kinds[: number % len(kinds)]):
                row, used = measure(folder / kind, name, threads, cases, arguments.runs)
                times[kind].append(row)
                memory[kind] = [max(pair) for pair in zip(memory[kind], used, strict=True)]
        behind = []
        for position, case in enumerate(cases):
            medians = {kind: statistics.median(row[position] for row in rows) for kind, rows in times.items()}
            cells = [f"{medians[kind] * 1e3:.1f} ({medians[kind] / medians[OURS]:.2f})" for kind in kinds]
            print(f"| {', '.join(map(str, case))} | {' | '.join(cells)} |", flush=True)
            peers = [value for kind, value in medians.items() if kind not in ATTENTION]
            best = min(value for kind, value in medians.items() if kind in ATTENTION)
            behind += [best / min(peers)] if peers else []
        print(f"| logits off by | {' | '.join(f'{off:.1e}' for off in differences(folder, kinds))} |")
        steps = len(cases) - len(PREFILL)
        for place, title in ((steps - 1, "steps"), (len(cases) - 1, "steps and prompts")):
            print(f"| peak memory of {title}, GB | {' | '.join(f'{memory[k][place] / 1e9:.2f}' for k in kinds)} |")
        sizes = [_size(folder / IN_PLACE.get(kind, kind)) for kind in kinds]
        print(f"| files, MB | {' | '.join(f'{size / 1e6:.0f}' for size in sizes)} |")
        if behind:
            middle, most = statistics.median(behind), max(behind)
            line = f"the fastest of ours by the fastest other: median {middle:.2f}, largest {most:.2f}"
            print(f"\n{line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--weights", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    columns = [kind for kind in COLUMNS["fp32"] if kind != OURS]
    parser.add_argument("--columns", nargs="+", choices=columns, default=columns, help="beside ours")
    parser.add_argument("--past", nargs="+", type=int, default=[128, 1000, 4000], help="tokens in the cache")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], help="rows of a batch")
    parser.add_argument("--target", default="ort", help="the target of our files")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="threads of ONNX Runtime")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each file")
    parser.add_argument("--runs", type=int, default=24, help="runs of each case; the first is not counted")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.models[0], arguments.threads[0], arguments.cases, arguments.runs)
        return
    for name in arguments.models:
        for weights in arguments.weights:
            with tempfile.TemporaryDirectory() as folder:
                run(name, weights, Path(folder), arguments)


if __name__ == "__main__":
    main()
