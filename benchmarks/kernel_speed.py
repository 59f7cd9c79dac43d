"""Time the CUDA kernel on a GPU against PyTorch's kernels and against a copy of the same number of bytes.

    python -m benchmarks.kernel_speed                      # the table, about three minutes on an H100
    python -m benchmarks.kernel_speed --no-compile         # without torch.compile
    python -m benchmarks.kernel_speed --no-overlap         # without programmatic dependent launch
    python -m benchmarks.kernel_speed --json speed.json

Requires an NVIDIA GPU, the CUDA build of torch, and `pip install 'rmsnorm-deploy[kernel]'`.

Each row is one operator, dtype, number of rows and width. The result is compared with float64 before it is timed. All
ways are recorded in CUDA graphs of many launches on different tensors; the graphs are replayed in turns, each after the
L2 cache has been overwritten. The time is the median over the replays, divided by the launches in the graph. `copy` is
`Tensor.copy_` of the same total number of bytes. The exit code is 1 if a result is not accurate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsnorm_deploy.plugins.kernel.compiler import CompiledKernel, compile_kernel
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, choose
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from rmsnorm_deploy.plugins.tensorrt.images import KernelImages, image_of
from rmsnorm_deploy.plugins.tensorrt.launcher import Launcher, cuda_driver

EPSILON = 1e-6
REPLAYS = 30
# Bytes of all tensors of a graph, and the most and fewest launches in it.
GRAPH_BYTES, MOST_LAUNCHES, FEWEST_LAUNCHES = 256 << 20, 64, 4
# Overwritten before each replay; larger than the L2 cache of any GPU so far.
FLUSHED_BYTES = 256 << 20
# Units in the last place of the result.
ACCURATE = {"float32": 4.0, "float16": 2.01, "bfloat16": 2.01}
_MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7}
_TORCH = {"int8": torch.int8, "float8_e4m3": torch.float8_e4m3fn}
_SHAPES = [(rows, width) for width in (128, 2048, 3072, 4096, 5120, 7168, 8192, 16384) for rows in (1, 64, 133, 2048)]
_COMPILED = {2048, 4096, 5120, 8192}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    kernel: NormKernel
    rows: int

    @property
    def name(self) -> str:
        """Operator with its quantized output."""
        quantized = "" if self.kernel.quantized == "none" else f" {self.kernel.quantized} {self.kernel.quantization}"
        return f"{self.kernel.op}{quantized}"


@dataclass(frozen=True)
class Tensors:
    """The tensors of one launch."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    scale: Tensor | None
    y: Tensor
    sum: Tensor | None
    row_scale: Tensor | None

    def inputs(self) -> list[Tensor]:
        """In the kernel's order."""
        return [t for t in (self.x, self.residual, self.weight, self.scale) if t is not None]

    def outputs(self) -> list[Tensor]:
        """In the kernel's order."""
        return [t for t in (self.y, self.sum, self.row_scale) if t is not None]


def cases() -> Iterator[Case]:
    """The rows of the table."""
    for op in ("rms_norm", "add_rms_norm"):
        for rows, width in [*_SHAPES, (65536, 128), (8192, 4096), (32768, 8192)]:
            yield Case(NormKernel(width, EPSILON, op, "bfloat16"), rows)  # type: ignore[arg-type]
        for dtype in ("float16", "float32"):
            for rows in (1, 64, 2048):
                yield Case(NormKernel(4096, EPSILON, op, dtype), rows)  # type: ignore[arg-type]
        for quantized, quantization in (("float8_e4m3", "static"), ("float8_e4m3", "per_row"), ("int8", "static")):
            for rows in (1, 64, 2048, 8192):
                yield Case(
                    NormKernel(4096, EPSILON, op, "bfloat16", quantized=quantized, quantization=quantization),  # type: ignore[arg-type]
                    rows,
                )


def tensors(case: Case) -> Tensors:
    """New random tensors; the outputs hold NaN or the largest number."""
    kernel, shape = case.kernel, (case.rows, case.kernel.width)
    dtype = getattr(torch, kernel.dtype)
    x = (3 * torch.randn(shape, device="cuda")).to(dtype)
    residual = torch.randn(shape, device="cuda").to(dtype) if kernel.adds else None
    weight = (1 + 0.5 * torch.randn(kernel.width, device="cuda")).to(dtype)
    static = kernel.quantization == "static"
    y = torch.empty(shape, device="cuda", dtype=_TORCH.get(kernel.quantized, dtype))
    y.view(torch.int8).fill_(-1 if y.dtype != torch.int8 else 127)
    return Tensors(
        x,
        residual,
        weight,
        torch.tensor([0.02], device="cuda") if static else None,
        y,
        torch.full_like(x, math.nan) if kernel.adds else None,
        torch.full((case.rows,), math.nan, device="cuda") if kernel.quantization == "per_row" else None,
    )


def launched(
    case: Case, compiled: CompiledKernel, config: LaunchConfig, overlap: bool = True
) -> Callable[[Tensors], None]:
    """A function that launches a compiled kernel; with `overlap` before the one before it has ended, if it can."""
    image = image_of(config, compiled.architecture, compiled.image)
    image = dataclasses.replace(image, waits=image.waits and overlap)
    launcher = Launcher(KernelImages(case.kernel.width, case.kernel.dtype, (image,)), case.kernel.op, cuda_driver())

    def launch(given: Tensors) -> None:
        inputs = given.inputs()
        pointers = [tensor.data_ptr() for tensor in (*inputs, *given.outputs())]
        launcher.launch(pointers, len(inputs), case.rows, torch.cuda.current_stream().cuda_stream)

    return launch


def pytorch(given: Tensors) -> list[Tensor]:
    """PyTorch's operators, one after the other; returns its results."""
    x, sums = given.x, []
    if given.residual is not None:
        x = x + given.residual
        sums = [x]
    y = torch.nn.functional.rms_norm(x, (x.shape[-1],), given.weight, EPSILON)
    largest = 127.0 if given.y.dtype == torch.int8 else 448.0
    if given.row_scale is not None:
        scale = y.float().abs().amax(-1, keepdim=True) / largest
        return [(y.float() / scale).clamp(-largest, largest).to(given.y.dtype), scale, *sums]
    if given.scale is not None:
        scaled = y.float() / given.scale
        rounded = scaled.round() if given.y.dtype == torch.int8 else scaled
        return [rounded.clamp(-largest - (largest == 127), largest).to(given.y.dtype), *sums]
    return [y, *sums]


def error_of(case: Case, given: Tensors) -> tuple[float, bool]:
    """The largest error against float64 in ULP of the result, or in steps of a quantized result; whether it is small.

    A quantized result may be one step off where the unquantized result is near a tie.
    """
    x = given.x if given.sum is None or given.residual is None else given.x + given.residual
    if given.sum is not None and not torch.equal(x, given.sum):
        return math.inf, False
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * given.weight.double()
    kernel = case.kernel
    if kernel.quantized == "none":
        spacing = 2.0 ** (expected.abs().clamp_min(1e-4).log2().floor() - _MANTISSA[kernel.dtype])
        error = ((given.y.float().double() - expected).abs() / spacing).max().item()
        return error, error <= ACCURATE[kernel.dtype]
    largest = 127 if kernel.quantized == "int8" else 448
    expected = expected.to(given.x.dtype).double()
    if given.row_scale is not None:
        scale = given.row_scale.double()[:, None]
        wanted = expected.abs().amax(-1, keepdim=True) / largest
        if not torch.allclose(scale, wanted, rtol=2.0**-7):
            return math.inf, False
    else:
        assert given.scale is not None
        scale = given.scale.double()
    scaled = (expected / scale).clamp(-largest - (largest == 127), largest)
    steps = torch.ones_like(scaled)
    if largest == 448:
        steps = 2.0 ** (scaled.abs().clamp_min(2.0**-6).log2().floor() - 3)
    # Half a step of the quantized format, and one ULP of the unquantized result.
    error = (
        (((given.y.float().double() - scaled).abs() - scaled.abs() * 2.0 ** -_MANTISSA[kernel.dtype]) / steps)
        .max()
        .item()
    )
    return error, error <= 0.51


def launches_of(case: Case) -> int:
    """Number of launches in a graph."""
    return max(FEWEST_LAUNCHES, min(MOST_LAUNCHES, GRAPH_BYTES // (case.rows * case.kernel.row_bytes())))


def layout_name(config: LaunchConfig) -> str:
    """Rows x threads x vectors x elements of a block, the cluster, and `p` if the weight is loaded first."""
    prefetch = " p" if config.prefetch else ""
    return f"{config.rows}x{config.threads}x{config.vectors}x{config.elements} c{config.cluster}{prefetch}"


def recorded(work: Callable[[Any], object], sets: Sequence[Any]) -> Any:
    """A CUDA graph of one call for each set of tensors, each with results of its own."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for given in sets[:3]:
            work(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [work(given) for given in sets]
    del kept
    return graph


def microseconds(
    graphs: dict[str, Any], launches: int, flushed: Tensor, replays: int = REPLAYS
) -> dict[str, tuple[float, float, float]]:
    """Median, 10th and 90th percentile of the time of one launch, for each way."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(replays):
        for name, graph in graphs.items():
            flushed.add_(1)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / launches)
    return {
        name: (statistics.median(found), statistics.quantiles(found, n=10)[0], statistics.quantiles(found, n=10)[-1])
        for name, found in times.items()
    }


def measured(case: Case, architecture: int, flushed: Tensor, with_compile: bool, overlap: bool) -> dict[str, Any]:
    """One row of the table."""
    kernel = case.kernel
    size = case.rows * kernel.row_bytes()
    launches = launches_of(case)
    count = torch.cuda.get_device_properties().multi_processor_count
    config = choose(kernel, case.rows, architecture, multiprocessors=count)
    compiled = compile_kernel(kernel, config, architecture)
    launch = launched(case, compiled, config, overlap)
    sets = [tensors(case) for _ in range(launches)]
    launch(sets[0])
    torch.cuda.synchronize()
    error, accurate = error_of(case, sets[0])
    half = max(size // 2, 1)
    copies = [(torch.empty(half, dtype=torch.int8, device="cuda"), torch.ones(half, dtype=torch.int8, device="cuda"))
              for _ in range(launches)]  # fmt: skip
    ways: dict[str, Any] = {"ours": recorded(launch, sets), "torch": recorded(pytorch, sets)}
    ways["copy"] = recorded(lambda pair: pair[0].copy_(pair[1]), copies)
    if with_compile and kernel.width in _COMPILED and kernel.dtype == "bfloat16" and kernel.quantization != "per_row":
        torch._dynamo.reset()
        ways["torch.compile"] = recorded(torch.compile(pytorch, dynamic=False), sets)
    times = microseconds(ways, launches, flushed)
    peers = [times[name][0] for name in ("torch", "torch.compile") if name in times]
    return {
        "op": case.name,
        "dtype": kernel.dtype,
        "rows": case.rows,
        "width": kernel.width,
        "microseconds": {name: [round(value, 3) for value in found] for name, found in times.items()},
        "tb_per_second": round(size / times["ours"][0] / 1e6, 3),
        "of_copy": round(times["copy"][0] / times["ours"][0], 3),
        "best_peer": round(min(peers) / times["ours"][0], 3),
        "error": round(error, 3),
        "accurate": accurate,
        "layout": layout_name(config),
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    head = (
        "| operator | dtype | rows | width | ours, us | torch, us | torch.compile, us | copy, us | TB/s | copy / ours "
        "| best peer / ours | error | layout | registers |"
    )
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        us = {name: f"{found[0]:.2f}" for name, found in row["microseconds"].items()}
        cells = [
            row["op"], row["dtype"], row["rows"], row["width"], us["ours"], us["torch"], us.get("torch.compile", ""),
            us["copy"], f"{row['tb_per_second']:.2f}", f"{row['of_copy']:.2f}", f"{row['best_peer']:.2f}",
            f"{row['error']:.2f}{'' if row['accurate'] else ' WRONG'}", row["layout"], row["registers"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.kernel_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-overlap", action="store_true", help="our kernel without programmatic dependent launch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernel_speed requires an NVIDIA GPU and the CUDA build of torch.", file=sys.stderr)
        return 4
    torch.manual_seed(0)
    torch.zeros(1, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    rows: list[dict[str, Any]] = []
    for case in cases():
        rows.append(measured(case, 10 * major + minor, flushed, not given.no_compile, not given.no_overlap))
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps({"device": title, "rows": rows}, indent=1), encoding="utf-8")
        if given.markdown is not None:
            given.markdown.write_text(f"{title}\n\n{markdown(rows)}\n", encoding="utf-8")
        torch.cuda.empty_cache()
    wrong = [row for row in rows if not row["accurate"]]
    print(f"{title}: {len(rows) - len(wrong)} of {len(rows)} accurate.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
