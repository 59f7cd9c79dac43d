"""Times of a norm alone in PyTorch and in ONNX Runtime, and of a model's step in ONNX Runtime."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rmsnorm_deploy.models.builtin.addition_task import torch_step
from rmsnorm_deploy.models.builtin.decoder import Decoder, LlamaNorm

from .variants import CONFIG, Variant

WARM_UP = 3  # rounds that are not counted


def rotated(items: Iterable[Any], by: int) -> list[Any]:
    """The items from number `by` on, and those before it behind them."""
    items = list(items)
    return items[by % len(items) :] + items[: by % len(items)]


def clock_of(threads: int) -> Callable[[], float]:
    """The CPU time of the process for one thread, which other programs disturb less; else the time that passed."""
    return time.process_time if threads == 1 else time.perf_counter


def in_turns(
    ways: Mapping[Any, Callable[[], object]], rounds: int, clock: Callable[[], float], calls: int = 1
) -> dict[Any, tuple[float, float]]:
    """Median seconds of a call, and the median over the rounds of its ratio to the first way.

    Args:
        ways: what is timed.
        rounds: rounds that count; each begins with another way, and the first `WARM_UP` are not counted.
        clock: gives seconds, see `clock_of`.
        calls: calls of a way in a row, for times near the clock's resolution.
    """
    times: dict[Any, list[float]] = defaultdict(list)
    for index in range(rounds + WARM_UP):
        for way in rotated(ways, index):
            start = clock()
            for _ in range(calls):
                ways[way]()
            times[way].append((clock() - start) / calls)
    first = times[next(iter(ways))][WARM_UP:]
    return {
        way: (
            statistics.median(times[way][WARM_UP:]),
            statistics.median(a / b for a, b in zip(times[way][WARM_UP:], first, strict=True)),
        )
        for way in ways
    }


def norm_in_torch(rows: int, width: int, rounds: int) -> dict[str, dict[str, tuple[float, float]]]:
    """A norm alone in PyTorch, with gradients of input and parameters: `forward` and `backward` of each module."""
    modules = {
        "nn.LayerNorm": nn.LayerNorm(width, CONFIG.eps),
        "nn.RMSNorm": nn.RMSNorm(width, CONFIG.eps),
        "RMSNorm as a formula": LlamaNorm(width, CONFIG.eps),
    }
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))

    def backward(module: nn.Module) -> Callable[[], object]:
        y, leaves = module(x), (x, *module.parameters())
        return lambda: torch.autograd.grad(y, leaves, weight, retain_graph=True)

    calls, clock = calls_for(rows * width), clock_of(torch.get_num_threads())
    return {
        "forward": in_turns({name: lambda m=module: m(x) for name, module in modules.items()}, rounds, clock, calls),
        "backward": in_turns({name: backward(module) for name, module in modules.items()}, rounds, clock, calls),
    }


def calls_for(elements: int) -> int:
    """Calls in a row, so that each sample has about a quarter of a million elements, and at most 100 calls."""
    return min(100, max(1, 2**18 // elements))


def session(path: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Waiting threads of one session would take the cores from the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runs_of(running: Any, x: np.ndarray) -> Callable[[], list[np.ndarray]]:
    """A run of a session whose one input is x."""
    feeds = {running.get_inputs()[0].name: x}
    return lambda: running.run(None, feeds)


def kernels_of(path: Path) -> str:
    """The operators of norms in the graph that ONNX Runtime runs, after its own fusions, such as `5 LayerNorm...`."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node if "Norm" in node.op_type)
    return ", ".join(f"{count} {op}" for op, count in sorted(found.items()))


def export_norms(folder: Path, width: int) -> dict[str, Path]:
    """Files of one norm each, for any number of rows: LayerNorm by `torch.onnx.export`, RMSNorm by this package."""
    from rmsnorm_deploy.export.from_torch.export_model import export_model

    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    layer_norm = nn.Sequential(nn.LayerNorm(width, CONFIG.eps)).eval()
    paths = {"LayerNorm": folder / "layer_norm.onnx"}
    dims = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(layer_norm, (x,), paths["LayerNorm"], dynamo=True, dynamic_shapes=dims, verbose=False)
    rms_norm = nn.Sequential(nn.RMSNorm(width, CONFIG.eps)).eval()
    for result in export_model(rms_norm, folder / "rms_norm", inputs=(x,), target=["ort", "standard"]):
        paths[f"RMSNorm, target {result.target}"] = result.folder / "model.onnx"
    return paths


def norm_in_ort(rows: int, width: int, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """A norm alone in ONNX Runtime, with the kernel that runs it."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = export_norms(Path(scratch), width)
        sessions = {way: session(path, threads) for way, path in paths.items()}
        x = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
        ways = {way: runs_of(running, x) for way, running in sessions.items()}
        times = in_turns(ways, rounds, clock_of(threads), calls_for(rows * width))
        return {
            way: {"seconds": times[way][0], "ratio": times[way][1], "kernels": kernels_of(path)}
            for way, path in paths.items()
        }


def models_in_ort(
    models: Mapping[Variant, Decoder], calls: Sequence[tuple[int, int]], rounds: int, threads: int
) -> dict[str, dict[Variant, dict[str, Any]]]:
    """A step of each variant, exported by this package for target `ort`, for each batch and number of tokens.

    `off` is the largest difference of the logits from PyTorch's.
    """
    from rmsnorm_deploy.export.from_torch.export_model import export_model

    found: dict[str, dict[Variant, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        paths = {}
        for number, (variant, model) in enumerate(models.items()):
            example = torch.zeros(2, 9, dtype=torch.int64)
            export_model(model, Path(scratch) / str(number), inputs={"input_ids": example}, target="ort")
            paths[variant] = Path(scratch) / str(number) / "model.onnx"
        sessions = {variant: session(path, threads) for variant, path in paths.items()}
        kernels = {variant: kernels_of(path) for variant, path in paths.items()}
        for batch, tokens in calls:
            vocabulary = next(iter(models.values())).config.vocab_size
            ids = np.random.default_rng(0).integers(0, vocabulary, (batch, tokens))
            ways = {variant: runs_of(running, ids) for variant, running in sessions.items()}
            times = in_turns(ways, rounds, clock_of(threads))
            found[f"batch {batch}, tokens {tokens}"] = {
                variant: {
                    "seconds": times[variant][0],
                    "ratio": times[variant][1],
                    "kernels": kernels[variant],
                    "off": float(np.abs(ways[variant]()[0] - torch_step(model)(ids)).max()),
                }
                for variant, model in models.items()
            }
    return found
