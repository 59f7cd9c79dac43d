"""The other kernels: how each is called, what it offers, and its version.

Signatures are those of liger-kernel 0.8.5, quack-kernels 0.6.5 and flashinfer-python 0.7.2. A library is a peer only if
it is installed. Where a call allowed it, outputs are allocated beforehand; the others are allocated while the graph is
recorded, which takes no time in a replay.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from .cases import EPSILON, Case, Tensors, unwritten

Call = Callable[[Tensors], Sequence[Tensor]]
# A peer that has failed so many times in a row is not tried again; each try may compile for a minute.
_MOST_FAILURES: Final = 3


def _same(given: Tensors) -> Tensors:
    return given


@dataclass(frozen=True)
class Peer:
    """Another way to compute the same.

    Attributes:
        name: short, for a column of the table.
        version: of the library.
        missing: what the peer lacks for a case; "" if it has all.
        call: a function that returns the outputs in the kernel's order; may raise anything.
        own: the tensors that it is called with, if not ours: with outputs or copies of inputs that it writes.
    """

    name: str
    version: str
    missing: Callable[[Case], str]
    call: Callable[[Case], Call]
    own: Callable[[Tensors], Tensors] = _same


class Failures:
    """Which peers are not tried again, and why."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def failed(self, peer: Peer, reason: str) -> None:
        """Note a failure."""
        self._found.setdefault(peer.name, []).append(reason)

    def succeeded(self, peer: Peer) -> None:
        """Forget the failures before."""
        self._found.pop(peer.name, None)

    def given_up(self, peer: Peer) -> str:
        """The last reason if the peer is not to be tried again, else ""."""
        reasons = self._found.get(peer.name, [])
        return f"not tried after {len(reasons)} failures: {reasons[-1]}" if len(reasons) >= _MOST_FAILURES else ""


def pytorch(given: Tensors) -> list[Tensor]:
    """PyTorch's operators, one after the other; returns the outputs in the kernel's order."""
    x, sums = given.x, []
    if given.residual is not None:
        x = x + given.residual
        sums = [x]
    y = torch.nn.functional.rms_norm(x, (x.shape[-1],), given.weight, EPSILON)
    largest = 127.0 if given.y.dtype == torch.int8 else 448.0
    if given.row_scale is not None:
        scale = y.float().abs().amax(-1, keepdim=True) / largest
        return [(y.float() / scale).clamp(-largest, largest).to(given.y.dtype), *sums, scale]
    if given.scale is not None:
        scaled = y.float() / given.scale
        rounded = scaled.round() if given.y.dtype == torch.int8 else scaled
        return [rounded.clamp(-largest - (largest == 127), largest).to(given.y.dtype), *sums]
    return [y, *sums]


def _everything(case: Case) -> str:
    return ""


def _no_quantized(case: Case) -> str:
    return "" if case.kernel.quantized == "none" else "no quantized output"


def _torch_compile(case: Case) -> Call:
    torch._dynamo.reset()
    return torch.compile(pytorch, dynamic=False)


def _liger(case: Case) -> Call:
    # "gemma": the product with the weight is in float32, as in PyTorch and here.
    if case.kernel.adds:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

        return lambda t: fused_add_rms_norm_forward(t.x, t.residual, t.weight, EPSILON, 0.0, "gemma")[:2]
    from liger_kernel.ops.rms_norm import rms_norm_forward

    return lambda t: rms_norm_forward(t.x, t.weight, EPSILON, 0.0, "gemma", None)[:1]


def _quack(case: Case) -> Call:
    from quack.rmsnorm import rmsnorm_fwd

    count = 2 if case.kernel.adds else 1
    return lambda t: rmsnorm_fwd(t.x, weight=t.weight, residual=t.residual, eps=EPSILON)[:count]


def _flashinfer_missing(case: Case) -> str:
    if case.kernel.dtype == "float32":
        return "no float32"
    if case.kernel.quantized not in ("none", "float8_e4m3"):
        return f"no {case.kernel.quantized} output"
    return "no scale for each row" if case.kernel.quantization == "per_row" else ""


def _flashinfer_own(given: Tensors) -> Tensors:
    """The sum is written over the residual, and the result over x if it is not quantized."""
    residual = None if given.residual is None else given.residual.clone()
    if residual is not None and given.scale is None:
        x = given.x.clone()
        return dataclasses.replace(given, x=x, residual=residual, y=x, sum=residual)
    y = unwritten(given.y.shape, given.y.dtype, given.y.device)
    return dataclasses.replace(given, residual=residual, y=y, sum=residual)


def _flashinfer(case: Case) -> Call:
    from flashinfer import norm

    def call(t: Tensors) -> list[Tensor]:
        if t.residual is None and t.scale is None:
            norm.rmsnorm(t.x, t.weight, eps=EPSILON, out=t.y)
        elif t.residual is None:
            norm.rmsnorm_quant(t.y, t.x, t.weight, t.scale, eps=EPSILON)
        elif t.scale is None:
            norm.fused_add_rmsnorm(t.x, t.residual, t.weight, eps=EPSILON)
        else:
            norm.fused_add_rmsnorm_quant(t.y, t.x, t.residual, t.weight, t.scale, eps=EPSILON)
        return t.outputs()

    return call


# Distribution, and what makes the peer from its version.
_LIBRARIES: Final[dict[str, Callable[[str], Peer]]] = {
    "liger-kernel": lambda version: Peer("liger", version, _no_quantized, _liger),
    "quack-kernels": lambda version: Peer("quack", version, _no_quantized, _quack),
    "flashinfer-python": lambda version: Peer("flashinfer", version, _flashinfer_missing, _flashinfer, _flashinfer_own),
}


def peers(
    with_compile: bool = True, version_of: Callable[[str], str | None] | None = None
) -> tuple[list[Peer], list[str]]:
    """The peers that are installed, and the distributions that are not.

    Args:
        with_compile: whether torch.compile is one.
        version_of: version of an installed distribution, or None.
    """
    version_of = version_of or _installed
    triton = version_of("triton")
    found = [Peer("torch", torch.__version__, _everything, lambda case: pytorch)]
    if with_compile:
        with_triton = f"{torch.__version__}, triton {triton}" if triton else torch.__version__
        found.append(Peer("torch.compile", with_triton, _everything, _torch_compile))
    versions = {name: version_of(name) for name in _LIBRARIES}
    found += [_LIBRARIES[name](version) for name, version in versions.items() if version is not None]
    return found, [name for name, version in versions.items() if version is None]


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def reason_of(error: BaseException) -> str:
    """The kind of an exception and the first line of its message, short enough for a cell."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    text: Any = f"{type(error).__name__}: {lines[0].strip()}".removesuffix(": ")
    return text if len(text) <= 120 else f"{text[:117]}..."
