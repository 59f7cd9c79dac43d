"""Modules that differ in the values of their tensors only are examined once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from rmsnorm_deploy.models.recognition import find_norms as finding
from rmsnorm_deploy.models.recognition import probe as probing
from rmsnorm_deploy.models.recognition.likeness import likeness


class _Norm(nn.Module):
    def __init__(self, size=16, eps=1e-6, **more):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.eps = eps
        vars(self).update(more)

    def forward(self, x):
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class _ByValue(_Norm):
    """A norm only as long as its weight is positive."""

    def forward(self, x):
        return super().forward(x) if bool((self.weight.abs().sum() < 100).all()) else x * self.weight


class _Other(_Norm):
    pass


def _examined(model):
    with mock.patch.object(probing._Prober, "_recognize", autospec=True, side_effect=probing._Prober._recognize) as run:
        found = finding.find_norms(model)
    return run.call_count, found


def test_equal_modules_are_examined_once_and_each_gets_its_own_site():
    model = nn.ModuleList([_Norm() for _ in range(5)])
    count, found = _examined(model)
    assert count == 1
    assert [site.path for site in found.sites] == ["0", "1", "2", "3", "4"]
    assert len({site.spec for site in found.sites}) == 1
    assert [site.width for site in found.sites] == [(16,)] * 5


@pytest.mark.parametrize(
    "other",
    [
        _Norm(eps=1e-5), _Norm(size=24), _Other(), _Norm().half(), _Norm().eval(), _Norm(extra=1), _Norm(eps=0.0),
    ],
    ids=["eps", "width", "class", "dtype", "mode", "attribute", "no eps"],
)  # fmt: skip
def test_modules_that_differ_otherwise_are_examined_each(other):
    assert likeness(_Norm()) == likeness(_Norm())
    assert likeness(_Norm()) != likeness(other)
    assert _examined(nn.ModuleList([_Norm(), other]))[0] == 2


@pytest.mark.parametrize("value", [[1], {"a": 1}, torch.ones(2), object(), (1, [2]), nn.Identity()])
def test_a_module_with_other_than_plain_attributes_has_no_likeness(value):
    module = _Norm()
    module.more = value
    assert likeness(module) is None


def test_a_tensor_with_attributes():
    one, other = _Norm(), _Norm()
    one.weight.initialized = True
    assert likeness(one) != likeness(other)
    other.weight.initialized = True
    assert likeness(one) == likeness(other)
    other.weight.owner = object()
    assert likeness(other) is None


def test_a_module_that_depends_on_its_own_values_is_refused():
    model = nn.ModuleList([_ByValue(), _ByValue()])
    with torch.no_grad():
        model[1].weight.mul_(1e6)
    count, found = _examined(model)
    assert count == 1
    assert [site.path for site in found.sites] == ["0"]
    assert [refusal.path for refusal in found.refusals] == ["1"]
    assert "own weights" in found.refusals[0].reason
