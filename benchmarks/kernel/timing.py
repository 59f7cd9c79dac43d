"""CUDA graphs of many launches, replayed in turns, with a cold and with a warm L2 cache.

Cold: every launch has tensors of its own, and the L2 cache is overwritten before each replay. Warm: every launch has
the same tensors, and the graph is replayed once before each replay that is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

REPLAYS: Final = 30
# Overwritten before each replay; larger than the L2 cache of any GPU so far.
FLUSHED_BYTES: Final = 256 << 20
# Of the copy that gives the bandwidth, read and written.
_BANDWIDTH_BYTES: Final = 2 << 30


@dataclass(frozen=True)
class Spread:
    """Microseconds of one launch: the median, the 10th and the 90th percentile of the replays."""

    median: float
    p10: float
    p90: float


def spread(times: Sequence[float]) -> Spread:
    """Of at least two times."""
    tenths = statistics.quantiles(times, n=10)
    return Spread(statistics.median(times), tenths[0], tenths[-1])


def flushed_tensor() -> Tensor:
    """The tensor that is overwritten between replays."""
    return torch.zeros(FLUSHED_BYTES, dtype=torch.int8, device="cuda")


def recorded(work: Callable[[Any], object], sets: Sequence[Any], keep: bool = True) -> Any:
    """A CUDA graph of one call for each set of tensors.

    Args:
        work: the call.
        sets: its arguments.
        keep: whether each call that allocates its results has results of its own, or else memory that calls share.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for given in sets[:3]:
            work(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = []
        for given in sets:
            results = work(given)
            if keep:
                kept.append(results)
            del results
    del kept
    return graph


def cold(graphs: Mapping[str, Any], launches: int, flushed: Tensor, replays: int = REPLAYS) -> dict[str, Spread]:
    """Microseconds of one launch of each graph, when the L2 cache holds none of its tensors."""
    return _timed(graphs, launches, replays, lambda graph: flushed.add_(1))


def warm(graphs: Mapping[str, Any], launches: int, replays: int = REPLAYS) -> dict[str, Spread]:
    """Microseconds of one launch of each graph, when the L2 cache holds its tensors, if they fit in it."""
    return _timed(graphs, launches, replays, lambda graph: graph.replay())


def _timed(
    graphs: Mapping[str, Any], launches: int, replays: int, before: Callable[[Any], object]
) -> dict[str, Spread]:
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(replays):
        for name, graph in graphs.items():
            before(graph)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / launches)
    return {name: spread(found) for name, found in times.items()}


def copy_pairs(size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors; a copy from the second to the first of a pair reads and writes `size` bytes together."""
    half = max(size // 2, 1)
    return [
        (torch.empty(half, dtype=torch.int8, device="cuda"), torch.ones(half, dtype=torch.int8, device="cuda"))
        for _ in range(count)
    ]


def copy_graph(pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A CUDA graph of one copy for each pair."""
    return recorded(lambda pair: pair[0].copy_(pair[1]), pairs)


def copy_bandwidth(flushed: Tensor) -> float:
    """TB/s of a large copy, read and written."""
    graph = copy_graph(copy_pairs(_BANDWIDTH_BYTES, 1))
    return _BANDWIDTH_BYTES / cold({"copy": graph}, 1, flushed)["copy"].median / 1e6
