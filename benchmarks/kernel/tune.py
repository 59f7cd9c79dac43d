"""The time of every layout of a kernel, beside the one that the rule of `launch_config.choose` takes.

Every layout that covers the width exactly is timed: threads, vectors of a thread, blocks of a cluster, and whether the
weight is loaded first.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from rmsnorm_deploy.plugins.kernel.launch_config import CLUSTER_ARCHITECTURE, MOST_THREADS, LaunchConfig

from .accuracy import judged
from .cases import Case, grid, tensors, unwritten
from .compiled import Work, launched, layout_name
from .measure import Gpu, Setting
from .timing import cold, copy_graph, copy_pairs, recorded

ROWS: Final = (1, 8, 64, 133, 264, 528)
WIDTHS: Final = (4096, 5120, 8192, 16384)
REPLAYS: Final = 15
FEWEST_THREADS: Final = 64
MOST_VECTORS: Final = 4
ELEMENTS: Final = 8
# With more blocks than this a cluster is not tried.
MOST_CLUSTERED_BLOCKS: Final = 528
# The rule loses if the chosen layout takes more than this many times the time of the fastest.
LOSS: Final = 1.03
HEAD: Final = "| op | rows | width | copy, us | chosen, us | fastest, us | chosen / fastest | layouts, us |"


def tuned_cases() -> list[Case]:
    """The cases that are measured without options."""
    return grid(ROWS, WIDTHS, outputs=("same",))


def layouts(case: Case, gpu: Gpu) -> list[LaunchConfig]:
    """The layouts to time; the first is the chosen one."""
    chosen = dataclasses.replace(gpu.layout(case), few=False)
    return list(dict.fromkeys([chosen, *_whole(case, gpu.architecture)]))


def works(case: Case, gpu: Gpu) -> Iterator[Work]:
    """What is compiled for a case."""
    return ((case.kernel, config, gpu.architecture) for config in layouts(case, gpu))


def _whole(case: Case, architecture: int) -> Iterator[LaunchConfig]:
    clusters = (1, 2, 4, 8) if architecture >= CLUSTER_ARCHITECTURE else (1,)
    for cluster, vectors, prefetch in itertools.product(clusters, range(1, MOST_VECTORS + 1), (True, False)):
        threads, rest = divmod(case.kernel.width, cluster * vectors * ELEMENTS)
        if rest or threads % 32 or not FEWEST_THREADS <= threads <= MOST_THREADS:
            continue
        if (cluster > 1 and case.rows * cluster > MOST_CLUSTERED_BLOCKS) or (prefetch and vectors > 2):
            continue
        yield LaunchConfig(threads, vectors, ELEMENTS, cluster=cluster, prefetch=prefetch)


def tuned(case: Case, setting: Setting) -> dict[str, Any]:
    """Microseconds of the copy and of every layout, the chosen one first; and what is wrong with a layout's result."""
    sets = [tensors(case) for _ in range(case.launches)]
    graphs: dict[str, Any] = {"copy": copy_graph(copy_pairs(case.size, len(sets)))}
    wrong = {}
    for config in layouts(case, setting.gpu):
        launch = launched(
            case, setting.compiled[case.kernel, config, setting.gpu.architecture], config, setting.overlap
        )
        y = sets[0].y
        y.copy_(unwritten(y.shape, y.dtype, y.device))
        launch(sets[0])
        torch.cuda.synchronize()
        if problem := judged(case, sets[0]).problem:
            wrong[layout_name(config)] = problem
        graphs[layout_name(config)] = recorded(launch, sets)
    times = {name: found.median for name, found in cold(graphs, len(sets), setting.flushed, REPLAYS).items()}
    copy = times.pop("copy")
    return {
        "op": case.op, "rows": case.rows, "width": case.kernel.width, "copy": copy, "layouts": times, "wrong": wrong,
    }  # fmt: skip


def ranked(row: Mapping[str, Any]) -> tuple[str, str, float]:
    """The chosen layout, the fastest one, and the time of the first divided by that of the second."""
    times = row["layouts"]
    chosen = next(iter(times))
    fastest = min(times, key=times.__getitem__)
    return chosen, fastest, times[chosen] / times[fastest]


def line(row: Mapping[str, Any]) -> str:
    """One row of the table; layouts from the fastest to the slowest."""
    chosen, fastest, ratio = ranked(row)
    times = row["layouts"]
    every = [
        f"{name} {times[name]:.2f}{' WRONG' if name in row['wrong'] else ''}" for name in sorted(times, key=times.get)
    ]
    cells = [
        row["op"], row["rows"], row["width"], f"{row['copy']:.2f}", f"{chosen} {times[chosen]:.2f}",
        f"{fastest} {times[fastest]:.2f}", f"{ratio:.3f}", ", ".join(every),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def rule_losses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the rule takes a layout that is more than 3% slower than the fastest."""
    found = []
    for row in rows:
        chosen, fastest, ratio = ranked(row)
        if ratio > LOSS:
            found.append(
                f"{row['op']} {row['rows']}x{row['width']}: chosen {chosen} {row['layouts'][chosen]:.2f} us, "
                f"fastest {fastest} {row['layouts'][fastest]:.2f} us, ratio {ratio:.3f}"
            )
    return found
