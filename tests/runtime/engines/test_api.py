"""What differs between the products, and the architectures that an engine is built for."""

from __future__ import annotations

import re

import pytest

from rmsnorm_deploy.models.errors import EnvironmentMissingError, UnsupportedError, UsageError
from rmsnorm_deploy.runtime.engines import api
from rmsnorm_deploy.runtime.engines.api import FLAVORS, flavor_name, resolve_architectures
from rmsnorm_deploy.runtime.tensorrt import on_demand
from rmsnorm_deploy.runtime.tensorrt.on_demand import local_options


@pytest.mark.parametrize(
    ("runtime", "wanted", "gpu", "expected"),
    [
        ("rtx", (), None, (80, 86, 89, 120)),
        ("rtx", (75,), None, (75,)),
        ("rtx", (), 89, (80, 86, 89, 120)),
        ("rtx", (), 75, (75, 80, 86, 89, 120)),  # what is built on a machine runs there
        ("rtx", (), 121, (80, 86, 89, 120, 121)),
        ("rtx", (), 90, (80, 86, 89, 120)),
        ("rtx", (86,), 75, (86,)),
        ("tensorrt", (), 90, (90,)),
        ("tensorrt", (90,), 90, (90,)),
    ],
)
def test_architectures_of_a_build(
    monkeypatch: pytest.MonkeyPatch, runtime: str, wanted: tuple[int, ...], gpu: int | None, expected: tuple[int, ...]
) -> None:
    monkeypatch.setattr(api, "cuda_device", lambda: None if gpu is None else ("a GPU", gpu))
    assert resolve_architectures(runtime, wanted) == expected


@pytest.mark.parametrize(
    ("runtime", "wanted", "gpu", "error", "message"),
    [
        ("rtx", (90,), None, UnsupportedError, "TensorRT-RTX builds for sm_75, .*, not for sm_90"),
        ("tensorrt", (), None, EnvironmentMissingError, "TensorRT builds for the local GPU, and there is none"),
        ("tensorrt", (86,), 90, UnsupportedError, r"builds for the local GPU, a GPU \(sm_90\), not for sm_86"),
        ("ort", (), None, UsageError, "runtime: expected tensorrt or rtx, got 'ort'"),
    ],
)
def test_architectures_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, runtime: str, wanted: tuple[int, ...], gpu: int | None, error: type, message: str
) -> None:
    monkeypatch.setattr(api, "cuda_device", lambda: None if gpu is None else ("a GPU", gpu))
    with pytest.raises(error, match=message):
        resolve_architectures(runtime, wanted)


def test_an_engine_of_this_machine_is_for_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, runtime, expected in ((75, "rtx", (75,)), (90, "rtx", ()), (90, "tensorrt", ()), (None, "rtx", ())):
        monkeypatch.setattr(on_demand, "cuda_device", lambda gpu=gpu: None if gpu is None else ("a GPU", gpu))
        assert local_options(runtime).architectures == expected


def test_names_of_products() -> None:
    assert [flavor_name(name) for name in FLAVORS] == list(FLAVORS)
    with pytest.raises(UsageError, match=re.escape("runtime: expected tensorrt or rtx, got 'onnx'")):
        flavor_name("onnx")
