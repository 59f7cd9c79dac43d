"""Mixture-of-experts layers in transformers: which implementation runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def has_experts(model: Any) -> bool:
    """Whether `model` is a transformers model whose experts have several implementations."""
    can_set = getattr(model, "_can_set_experts_implementation", None)
    return bool(can_set is not None and can_set())


@contextmanager
def experts(model: Any, implementation: str) -> Iterator[None]:
    """Run the model's experts, if it has any, with `implementation` while the context is open."""
    if not has_experts(model):
        yield
        return
    original = model.get_experts_implementation()
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(original)
