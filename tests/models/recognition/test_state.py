"""State: what a call changes is found by name, and put back; a norm that keeps state is refused."""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.models.recognition.state import Snapshot, UnwatchableError, is_plain_object
from tests.helpers.norms.norm_zoo import Weighted, normalized


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Keeping(Weighted):
    """A norm that does something to its state at each call."""

    shared: ClassVar[list[int]] = []
    total = 0

    def __init__(self, act: Callable[[Any, Tensor], object]) -> None:
        super().__init__(64)
        self.act = act
        self.count = 0
        self.items: list[Any] = [0]
        self.stats: dict[str, Any] = {"calls": 0, "inner": {"deep": [0]}}
        self.recent: deque[int] = deque([0], maxlen=2)
        self.names: set[int] = {1}
        self.thing = SimpleNamespace(calls=0, more=SimpleNamespace(log=[0]))
        self.slotted = Slotted()
        self.array = np.zeros(2)
        self.random = random.Random(0)
        self.generator = torch.Generator().manual_seed(0)
        self.loose = torch.zeros(3, dtype=torch.int64)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.numbers = itertools.count()
        self.pair = ([0], 1)

    def forward(self, x: Tensor) -> Tensor:
        self.act(self, x)
        return normalized(x) * self.weight


def adding(target: str) -> Callable[[Any, Tensor], object]:
    code = compile(target, "act", "exec")
    return lambda self, x: exec(code, {"torch": torch, "Keeping": Keeping}, {"self": self, "x": x})


ACTS = {
    "self.count += 1": "count",
    "self.items[0] += 1": "items[0]",
    "self.items.append(x)": "items[1]",
    "self.stats['calls'] += 1": "stats['calls']",
    "self.stats['inner']['deep'].append(1)": "stats['inner']['deep'][1]",
    "self.recent.append(1)": "recent[0]",
    "self.names.add(7)": "names",
    "self.thing.calls += 1": "thing.calls",
    "self.thing.more.log[0] += 1": "thing.more.log[0]",
    "self.slotted.calls += 1": "slotted.calls",
    "self.array += 1": "array",
    "self.random.random()": "random",
    "torch.rand(1, generator=self.generator)": "generator",
    "self.loose += 1": "loose",
    "self.seen += 1": "seen",
    "self.weight.data.clamp_(-0.5, 0.5)": "weight",
    "next(self.numbers)": "numbers",
    "self.pair[0].append(1)": "pair[0][1]",
    "self.last_input = x": "last_input",
    "self.register_buffer('late', torch.zeros(1))": "late",
    "Keeping.shared.append(1)": "Keeping.shared[0]",
    "Keeping.total += 1": "Keeping.total",
}


def content(module: Keeping) -> str:
    """All state as text."""
    return repr((
        {name: value for name, value in vars(module).items() if name not in ("act", "generator", "random", "_modules",
         "slotted")},
        module.slotted.calls, module.random.getstate(), module.generator.get_state().tolist(), Keeping.shared,
        Keeping.total,
    ))  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
def test_a_norm_that_keeps_state_is_refused_by_name_and_left_as_it_was(act: str) -> None:
    module = Keeping(adding(act))
    before = content(module)
    found = find_norms(nn.ModuleDict({"norm": module}))
    assert content(module) == before
    assert found.sites == []
    names = found.refusals[0].reason.partition("the state of the module (")[2]
    assert ACTS[act] in names, found.refusals[0].reason


def test_state_that_is_not_changed_does_not_matter() -> None:
    module = Keeping(adding("pass"))
    before = content(module)
    assert len(find_norms(module).sites) == 1
    assert content(module) == before


def test_a_count_that_a_function_encloses_is_state_too() -> None:
    calls, log = 0, [0]

    def act(module: Any, x: Tensor) -> None:
        nonlocal calls
        calls += 1
        log.append(1)

    found = find_norms(Keeping(act))
    assert found.sites == []
    assert found.refusals[0].reason == "its forward changes the state of the module (act (variable calls))"
    assert (calls, log) == (0, [0])


def test_a_norm_that_changes_its_result_at_a_later_call_is_refused_and_its_count_put_back() -> None:
    class Later(Weighted):
        def __init__(self) -> None:
            super().__init__(64)
            self.calls = [0]

        def forward(self, x: Tensor) -> Tensor:
            self.calls[0] += 1
            return normalized(x) * self.weight * (2 if self.calls[0] == 50 else 1)

    module = Later()
    found = find_norms(module)
    assert found.refusals[0].reason == "its forward changes the state of the module (calls[0])"
    assert module.calls == [0]


@pytest.mark.parametrize("thing", [threading.Lock(), (n for n in range(3))])
def test_what_cannot_be_copied_is_a_refusal_that_names_it(thing: object) -> None:
    module = Weighted(64)
    module.guard = {"it": thing}  # type: ignore[assignment]
    model = nn.ModuleDict({"norm": nn.RMSNorm(8), "guarded_norm": NormWith(thing)})
    found = find_norms(model)
    assert [site.path for site in found.sites] == ["norm"]
    assert found.refusals[0].reason == (
        f"its attribute guard['it'] ({type(thing).__name__}) cannot be copied, so that a call could change the model"
    )


class NormWith(Weighted):
    def __init__(self, thing: object) -> None:
        super().__init__(64)
        self.guard = {"it": thing}

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x) * self.weight


def test_a_snapshot_names_the_first_change_and_restores_all() -> None:
    module = Keeping(adding("pass"))
    snapshot = Snapshot(module)
    assert snapshot.changed() is None
    before = content(module)
    module.count, module.thing.calls = 5, 3
    module.stats["calls"] = 4
    module.seen.add_(1)
    del module.items
    assert snapshot.changed() == "count"
    snapshot.restore()
    assert snapshot.changed() is None
    assert sorted(content(module)) == sorted(before)


def test_too_many_objects_are_an_error() -> None:
    module = nn.Module()
    module.many = [[n] for n in range(30_000)]
    with pytest.raises(UnwatchableError, match="more than 20,000 objects"):
        Snapshot(module)


def test_a_large_tensor_is_watched_by_its_version() -> None:
    module = nn.Module()
    module.large = torch.zeros((1 << 20) + 1)
    snapshot = Snapshot(module)
    assert snapshot.changed() is None
    module.large[0] = 1
    assert snapshot.changed() == "large"


def test_plain_objects_are_those_of_classes_written_in_python() -> None:
    assert is_plain_object(SimpleNamespace) is False
    assert is_plain_object(Slotted())
    assert not is_plain_object({})
    assert not is_plain_object(itertools.count())
