"""The peers of `benchmarks.kernel`: what each has, how it is called, and when it is given up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.kernel.accuracy import PEERS, judged
from benchmarks.kernel.cases import OPS, OUTPUTS, case_of
from benchmarks.kernel.peers import Failures, peers, reason_of
from tests.helpers.plugins.benchmarked import VERSIONS, made, peer_of


def test_peers_have_names_and_versions_and_those_that_are_missing_are_named() -> None:
    found, missing = peers(True, VERSIONS.get)
    assert missing == []
    assert {peer.name: peer.version for peer in found} == {
        "torch": torch.__version__, "torch.compile": f"{torch.__version__}, triton 3.5",
        "liger": "0.8.5", "quack": "0.6.5", "flashinfer": "0.7.2",
    }  # fmt: skip
    found, missing = peers(False, lambda name: None)
    assert [peer.name for peer in found] == ["torch"]
    assert missing == ["liger-kernel", "quack-kernels", "flashinfer-python"]


@pytest.mark.parametrize(
    ("name", "output", "dtype", "missing"),
    [
        ("torch", "int8-static", "float32", ""),
        ("torch.compile", "fp8-per-row", "bfloat16", ""),
        ("liger", "same", "float32", ""),
        ("liger", "fp8-static", "bfloat16", "no quantized output"),
        ("quack", "int8-static", "bfloat16", "no quantized output"),
        ("flashinfer", "same", "float32", "no float32"),
        ("flashinfer", "fp8-static", "float16", ""),
        ("flashinfer", "fp8-per-row", "bfloat16", "no scale for each row"),
        ("flashinfer", "int8-static", "bfloat16", "no int8 output"),
    ],
)
def test_what_peers_lack(name: str, output: str, dtype: str, missing: str) -> None:
    assert peer_of(name).missing(case_of("add_rms_norm", output, dtype, 2, 64)) == missing


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def _liger_rms_norm(X, W, eps, offset, casting_mode, row_mode):  # type: ignore[no-untyped-def]  # noqa: N803
    assert (offset, casting_mode, row_mode) == (0.0, "gemma", None)
    return _norm(X, W, eps), X, None, 0, 0, 0


def _liger_add(X, R, W, eps, offset, casting_mode):  # type: ignore[no-untyped-def]  # noqa: N803
    assert (offset, casting_mode) == (0.0, "gemma")
    return _norm(X + R, W, eps), X + R, None, 0, 0, 0, 0


def _quack_fwd(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, store_rstd=False,
    weight_offset=0.0,
):  # type: ignore[no-untyped-def]  # fmt: skip
    total = x if residual is None else x + residual
    return _norm(total, weight, eps), total, None


def _rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):  # type: ignore[no-untyped-def]
    return out.copy_(_norm(input, weight, eps))


def _rmsnorm_quant(out, input, weight, scale, eps=1e-6, enable_pdl=None):  # type: ignore[no-untyped-def]
    out.copy_((_norm(input, weight, eps).float() / scale).clamp(-448, 448).to(out.dtype))


def _fused_add(input, residual, weight, eps=1e-6, enable_pdl=None):  # type: ignore[no-untyped-def]
    residual += input
    input.copy_(_norm(residual, weight, eps))


def _fused_add_quant(out, input, residual, weight, scale, eps=1e-6, enable_pdl=None):  # type: ignore[no-untyped-def]
    residual += input
    _rmsnorm_quant(out, residual, weight, scale, eps)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with the signatures of the libraries, computed by PyTorch; FlashInfer writes over its inputs."""
    members: dict[str, dict[str, Callable[..., Any]]] = {
        "liger_kernel": {}, "liger_kernel.ops": {},
        "liger_kernel.ops.rms_norm": {"rms_norm_forward": _liger_rms_norm},
        "liger_kernel.ops.fused_add_rms_norm": {"fused_add_rms_norm_forward": _liger_add},
        "quack": {}, "quack.rmsnorm": {"rmsnorm_fwd": _quack_fwd},
        "flashinfer": {},
        "flashinfer.norm": {
            "rmsnorm": _rmsnorm, "rmsnorm_quant": _rmsnorm_quant, "fused_add_rmsnorm": _fused_add,
            "fused_add_rmsnorm_quant": _fused_add_quant,
        },
    }  # fmt: skip
    for name, functions in members.items():
        module = ModuleType(name)
        for function, value in functions.items():
            setattr(module, function, value)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("name", "op", "output"),
    [
        (name, op, output)
        for name in ("torch", "liger", "quack", "flashinfer")
        for op in OPS
        for output in OUTPUTS
        if not peer_of(name).missing(case_of(op, output, "bfloat16", 4, 256))
    ],
)
def test_peers_compute_the_same_and_leave_our_tensors_alone(name: str, op: str, output: str) -> None:
    case, peer = case_of(op, output, "bfloat16", 4, 256), peer_of(name)
    given, before = made(case), made(case)
    outputs = peer.call(case)(peer.own(given))
    assert judged(case, given.with_outputs(outputs), PEERS).problem == ""
    for ours, same in zip((*given.inputs(), *given.outputs()), (*before.inputs(), *before.outputs()), strict=True):
        assert torch.equal(ours.contiguous().view(torch.int8), same.contiguous().view(torch.int8))


def test_the_number_of_outputs_is_checked() -> None:
    given = made(case_of("add_rms_norm", "same", "bfloat16", 2, 64))
    with pytest.raises(ValueError, match="shorter"):
        given.with_outputs([given.y])


def test_a_peer_is_given_up_after_three_failures_in_a_row() -> None:
    peer, failures = peer_of("torch"), Failures()
    for _ in range(2):
        failures.failed(peer, "first")
    assert failures.given_up(peer) == ""
    failures.succeeded(peer)
    for reason in ("a", "b", "c"):
        assert failures.given_up(peer) == ""
        failures.failed(peer, reason)
    assert failures.given_up(peer) == "not tried after 3 failures: c"
    assert failures.given_up(peer_of("liger")) == ""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("\n  no kernel image\nmore"), "RuntimeError: no kernel image"),
        (ImportError(), "ImportError"),
        (ValueError("x" * 300), f"ValueError: {'x' * 105}..."),
    ],
)
def test_reasons_are_short(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
