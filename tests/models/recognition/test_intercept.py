"""Other forwards in the place of norms: what they are told, and that they go away again."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.recognition.intercept import NormCall, at_norms, replace_forward
from rmsnorm_deploy.models.recognition.site import Site
from rmsnorm_deploy.models.spec import NormSpec

PLAIN = NormSpec(eps=1e-6)
GATED = NormSpec(eps=1e-6, gate="after", activation="silu")
X, GATE = torch.arange(4.0), torch.ones(4)


class Norm(nn.Module):
    """Says what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.full((4,), 2.0)), nn.Parameter(torch.zeros(4))

    def forward(self, hidden: Tensor, gate: Tensor | None = None, mode: str | None = None) -> Tensor:
        return -hidden


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Norm(), Norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(self.first(x)))


def site(path: str = "", spec: NormSpec = PLAIN) -> Site:
    return Site(path, "Norm", spec, (4,), "float32", "scale", "shift" if spec.bias else None)


def replaced(spec: NormSpec) -> tuple[Norm, list[NormCall], list[str]]:
    module, calls, unknown = Norm(), list[NormCall](), list[str]()

    def compute(call: NormCall, original: Callable[[], Tensor]) -> Tensor:
        calls.append(call)
        return 10 * original()

    replace_forward(module, site(spec=spec), compute, unknown.append)
    return module, calls, unknown


@pytest.mark.parametrize("by_name", [False, True])
def test_a_call_is_told_with_its_tensors(by_name: bool) -> None:
    module, calls, unknown = replaced(PLAIN.replace(bias=True))
    result = module(hidden=X) if by_name else module(X)
    assert torch.equal(result, -10 * X)
    (call,) = calls
    assert call.x is X
    assert call.weight is module.scale
    assert call.bias is module.shift
    assert call.gate is None
    assert unknown == []


def test_tensors_that_the_site_does_not_name_are_not_told() -> None:
    module, calls, _ = replaced(PLAIN)
    module(X)
    assert calls[0].bias is None


@pytest.mark.parametrize("by_name", [False, True])
def test_a_gate_is_told_where_the_spec_has_one(by_name: bool) -> None:
    module, calls, unknown = replaced(GATED)
    module(X, gate=GATE) if by_name else module(X, GATE)
    assert calls[0].gate is GATE
    assert calls[0].spec == GATED
    module(X)
    assert calls[1].gate is None
    assert calls[1].spec == PLAIN
    assert unknown == []


def test_arguments_that_no_spec_covers_go_to_the_module() -> None:
    module, calls, unknown = replaced(PLAIN)
    assert torch.equal(module(X, GATE, mode="fast"), -X)
    assert torch.equal(module(X, None, mode=None), -10 * X)
    with pytest.raises(TypeError):
        module("text")
    assert len(calls) == 1
    assert unknown == ["gate, mode", "str"]


def test_the_signature_stays_and_the_original_comes_back() -> None:
    module, _, _ = replaced(PLAIN)
    assert inspect.signature(module.forward) == inspect.signature(Norm.forward.__get__(module))
    vars(module).pop("forward")
    assert torch.equal(module(X), -X)


def test_hooks_stay_where_they_are() -> None:
    module, _, _ = replaced(PLAIN)
    module.register_forward_hook(lambda m, given, result: result + 1)
    assert torch.equal(module(X), -10 * X + 1)


# -------------------------------------------------------------------------------------------------------- at_norms


def test_every_call_is_visited_with_its_number() -> None:
    model = Model()
    seen: list[tuple[str, int, float]] = []

    def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
        seen.append((path, number, float(call.x.sum())))
        return call.x + 1

    with at_norms(model, [site("first"), site("second")], visit):
        assert torch.equal(model(X), X + 3)
        model(X)
    assert seen[:3] == [("first", 0, 6.0), ("second", 0, 10.0), ("first", 1, 14.0)]
    assert [row[:2] for row in seen[3:]] == [("first", 2), ("second", 1), ("first", 3)]
    assert torch.equal(model(X), -X)


def test_only_the_sites_are_visited() -> None:
    model = Model()
    with at_norms(model, [site("second")], lambda path, number, call, original: 5 * original()):
        assert torch.equal(model(X), -5 * X)


def test_unknown_arguments_are_told_with_the_path_or_not_at_all() -> None:
    model = Model()
    told: list[tuple[str, str]] = []

    def visit(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
        pytest.fail("visited")

    with at_norms(model, [site("first")], visit, lambda path, names: told.append((path, names))):
        model.first(X, mode="fast")
    assert told == [("first", "mode")]
    with at_norms(model, [site("first")], visit):
        assert torch.equal(model.first(X, mode="fast"), -X)


def test_forwards_come_back_after_an_error() -> None:
    model = Model()

    def failing(path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError), at_norms(model, [site("first"), site("second")], failing):
        model(X)
    assert "forward" not in vars(model.first)
    assert "forward" not in vars(model.second)


def test_a_site_that_is_not_there_leaves_the_others_alone() -> None:
    model = Model()
    with (
        pytest.raises(AttributeError, match="third"),
        at_norms(model, [site("first"), site("third")], lambda *given: given[3]()),
    ):
        pass
    assert "forward" not in vars(model.first)
