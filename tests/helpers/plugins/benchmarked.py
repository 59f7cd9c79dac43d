"""Cases of `benchmarks.kernel` on the CPU: tensors, right results, and peers with versions of the test's own."""

from __future__ import annotations

import torch

from benchmarks.kernel.cases import OPS, OUTPUTS, Case, Tensors, tensors
from benchmarks.kernel.measure import Gpu
from benchmarks.kernel.peers import Peer, peers

H200 = Gpu(90, 132)
EVERY = [(op, output, dtype) for op in OPS for output in OUTPUTS for dtype in ("bfloat16", "float16", "float32")]


def made(case: Case, seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    return tensors(case, "cpu")


def exact(case: Case, given: Tensors) -> Tensors:
    """Outputs from float64, rounded once to the dtype and once more to a quantized one."""
    x = given.x if given.residual is None else given.x + given.residual
    wide = x.double()
    y = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * given.weight.double()
    y = y.to(x.dtype)
    largest = 127 if case.kernel.quantized == "int8" else 448
    outputs = [y]
    if case.kernel.quantized != "none":
        scale = given.scale.double() if given.scale is not None else y.double().abs().amax(-1, keepdim=True) / largest
        scaled = (y.double() / scale).clamp(-largest - (largest == 127), largest)
        outputs = [(scaled.round() if largest == 127 else scaled).float().to(given.y.dtype)]
    outputs += [x] if given.sum is not None else []
    outputs += [scale.float()] if given.row_scale is not None else []
    return given.with_outputs(outputs)


VERSIONS = {"liger-kernel": "0.8.5", "quack-kernels": "0.6.5", "flashinfer-python": "0.7.2", "triton": "3.5"}


def peer_of(name: str) -> Peer:
    return next(peer for peer in peers(True, VERSIONS.get)[0] if peer.name == name)
