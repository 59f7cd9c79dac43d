"""A norm that follows its spec only under some conditions is refused, and the reason names the condition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.recognition.conditions import (
    Condition,
    call_conditions,
    changed_in_place,
    differs,
    probe_conditions,
)
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from tests.helpers.norms.norm_zoo import Weighted, hub_class, normalized


class Conditional(Weighted):
    """Twice its result where a function of x is true."""

    def __init__(self, when: Callable[[Tensor], bool], width: int = 64) -> None:
        super().__init__(width)
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        y = normalized(x) * self.weight
        return y * 2 if self.when(x) else y


def repeats(x: Tensor) -> bool:
    rows = x.reshape(-1, x.shape[-1])
    return len(rows) > 1 and len(torch.unique(rows, dim=0)) < len(rows) and not bool((rows == 0).all())


REASONS: dict[str, tuple[Callable[[Tensor], bool], str]] = {
    **{f"rank {n}": (lambda x, n=n: x.ndim == n, f"with an x of {n} dims") for n in (1, 3, 4, 5)},
    **{f"batch {n}": (lambda x, n=n: x.ndim == 3 and x.shape[0] == n, f"with a batch of {n}") for n in (1, 5)},
    **{f"length {n}": (lambda x, n=n: x.ndim == 3 and x.shape[1] == n, f"a length of {n}") for n in (1, 7, 33, 129)},
    "not contiguous": (lambda x: not x.is_contiguous(), "with a transposed x"),
    "expanded": (lambda x: 0 in x.stride() and x.numel() > 0, "with an expanded x"),
    "last dim": (lambda x: x.stride(-1) != 1, "whose last dim is not contiguous"),
    "sliced": (lambda x: x.ndim == 3 and x.stride(1) > x.shape[2] and x.stride(0) > x.stride(1), "with a sliced x"),
    "grad": (lambda x: torch.is_grad_enabled(), "with grad enabled"),
    "requires grad": (lambda x: x.requires_grad, "with grad enabled and an x that requires grad"),
    "no grad": (lambda x: x.requires_grad and not torch.is_grad_enabled(), "without grad and"),
    "inference": (lambda x: torch.is_inference_mode_enabled(), "in inference mode"),
    "autocast": (lambda x: torch.is_autocast_enabled("cpu"), "under autocast"),
    "threads": (lambda x: torch.get_num_threads() > 1, "threads"),
    "large": (lambda x: 1e5 < float(x.abs().max()) < 1e6, "with values of about 300000 alone"),
    "tiny": (lambda x: 0 < float(x.abs().max()) < 1e-7, "with values of about"),
    "positive": (lambda x: bool((x > 0).all()), "with positive values alone"),
    "negative": (lambda x: bool((x < 0).all()), "with negative values alone"),
    "equal rows": (repeats, "with an expanded x"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_holds_in_some_conditions_only_is_refused_with_the_condition(name: str) -> None:
    when, reason = REASONS[name]
    found = find_norms(Conditional(when))
    assert found.sites == []
    assert reason in found.refusals[0].reason, found.refusals[0].reason


class Clamping(Weighted):
    """Normalizes, and clamps one end of its channels at some standard deviations."""

    def __init__(self, limit: float, first: int, width: int = 64) -> None:
        super().__init__(width)
        self.limit, self.first = limit, first

    def forward(self, x: Tensor) -> Tensor:
        y = normalized(x)
        kept, cut = y[..., : self.first], y[..., self.first :].clamp(-self.limit, self.limit)
        return torch.cat((kept, cut), -1) * self.weight


@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize(("limit", "first"), [(3.0, 1), (4.5, 1), (5.4, 1), (5.0, 63), (4.0, 40), (5.0, 0)])
def test_an_output_that_is_clamped_in_any_channel_is_refused(limit: float, first: int, width: int) -> None:
    found = find_norms(Clamping(limit, first, width))
    assert found.sites == []
    assert "spec" in found.refusals[0].reason.lower()


@pytest.mark.parametrize("limit", [8.0, 50.0, 500.0, 5e3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_an_input_that_is_clamped_on_one_side_is_refused(limit: float, sign: int) -> None:
    class Capped(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            rest = x[..., 1:]
            rest = rest.clamp(max=limit) if sign > 0 else rest.clamp(min=-limit)
            return normalized(torch.cat((x[..., :1], rest), -1)) * self.weight

    assert find_norms(Capped(64)).sites == []


class InPlace(Weighted):
    """Normalizes in place of its input, as one of several functions does."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__(64)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = normalized(x) * self.weight
        self.write(x)
        return y


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: x[..., 0].zero_(),
        lambda x: x.view(-1)[-1:].add_(1),
        lambda x: x.data.neg_(),
        lambda x: x.detach().clamp_(-1, 1),
    ],
)
def test_a_norm_that_writes_into_its_input_is_refused(write: Callable[[Tensor], object]) -> None:
    found = find_norms(nn.ModuleDict({"norm": InPlace(write)}))
    assert found.sites == []
    assert found.refusals[0].reason == "it changes its input in place"


def test_a_norm_that_writes_into_its_gate_is_refused() -> None:
    class Gated(Weighted):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            y = normalized(x) * self.weight * nn.functional.silu(gate)
            gate.mul_(2)
            return y

    assert [r.reason for r in find_norms(Gated(64)).refusals] == ["it changes its input in place"]


def test_a_module_that_is_no_norm_may_write_into_its_input() -> None:
    class Relu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_()

    found = find_norms(Relu())
    assert (found.sites, found.refusals) == ([], [])


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "LlamaRMSNorm"), ("gemma", "GemmaRMSNorm"), ("gemma2", "Gemma2RMSNorm"), ("qwen2", "Qwen2RMSNorm"),
        ("qwen3", "Qwen3RMSNorm"), ("t5", "T5LayerNorm"), ("mistral", "MistralRMSNorm"), ("olmo2", "Olmo2RMSNorm"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 2048])
def test_honest_norms_stay_recognized(family: str, name: str, dtype: torch.dtype, width: int) -> None:
    found = find_norms(hub_class(family, name)(width).to(dtype))
    assert len(found.sites) == 1, found.refusals


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 2048])
def test_the_norm_of_torch_stays_recognized(dtype: torch.dtype, width: int) -> None:
    assert len(find_norms(nn.RMSNorm(width, dtype=dtype)).sites) == 1


def test_conditions_have_different_names_and_the_right_inputs() -> None:
    def draw(*leading: int) -> Tensor:
        return torch.randn(*leading, 16)

    conditions = list(probe_conditions(draw, torch.float32, (16,), 1, torch.Generator().manual_seed(0)))
    names = [condition.name for condition in conditions]
    assert len(set(names)) == len(names)
    by_name = {condition.name: condition.x for condition in conditions}
    assert by_name["with a batch of 5 and a length of 33"].shape == (5, 33, 16)
    assert by_name["with an x of 5 dims"].ndim == 5
    assert by_name["with an expanded x"].stride(0) == 0
    assert not by_name["with a transposed x"].is_contiguous()
    assert (by_name["with positive values alone"] > 0).all()
    assert 1e5 < by_name["with values of about 300000 alone"].abs().max() < 3e6


def test_conditions_of_a_call_keep_its_values() -> None:
    x = torch.randn(2, 3, 4)
    found = {condition.name: condition.x for condition in call_conditions(x, 1)}
    assert torch.equal(found["with a transposed x"], x)
    assert torch.equal(found["with a sliced x"], x)
    assert found["with a sliced x"].stride() != x.stride()
    assert torch.equal(found["with a batch of 5"], torch.cat((x, x, x[:1])))
    assert torch.equal(found["with a length of 2"], x[:, :2])
    assert found["with grad enabled and an x that requires grad"].requires_grad
    assert len(list(call_conditions(torch.randn(4), 1))) == 2


def test_what_differs_is_said_and_a_failing_call_is_not_compared() -> None:
    condition = Condition("with a batch of 3", torch.randn(3, 4))
    assert differs(condition, lambda x: x * 2, lambda x: x * 2) is None
    assert differs(condition, lambda x: x * 3, lambda x: x * 2) == (
        "with a batch of 3, it differs from its spec (torch.float32)"
    )
    assert differs(condition, lambda x: [x], lambda x: x) is not None
    assert differs(condition, lambda x: x / "1", lambda x: x) is None  # type: ignore[operator]
    assert differs(condition, lambda x: x.mul_(2), lambda x: x) == "it changes its input in place"


def test_a_changed_bit_is_a_change() -> None:
    x = torch.tensor([0.0, float("nan")])
    assert not changed_in_place(x, x.clone())
    assert changed_in_place(x, torch.tensor([-0.0, float("nan")]))
