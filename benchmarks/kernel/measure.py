"""One row of the table: our kernel, every peer and a copy, compared with float64 and then timed in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rmsnorm_deploy.plugins.kernel.compiler import CompiledKernel
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, choose

from .accuracy import PEERS, Judgement, judged
from .cases import Case, Tensors, tensors
from .compiled import Work, launched, layout_name, resources
from .peers import Failures, Peer, reason_of
from .timing import cold, copy_graph, copy_pairs, recorded, warm


@dataclass(frozen=True)
class Gpu:
    """What a kernel is chosen for: compute capability without the point, and the number of multiprocessors."""

    architecture: int
    multiprocessors: int

    def layout(self, case: Case) -> LaunchConfig:
        """The layout that `choose` takes."""
        return choose(case.kernel, case.rows, self.architecture, multiprocessors=self.multiprocessors)

    def work(self, case: Case) -> Work:
        """What is compiled for a case."""
        return case.kernel, self.layout(case), self.architecture


def this_gpu() -> Gpu:
    """The current GPU. CUDA begins with this call."""
    found = torch.cuda.get_device_properties()
    return Gpu(10 * found.major + found.minor, found.multi_processor_count)


@dataclass(frozen=True)
class Setting:
    """What all rows share.

    Attributes:
        gpu: the GPU.
        compiled: the kernels of all cases.
        flushed: the tensor that is overwritten between replays.
        peers: the peers.
        overlap: whether our launches may begin before the kernel before has ended.
        failures: those of the peers so far.
    """

    gpu: Gpu
    compiled: Mapping[Work, CompiledKernel]
    flushed: Tensor
    peers: Sequence[Peer]
    overlap: bool = True
    failures: Failures = field(default_factory=Failures)


@dataclass
class _Graphs:
    """Graphs by the name of the way, for a cold and for a warm L2 cache."""

    cold: dict[str, Any] = field(default_factory=dict)
    warm: dict[str, Any] = field(default_factory=dict)

    def record(self, name: str, call: Any, sets: Sequence[Tensors]) -> None:
        """Both graphs of a way."""
        found = recorded(call, sets), recorded(call, [sets[0]] * len(sets), keep=False)
        self.cold[name], self.warm[name] = found


def checked(case: Case, setting: Setting) -> Judgement:
    """Our result for new tensors, compared with float64."""
    given = tensors(case)
    launched(case, setting.compiled[setting.gpu.work(case)], setting.gpu.layout(case), setting.overlap)(given)
    torch.cuda.synchronize()
    return judged(case, given)


def measured(case: Case, setting: Setting) -> dict[str, Any]:
    """One row of the table, as JSON: times in microseconds, bandwidth in TB/s, size in bytes."""
    config = setting.gpu.layout(case)
    compiled = setting.compiled[setting.gpu.work(case)]
    launch = launched(case, compiled, config, setting.overlap)
    sets = [tensors(case) for _ in range(case.launches)]
    launch(sets[0])
    torch.cuda.synchronize()
    judgement = judged(case, sets[0])
    graphs = _Graphs()
    graphs.record("ours", launch, sets)
    tried = {peer.name: _tried(peer, case, sets, graphs, setting.failures) for peer in setting.peers}
    pairs = copy_pairs(case.size, len(sets))
    graphs.cold["copy"] = copy_graph(pairs)
    graphs.warm["copy"] = copy_graph(pairs[:1] * len(pairs))
    times: dict[str, dict[str, Any]] = {name: {} for name in graphs.cold}
    for state, found in (
        ("cold", cold(graphs.cold, len(sets), setting.flushed)),
        ("warm", warm(graphs.warm, len(sets))),
    ):
        for name, spread in found.items():
            times[name][state] = dataclasses.asdict(spread)
    return {
        "op": case.op,
        "dtype": case.kernel.dtype,
        "rows": case.rows,
        "width": case.kernel.width,
        "bytes": case.size,
        "ours": times["ours"],
        "copy": times["copy"],
        "peers": {name: {**found, **times.get(name, {})} for name, found in tried.items()},
        **compared(case.size, times, [name for name, found in tried.items() if "problem" not in found]),
        "error": judgement.error,
        "problem": judgement.problem,
        "layout": layout_name(config),
        **resources(compiled),
    }


def compared(size: int, times: Mapping[str, Any], rivals: Sequence[str]) -> dict[str, Any]:
    """Useful TB/s, the share of the copy's speed, and the fastest of the rivals, from the medians.

    A ratio is our time divided by that of the fastest rival in the same state of the cache; more than 1 is slower.
    """
    ours = {state: times["ours"][state]["median"] for state in ("cold", "warm")}
    found: dict[str, Any] = {
        "tb_per_second": size / ours["cold"] / 1e6,
        "of_copy": times["copy"]["cold"]["median"] / ours["cold"],
        "best": {},
    }
    timed = [name for name in rivals if name in times]
    for state in ours if timed else ():
        name = min(timed, key=lambda rival: times[rival][state]["median"])
        median = times[name][state]["median"]
        found["best"][state] = {"peer": name, "median": median, "ratio": ours[state] / median}
    return found


def _tried(peer: Peer, case: Case, sets: Sequence[Tensors], graphs: _Graphs, failures: Failures) -> dict[str, Any]:
    """The peer's version and error, after its graphs were recorded; or why there are none."""
    found: dict[str, Any] = {"version": peer.version}
    if missing := peer.missing(case):
        return {**found, "missing": missing}
    if given_up := failures.given_up(peer):
        return {**found, "problem": given_up}
    try:
        call = peer.call(case)
        own = [peer.own(given) for given in sets]
        outputs = call(own[0])
        torch.cuda.synchronize()
        judgement = judged(case, sets[0].with_outputs(outputs), PEERS)
        found["error"] = judgement.error
        if judgement.problem:
            return {**found, "problem": f"wrong: {judgement.problem}"}
        graphs.record(peer.name, call, own)
    except Exception as error:  # of any library
        failures.failed(peer, reason_of(error))
        return {**found, "problem": f"failed: {reason_of(error)}"}
    failures.succeeded(peer)
    return found
