"""The tests' random numbers: the same in every run, and how many examples the property tests try.

The property tests try few examples by default, more with `--hypothesis-profile many`.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

QUIET = [HealthCheck.filter_too_much, HealthCheck.too_slow]
settings.register_profile("few", max_examples=120, deadline=None, derandomize=True, suppress_health_check=QUIET)
settings.register_profile("many", max_examples=5000, deadline=None, suppress_health_check=QUIET)
settings.load_profile("few")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed before the fixtures of each test, so that what a test sees does not hang on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
