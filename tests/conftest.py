"""The tests' random numbers: the same in every run, and how many examples the property tests try.

The property tests try few examples by default, more with `--hypothesis-profile many`.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers.plugins import plugin_library
from tests.helpers.tensorrt.engines import DecoderEngine, decoder_engine_in, require_rtx
from tests.helpers.tensorrt.stand_in import StandIn

QUIET = [HealthCheck.filter_too_much, HealthCheck.too_slow]
settings.register_profile("few", max_examples=120, deadline=None, derandomize=True, suppress_health_check=QUIET)
settings.register_profile("many", max_examples=5000, deadline=None, suppress_health_check=QUIET)
settings.load_profile("few")


# What a test compiles, it compiles itself; tests of the cache name a folder of their own.
os.environ["RMSNORM_KERNEL_CACHE"] = "off"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed before the fixtures of each test, so that what a test sees does not hang on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def built_library(tmp_path_factory: pytest.TempPathFactory) -> plugin_library.BuiltLibrary:
    """The plugin's libraries, compiled once for all processes of a test run."""
    problem = plugin_library.missing()
    if problem is not None:
        pytest.skip(problem)
    base = tmp_path_factory.getbasetemp()
    return plugin_library.build_once(
        (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "plugin-library"
    )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """TensorRT-RTX's runtime as a stand-in in this process; builds have the real one in processes of their own."""
    return StandIn(monkeypatch, require_rtx())


@pytest.fixture(scope="session")
def decoder_engine(tmp_path_factory: pytest.TempPathFactory) -> DecoderEngine:
    """A Qwen3 with a cache, exported, and its engine, built by the real TensorRT-RTX."""
    require_rtx()
    return decoder_engine_in(tmp_path_factory.mktemp("decoder"))
