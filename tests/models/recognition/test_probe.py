"""Probing one module: what it proves, what it refuses, and that the module is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.recognition.caller import RefusedError, own_tensors
from rmsnorm_deploy.models.recognition.probe import Probed, probe
from rmsnorm_deploy.models.recognition.signature import NotANormError
from rmsnorm_deploy.models.spec import NormSpec


def factor(x: Tensor, eps: float = 1e-5) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    """A norm whose result a function makes of x, the weight and the bias."""

    def __init__(self, compute: object, width: int | None = 16, bias: bool = False, dtype: object = None) -> None:
        super().__init__()
        self._compute = compute
        if width is not None:
            self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=dtype))  # type: ignore[call-overload]
            if bias:
                self.offset_bias = nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        tensors = [getattr(self, name) for name in ("gain", "offset_bias") if hasattr(self, name)]
        return self._compute(x, *tensors)  # type: ignore[operator]


class Gated(nn.Module):
    """A norm with a gate that it can do without."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        h = x.float()
        h = self.weight * (h * factor(h)).to(x.dtype)
        return h if gate is None else (h * nn.functional.silu(gate.float())).to(x.dtype)


def scaled_first(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float()
    return (h * factor(h) * gain.float()).to(x.dtype)


def cast_first(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float()
    return (h * factor(h)).to(x.dtype) * gain


def plus_one(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float()
    return (h * factor(h) * (1.0 + gain.float())).to(x.dtype)


def with_bias(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return cast_first(x, gain) + bias


def summed(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 1e-5) * gain.float()).to(x.dtype)


def in_groups(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float().unflatten(-1, (4, 4))
    return (h * factor(h)).flatten(-2).to(x.dtype) * gain


def unscaled(x: Tensor) -> Tensor:
    h = x.float()
    return (h * factor(h)).to(x.dtype)


SPEC = NormSpec(eps=1e-5)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Norm(scaled_first), Probed(SPEC, (16,), "gain", None)),
        (Norm(cast_first), Probed(SPEC.replace(order="cast_then_scale"), (16,), "gain", None)),
        (Norm(plus_one), Probed(SPEC.replace(scale="one_plus_weight"), (16,), "gain", None)),
        (Norm(with_bias, bias=True),
         Probed(SPEC.replace(order="cast_then_scale", bias=True), (16,), "gain", "offset_bias")),
        (Norm(summed), Probed(SPEC.replace(reduction="sum"), (16,), "gain", None)),
        (Norm(in_groups), Probed(SPEC.replace(order="cast_then_scale", group_size=4), (16,), "gain", None)),
        (Norm(unscaled, None), Probed(SPEC.replace(scale="none"), None, None, None)),
        (Gated(),
         Probed(SPEC.replace(order="cast_then_scale", gate="after", activation="silu"), (16,), "weight", None)),
    ],
)  # fmt: skip
def test_what_is_proven(module: nn.Module, expected: Probed) -> None:
    assert probe(module.eval()) == expected


def test_eps_is_measured_and_need_not_be_stated() -> None:
    def odd(x: Tensor, gain: Tensor) -> Tensor:
        h = x.float()
        return (h * factor(h, 3.7e-4) * gain.float()).to(x.dtype)

    assert probe(Norm(odd)).spec.eps == 3.7e-4


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(16, 16),
        nn.Identity(),
        nn.ReLU(),
        nn.Bilinear(4, 4, 4),
        Norm(torch.sign, None),
        Norm(lambda x, gain: x * gain),
        Norm(lambda x, gain: (x, gain)),
        Norm(lambda x, gain: x.sum(-1)),
    ],
)
def test_what_does_not_normalize_is_no_norm(module: nn.Module) -> None:
    with pytest.raises(NotANormError):
        probe(module)


def outside(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float()
    return (h / (h.pow(2).mean(-1, keepdim=True).sqrt() + 1e-3) * gain.float()).to(x.dtype)


def squared_twice(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float()
    return (h * h.pow(4).mean(-1, keepdim=True).add(1e-5).pow(-0.25) * gain.float()).to(x.dtype)


def over_rows(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean((-1, -2), keepdim=True) + 1e-5) * gain.float()).to(x.dtype)


def odd_casts(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float()
    return ((h * factor(h)).bfloat16().float() * gain.float()).to(x.dtype) if x.dtype != torch.float32 else (
        scaled_first(x, gain)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (Norm(lambda x, gain: nn.functional.layer_norm(x, (16,), gain)), "mean"),
        (Norm(over_rows), "rows"),
        (Norm(squared_twice), "float32"),
        (Norm(odd_casts), "casts"),
        (Norm(outside), "float32"),
    ],
)
def test_what_no_spec_describes_is_refused(module: nn.Module, word: str) -> None:
    with pytest.raises(RefusedError, match=word):
        probe(module)


def test_a_tensor_that_is_no_parameter_is_refused() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.linspace(0.5, 1.5, 16)

        def forward(self, x: Tensor) -> Tensor:
            return cast_first(x, self.gain.to(x.dtype))

    with pytest.raises(RefusedError):
        probe(Loose())


def test_the_module_and_the_random_state_are_left_alone() -> None:
    module = Norm(cast_first).train()
    module.register_forward_hook(lambda *given: pytest.fail("a hook was called"))
    state, random_state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    names = set(vars(module))
    probe(module)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(module.state_dict()["gain"], state["gain"])
    assert module.training
    assert set(vars(module)) == names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_in_a_half_type_is_probed_in_all(dtype: torch.dtype) -> None:
    assert probe(Norm(cast_first).to(dtype)).spec == SPEC.replace(order="cast_then_scale")


def test_own_tensors_are_the_floating_ones_of_the_module_itself() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2))
    module.register_parameter("bias", None)
    module.register_buffer("scale", torch.ones(3))
    module.register_buffer("count", torch.ones(1, dtype=torch.int64))
    module.child = nn.Linear(2, 2)
    module.loose = torch.ones(4)
    assert list(own_tensors(module)) == ["weight", "scale"]
