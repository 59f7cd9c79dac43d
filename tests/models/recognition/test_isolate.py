"""Stand-ins and states: nothing that happens to them reaches the original."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.recognition.isolate import one_thread, stand_in, untouched_random_state
from rmsnorm_deploy.models.recognition.state import UnwatchableError


class Counting(nn.Module):
    """Changes all that it has when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("seen", torch.zeros(4))
        self.loose = torch.zeros(4)
        self.calls: list[Any] = [{"inner": torch.zeros(2)}]
        self.table, self.array = {"count": 0}, np.zeros(3)
        self.child = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight += 1
            self.seen += 1
            self.loose += 1
            self.calls[0]["inner"] += 1
        self.calls.append(1)
        self.table["count"] += 1
        self.array += 1
        return self.child(x) * self.weight


def test_what_a_call_changes_is_changed_on_the_stand_in_only() -> None:
    module = Counting()
    clone = stand_in(module)
    clone(torch.ones(4))
    assert type(clone) is Counting
    assert torch.equal(module.weight, torch.ones(4))
    assert torch.equal(module.seen, torch.zeros(4))
    assert torch.equal(module.loose, torch.zeros(4))
    assert len(module.calls) == 1
    assert torch.equal(module.calls[0]["inner"], torch.zeros(2))
    assert (module.table, module.array.tolist()) == ({"count": 0}, [0.0] * 3)
    assert torch.equal(clone.weight, torch.full((4,), 2.0))
    assert torch.equal(clone.seen, torch.ones(4))


def test_a_stand_in_is_in_eval_mode_with_its_children() -> None:
    module = Counting().train()
    clone = stand_in(module)
    assert not clone.training
    assert not clone.child.training
    assert module.training
    assert module.child.training
    assert clone.child is not module.child


def test_a_stand_in_has_no_hooks_and_no_gradients() -> None:
    module = Counting()
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        register(lambda *given: pytest.fail("a hook was called"))
    clone = stand_in(module)
    clone(torch.ones(4))
    assert not clone.weight.requires_grad
    assert isinstance(clone.weight, nn.Parameter)
    assert module.weight.requires_grad
    assert len(module._forward_hooks) == 1


def test_a_tensor_under_two_names_stays_one() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(4))
    module.alias = [module.weight]
    clone = stand_in(module)
    assert clone.alias[0] is clone.weight
    assert clone.weight is not module.weight


def test_what_is_too_large_for_a_norm_is_shared() -> None:
    module = nn.Module()
    module.large = nn.Parameter(torch.empty((1 << 20) + 1, device="meta"), requires_grad=False)
    module.small = nn.Parameter(torch.zeros(1 << 10))
    other = object()
    module.other = other
    clone = stand_in(module)
    assert clone.large.shape == module.large.shape
    assert clone.small.data_ptr() != module.small.data_ptr()
    assert clone.other is other


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_random_state_is_given_back_and_starts_alike() -> None:
    first = drawn()
    inside = []
    for _ in range(2):
        with untouched_random_state([]):
            inside.append(drawn())
    second = drawn()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert (first, second) == (drawn(), drawn())
    assert inside[0] == inside[1]


def test_the_random_state_is_given_back_after_an_error() -> None:
    def failing() -> None:
        with untouched_random_state([]):
            drawn()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        failing()
    after = drawn()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert after == drawn()


def test_one_thread_and_as_many_as_before() -> None:
    before = torch.get_num_threads()

    def failing() -> None:
        with one_thread():
            assert torch.get_num_threads() == 1
            raise ArithmeticError

    try:
        torch.set_num_threads(3)
        with pytest.raises(ArithmeticError):
            failing()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_objects_are_copied_and_bound_methods_follow_the_copy() -> None:
    class Stats:
        def __init__(self) -> None:
            self.calls, self.log = 0, [0]

    module = Counting()
    module.stats, module.pair, module.generator = Stats(), ([0], 1), torch.Generator().manual_seed(3)
    module.call = module.child.forward
    clone = stand_in(module)
    clone.stats.calls += 1
    clone.stats.log.append(1)
    clone.pair[0].append(1)
    torch.rand(1, generator=clone.generator)
    assert (module.stats.calls, module.stats.log, module.pair) == (0, [0], ([0], 1))
    assert module.generator.get_state().equal(torch.Generator().manual_seed(3).get_state())
    assert isinstance(clone.stats, Stats)


def test_what_cannot_be_copied_is_an_error_that_names_it() -> None:
    module = nn.Module()
    module.things = [{"lock": threading.Lock()}]
    with pytest.raises(UnwatchableError, match=r"things\[0\]\['lock'\] \(lock\) cannot be copied"):
        stand_in(module)
