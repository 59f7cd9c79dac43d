"""Time of the CUDA kernel in many layouts, on a GPU, beside the layout that `choose` takes.

    python -m benchmarks.kernel_layouts                        # about a minute on an H100
    python -m benchmarks.kernel_layouts --rows 1 8 --width 8192 --op rms_norm
    python -m benchmarks.kernel_layouts --no-overlap           # every kernel begins when the one before it has ended
    python -m benchmarks.kernel_layouts --markdown FILE

Requires what `benchmarks.kernel_speed` requires, and measures as it does. For each operator, number of rows and width
(bfloat16), every layout that covers the width exactly is timed: threads, vectors of a thread, blocks of a cluster, and
whether the weight is loaded first. Each table row begins with the copy of the same number of bytes and the chosen
layout; then follow the layouts, the fastest first. The exit code is 1 if a result is not accurate.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_speed import (
    EPSILON,
    FLUSHED_BYTES,
    Case,
    error_of,
    launched,
    launches_of,
    layout_name,
    microseconds,
    recorded,
    tensors,
)
from rmsnorm_deploy.plugins.kernel.compiler import CompiledKernel, compile_kernel
from rmsnorm_deploy.plugins.kernel.launch_config import CLUSTER_ARCHITECTURE, MOST_THREADS, LaunchConfig, choose
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel

ROWS, WIDTHS, OPS = (1, 8, 64, 133, 264, 528), (4096, 5120, 8192, 16384), ("rms_norm", "add_rms_norm")
REPLAYS = 15
FEWEST_THREADS, MOST_VECTORS, ELEMENTS = 64, 4, 8
# With more blocks than this a cluster is not tried.
MOST_CLUSTERED_BLOCKS = 528

Work = tuple[NormKernel, LaunchConfig, int]


def layouts(case: Case, architecture: int) -> list[LaunchConfig]:
    """The layouts to time; the first is the chosen one."""
    chosen = dataclasses.replace(choose(case.kernel, case.rows, architecture), few=False)
    return list(dict.fromkeys([chosen, *_whole(case, architecture)]))


def _whole(case: Case, architecture: int) -> Iterator[LaunchConfig]:
    clusters = (1, 2, 4, 8) if architecture >= CLUSTER_ARCHITECTURE else (1,)
    for cluster, vectors, prefetch in itertools.product(clusters, range(1, MOST_VECTORS + 1), (True, False)):
        threads, rest = divmod(case.kernel.width, cluster * vectors * ELEMENTS)
        if rest or threads % 32 or not FEWEST_THREADS <= threads <= MOST_THREADS:
            continue
        if (cluster > 1 and case.rows * cluster > MOST_CLUSTERED_BLOCKS) or (prefetch and vectors > 2):
            continue
        yield LaunchConfig(threads, vectors, ELEMENTS, cluster=cluster, prefetch=prefetch)


def compiled_work(work: Work) -> CompiledKernel:
    """One kernel; runs in a process of its own."""
    return compile_kernel(*work)


def measured(
    case: Case, compiled: dict[Work, CompiledKernel], architecture: int, flushed: Any, overlap: bool
) -> dict[str, Any]:
    """Microseconds of the copy and of every layout, and the layouts whose result is not accurate."""
    sets = [tensors(case) for _ in range(launches_of(case))]
    half = case.rows * case.kernel.row_bytes() // 2
    copies = [torch.ones((2, half), dtype=torch.int8, device="cuda") for _ in sets]
    graphs: dict[str, Any] = {"copy": recorded(lambda pair: pair[0].copy_(pair[1]), copies)}
    wrong = []
    for config in layouts(case, architecture):
        launch = launched(case, compiled[case.kernel, config, architecture], config, overlap)
        sets[0].y.fill_(-1)
        launch(sets[0])
        torch.cuda.synchronize()
        if not error_of(case, sets[0])[1]:
            wrong.append(layout_name(config))
        graphs[layout_name(config)] = recorded(launch, sets)
    times = microseconds(graphs, len(sets), flushed, REPLAYS)
    return {"copy": times.pop("copy")[0], "layouts": {name: found[0] for name, found in times.items()}, "wrong": wrong}


def line(case: Case, found: dict[str, Any]) -> str:
    """One row of the table."""
    chosen = next(iter(found["layouts"]))
    ranked = sorted(found["layouts"].items(), key=lambda item: item[1])
    cells = [
        case.kernel.op, str(case.rows), str(case.kernel.width), f"{found['copy']:.2f}",
        f"{chosen} {found['layouts'][chosen]:.2f}", f"{ranked[0][1] / found['layouts'][chosen]:.2f}",
        ", ".join(f"{name} {us:.2f}{' WRONG' if name in found['wrong'] else ''}" for name, us in ranked),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.kernel_layouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--width", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--no-overlap", action="store_true", help="without programmatic dependent launch")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    given = parser.parse_args(arguments)
    began = time.perf_counter()
    cases = [
        Case(NormKernel(width, EPSILON, op, "bfloat16"), rows)
        for width, op, rows in itertools.product(given.width, given.op, given.rows)
    ]
    # NVRTC compiles one kernel at a time in a process. The processes begin before CUDA does, which cannot be forked.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        if not torch.cuda.is_available():
            print("kernel_layouts requires an NVIDIA GPU and the CUDA build of torch.", file=sys.stderr)
            return 4
        major, minor = torch.cuda.get_device_capability()
        architecture = 10 * major + minor
        works = list(
            dict.fromkeys((c.kernel, config, architecture) for c in cases for config in layouts(c, architecture))
        )
        compiled = dict(zip(works, pool.map(compiled_work, works, chunksize=4), strict=True))
    torch.manual_seed(0)
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    head = "| operator | rows | width | copy, us | chosen, us | fastest / chosen | layouts, us |"
    lines = [torch.cuda.get_device_name(), "", head, "|" + "---|" * (head.count("|") - 1)]
    print(f"{len(works)} kernels compiled in {time.perf_counter() - began:.0f} s\n" + "\n".join(lines), flush=True)
    wrong = []
    for case in cases:
        found = measured(case, compiled, architecture, flushed, not given.no_overlap)
        wrong += found["wrong"]
        lines.append(line(case, found))
        print(lines[-1], flush=True)
        if given.markdown is not None:
            given.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    print(f"{time.perf_counter() - began:.0f} s; {len(wrong)} results are not accurate.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
