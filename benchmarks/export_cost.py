"""Measure an export from a checkpoint: time, peak memory, and bytes read, for Llama shapes of 1.1e9 to 70e9 parameters.

Each row is a process of its own. Its seconds include the start of Python and the imports; its peak is the resident
memory of the process, mapped files included; its bytes are those that it read by calls and by pages of the checkpoint,
less those of the imports. The checkpoint of 1.1e9 parameters has random values; the larger ones are sparse files of the
right size whose norms alone have values, because no export reads the others. Beside it, for 1.1e9 parameters: what
`torch.export` alone takes, `torch.onnx.export` on the loaded model, and the builder of onnxruntime-genai, if installed.

    python -m benchmarks.export_cost                  # the table; requires 20 GB of disk and about 15 minutes
    python -m benchmarks.export_cost --sizes 1.1      # one size
    python -m benchmarks.export_cost --layers 2       # a quick look
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "1.1": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "8": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "70": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
_SHARD = 5_000_000_000
_INDEX = "model.safetensors.index.json"


def save(folder: Path, size: str, layers: int | None) -> None:
    """Write a bfloat16 checkpoint: random for 1.1, sparse for the others."""
    import torch
    import transformers

    shape = {**SHAPES[size], **({"num_hidden_layers": layers} if layers else {})}
    config = transformers.LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = transformers.LlamaForCausalLM(config).state_dict()
    shards: list[dict[str, Any]] = [{}]
    room = _SHARD
    for name, tensor in tensors.items():
        if tensor.numel() * 2 > room and shards[-1]:
            shards, room = [*shards, {}], _SHARD
        shards[-1][name], room = tensor.shape, room - tensor.numel() * 2
    names = {}
    for number, rows in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        names |= dict.fromkeys(rows, file)
        _write_shard(folder / file, rows, size == "1.1")
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _write_shard(path: Path, rows: dict[str, Any], random: bool) -> None:
    import torch

    header, end = {}, 0
    for name, shape in rows.items():
        size = shape.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for name, shape in rows.items():
            if random or "norm" in name:
                values = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.02
                file.seek(start + header[name]["data_offsets"][0])  # type: ignore[index]
                file.write(values.to(torch.bfloat16).view(torch.int16).numpy().data)


def ours(folder: Path, out: Path) -> None:
    from rmsnorm_deploy import export_model

    export_model(folder, out)


def torch_export(folder: Path, _: Path) -> None:
    """`torch.export` alone, with the weights at rest; what an export takes at least."""
    import torch

    from rmsnorm_deploy import load_model

    model = load_model(str(folder)).model
    ids = torch.randint(0, 1000, (2, 9))
    dims = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    start = time.perf_counter()
    with torch.no_grad():
        torch.export.export(
            model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes={"input_ids": dims, "use_cache": None},
            strict=False,
        )  # fmt: skip
    print(json.dumps({"alone": time.perf_counter() - start}), flush=True)


def torch_onnx(folder: Path, out: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.randint(0, 1000, (2, 9))
    dims = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    out.mkdir()
    with torch.no_grad():
        program = torch.onnx.export(
            model, (), kwargs={"input_ids": ids, "use_cache": False}, dynamo=True,
            dynamic_shapes={"input_ids": dims, "use_cache": None},
        )  # fmt: skip
    assert program is not None
    program.save(out / "model.onnx", external_data=True)


def genai(folder: Path, out: Path, weights: str = "fp32") -> None:
    """onnxruntime-genai's builder in float32, because it has no bfloat16 for the CPU; it requires a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    builder = "onnxruntime_genai.models.builder"
    sys.argv = [builder, "-i", str(folder), "-o", str(out), "-p", weights, "-e", "cpu", "-c", str(out / "cache")]
    runpy.run_module(builder, run_name="__main__", alter_sys=True)


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "rmsnorm export": ours,
    "torch.export alone": torch_export,
    "torch.onnx.export": torch_onnx,
    "onnxruntime-genai": genai,
}


def status_bytes(kind: str) -> int:
    """A figure of `/proc/self/status` in bytes, such as `VmHWM`, the largest resident memory so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(kind))


def _read_by_calls() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def child(step: str, folder: Path, out: Path) -> None:
    """Run one step, and print what it cost as JSON."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    before, pages = _read_by_calls(), 0
    base = status_bytes("RssFile")
    done = threading.Event()

    def watch() -> None:
        nonlocal pages
        while not done.wait(0.05):
            pages = max(pages, status_bytes("RssFile") - base)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        STEPS[step](folder, out)
    finally:
        done.set()
        thread.join()
    print(json.dumps({"peak": status_bytes("VmHWM"), "read": _read_by_calls() - before + max(pages, 0)}), flush=True)


def measure(step: str, folder: Path, out: Path) -> dict[str, Any]:
    """The cost of a step: seconds, and peak and read in bytes; `failed` with the last line of its errors."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.export_cost", "--child", step, str(folder), str(out)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"seconds": time.perf_counter() - start}
    if process.returncode:
        return {"failed": (process.stderr.strip().splitlines() or ["no message"])[-1][:100]}
    for line in process.stdout.splitlines():
        if line.startswith("{"):
            row |= json.loads(line)
    shutil.rmtree(out, ignore_errors=True)
    return row


def _line(size: str, step: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {size}e9 | {step} | - | - | {row['failed']} |"
    seconds = f"{row['seconds']:.1f}" + (f" ({row['alone']:.1f} without the start)" if "alone" in row else "")
    return f"| {size}e9 | {step} | {seconds} | {row['peak'] / 2**30:.2f} | {row['read'] / 1e6:.0f} |"


def run(sizes: list[str], layers: int | None, folder: Path) -> None:
    """Print the table, a line as soon as it is known."""
    print("| parameters | what | seconds | peak GiB | MB read |\n|---|---|---|---|---|", flush=True)
    for size in sizes:
        place = folder / size
        save(place, size, layers)
        steps = list(STEPS) if size == "1.1" else ["rmsnorm export"]
        for step in steps:
            print(_line(size, step, measure(step, place, folder / "out")), flush=True)
        shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export_cost", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="billions of parameters")
    parser.add_argument("--layers", type=int, help="layers of each model, for a quick look")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written; a temporary folder if omitted")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], *map(Path, arguments.child[1:]))
        return
    if not Path("/proc/self/io").exists():
        parser.exit(4, "export_cost: expected /proc of Linux, which tells the bytes that a process reads.\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(arguments.sizes, arguments.layers, Path(folder))


if __name__ == "__main__":
    main()
