"""A PyTorch model opened at its norms: seen, written down in float64, fed in the middle, and run norm by norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.dtypes import numpy_dtype
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.runtime.norms.access import NormFeed
from rmsnorm_deploy.runtime.norms.activation_store import ActivationStore, Key
from rmsnorm_deploy.runtime.norms.float64_model import in_float64
from rmsnorm_deploy.runtime.norms.torch_norms import Survey, TorchNorms, survey_norms
from rmsnorm_deploy.runtime.runners.torch import TorchRunner
from tests.helpers.models.small_models import HalfCastNorm, Residual
from tests.helpers.norms.norm_zoo import ZOO

FIRST, SECOND = ("norms.0", 0), ("norms.1", 0)
DTYPES = ("float32", "float16", "bfloat16")


def surveyed(model: nn.Module, feeds: dict[str, np.ndarray]) -> tuple[TorchNorms, Survey]:
    runner, recognition = TorchRunner(model), find_norms(model)
    survey = survey_norms(model, runner, recognition, feeds)
    return TorchNorms(model, runner, recognition, survey.called), survey


def opened(model: nn.Module, feeds: dict[str, np.ndarray]) -> TorchNorms:
    return surveyed(model, feeds)[0]


def feeds_of(shape: tuple[int, ...] = (2, 5, 16), dtype: str = "float32") -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(3).standard_normal(shape).astype(numpy_dtype(dtype))}


def wide(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in feeds.items()}


@pytest.fixture
def store() -> Iterator[ActivationStore]:
    with ActivationStore() as store:
        yield store


def written(
    model: nn.Module, feeds: dict[str, np.ndarray], store: ActivationStore
) -> tuple[TorchNorms, dict[Key, float], Any]:
    norms = opened(model, feeds)
    with in_float64(model):
        outputs, disagreements = norms.write_reference(wide(feeds), store)
    return norms, disagreements, outputs


class Gated(nn.Module):
    """One norm called twice, a gated one between, one on a parameter, and one on a broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gated = ZOO["llama"].build(), ZOO["mamba2"].build()
        self.of_token, self.of_row = ZOO["olmo2"].build(), ZOO["olmo2"].build(seed=1)
        self.token = nn.Parameter(torch.linspace(-1, 1, 64)[None])

    def forward(self, x: Tensor) -> Tensor:
        h = self.gated(self.norm(x), x.half())
        h = h + self.of_token(self.token) + self.of_row(x[:1, :1].expand(x.shape[0], x.shape[1], -1))
        return self.norm(h)


# ---------------------------------------------------------------------------------------------------------- seen


def test_a_survey_names_every_call_in_the_order_of_execution() -> None:
    model, feeds = Gated().eval(), feeds_of((2, 5, 64))
    _, survey = surveyed(model, feeds)
    called, outputs = survey.called, survey.outputs
    assert list(called) == [("norm", 0), ("gated", 0), ("of_token", 0), ("of_row", 0), ("norm", 1)]
    assert all(key == norm.key for key, norm in called.items())
    assert called["gated", 0].spec == ZOO["mamba2"].spec
    assert [norm.gate_dtype for norm in called.values()] == [None, "float16", None, None, None]
    assert {norm.x_dtype for norm in called.values()} == {norm.y_dtype for norm in called.values()} == {"float32"}
    assert [norm.shape for norm in called.values()] == [(2, 5, 64)] * 2 + [(1, 64)] + [(2, 5, 64)] * 2
    # What is a parameter, or one row seen many times, cannot be written over.
    assert [norm.forced for norm in called.values()] == [True, True, False, False, True]
    with torch.no_grad():
        np.testing.assert_array_equal(outputs["output"], model(torch.from_numpy(feeds["x"])).numpy())


def test_a_trace_shows_what_hooks_see() -> None:
    model, feeds = Residual().eval(), feeds_of()
    seen: dict[tuple[Key, str], np.ndarray] = {}
    hooked: list[np.ndarray] = []
    norms = opened(model, feeds)
    outputs = norms.trace(feeds, [SECOND], lambda key, role, value: seen.update({(key, role): value}))
    model.norms[1].register_forward_hook(lambda _, args, y: hooked.extend((args[0].numpy(), y.numpy())))
    with torch.no_grad():
        plain = model(torch.from_numpy(feeds["x"])).numpy()
    assert list(seen) == [(SECOND, "x"), (SECOND, "y")]
    for found, wanted in zip(seen.values(), hooked, strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(outputs["output"], plain)


# ------------------------------------------------------------------------------------------------------ the truth


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_rounded_at_every_norm_to_what_the_deployed_model_holds(
    dtype: str, store: ActivationStore
) -> None:
    model, feeds = Residual().eval().to(getattr(torch, dtype)), feeds_of(dtype=dtype)
    norms, disagreements, outputs = written(model, feeds, store)
    assert outputs["output"].dtype == np.float64
    for key in (FIRST, SECOND):
        x, fed_x, y, fed_y = (np.asarray(store.get(key, role)) for role in ("x", "fed_x", "y", "fed_y"))
        assert (x.dtype, y.dtype) == (np.float64, np.float64)
        assert fed_x.dtype == fed_y.dtype == numpy_dtype(dtype)
        np.testing.assert_array_equal(fed_x, x.astype(numpy_dtype(dtype)))
        np.testing.assert_array_equal(fed_y, y.astype(numpy_dtype(dtype)))
        np.testing.assert_array_equal(y, norms.exact(key, NormFeed(fed_x)))
        assert disagreements[key] < 1e-12
        assert not store.has(key, "gate")
    # The residual stream goes on with the rounded sum and the rounded norm.
    second = {name: value.detach().double().numpy() for name, value in model.second.named_parameters()}
    fed_x, fed_y = (np.asarray(store.get(FIRST, role)).astype(np.float64) for role in ("fed_x", "fed_y"))
    wanted = fed_x + fed_y @ second["weight"].T + second["bias"]
    np.testing.assert_allclose(store.get(SECOND, "x"), wanted, rtol=1e-13, atol=1e-13)


def test_gates_are_written_too_and_what_cannot_be_replaced_is_left(store: ActivationStore) -> None:
    model, feeds = Gated().eval(), feeds_of((2, 5, 64))
    norms, disagreements, _ = written(model, feeds, store)
    gate, fed = store.get(("gated", 0), "gate"), store.get(("gated", 0), "fed_gate")
    assert (gate.dtype, fed.dtype) == (np.float64, np.float16)
    np.testing.assert_array_equal(fed, feeds["x"].astype(np.float16))
    exact = norms.exact(("gated", 0), NormFeed(store.get(("gated", 0), "fed_x"), np.asarray(gate)))
    np.testing.assert_array_equal(store.get(("gated", 0), "y"), exact)
    assert max(disagreements.values()) < 1e-12
    np.testing.assert_array_equal(model.token.detach(), torch.linspace(-1, 1, 64)[None])


def test_a_wrong_formula_shows_as_a_disagreement(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(spec: Any, x: Any, *rest: Any) -> Any:
        return reference(spec, x, *rest) * (1.0 + 1e-4)

    monkeypatch.setattr("rmsnorm_deploy.runtime.norms.float64_model.reference", wrong)
    _, disagreements, _ = written(Residual().eval(), feeds_of(), store)
    # At the largest element of a row, which is several times its RMS.
    assert {key: 0.9e-4 < off < 1e-3 for key, off in disagreements.items()} == {FIRST: True, SECOND: True}


def test_an_epsilon_that_follows_the_dtype_is_not_a_disagreement(store: ActivationStore) -> None:
    model = nn.Sequential(nn.RMSNorm(16)).eval()  # eps None: that of the dtype
    feeds = {"input": feeds_of()["x"] * 1e-3}
    feeds["input"][..., 5] *= 20  # nearly all of its row: up to 4 times the row's RMS
    _, disagreements, _ = written(model, feeds, store)
    assert disagreements["0", 0] < 1e-9


def test_an_outlier_of_a_wide_half_row_is_near_the_formula() -> None:
    model = nn.Sequential(nn.RMSNorm(4096, eps=1e-6)).eval().half()
    x = np.random.default_rng(0).standard_normal((1, 4096)).astype(np.float16)
    x[0, 7] = 100.06  # its result lies between two values of float16 that are 1/16 apart: 30 eps of the row's RMS
    assert 0.1 < surveyed(model, {"input": x})[1].called["0", 0].off <= 1.0


def test_the_traced_reference_is_not_rounded(store: ActivationStore) -> None:
    model, feeds = Residual().eval().half(), feeds_of(dtype="float16")
    norms = opened(model, feeds)
    with in_float64(model):
        norms.trace_reference(wide(feeds), [FIRST, SECOND], store.put)
    y = store.get(FIRST, "y")
    np.testing.assert_array_equal(y, norms.exact(FIRST, NormFeed(np.asarray(store.get(FIRST, "x")))))
    second = {name: value.detach().double().numpy() for name, value in model.second.named_parameters()}
    wanted = store.get(FIRST, "x") + y @ second["weight"].T + second["bias"]
    np.testing.assert_allclose(store.get(SECOND, "x"), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["llama", "gemma2", "biased", "buffer_weight", "l2"])
def test_exact_reads_the_weights_of_the_module(name: str) -> None:
    norm = ZOO[name]
    module = norm.build(torch.float16)
    x = np.random.default_rng(5).standard_normal((3, 64)).astype(np.float16)
    norms = opened(nn.Sequential(module).eval(), {"input": x})
    weight, bias = (None if t is None else t.double().numpy() for t in norm.tensors(module))
    wanted = reference(norm.spec, x.astype(np.float64), weight, bias)
    np.testing.assert_array_equal(norms.exact(("0", 0), NormFeed(x)), wanted)


# ------------------------------------------------------------------------------------------------- alone, between


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_alone_is_its_module(dtype: str) -> None:
    model = Gated().eval().to(getattr(torch, dtype))
    rng = np.random.default_rng(6)
    x, gate = (rng.standard_normal((3, 4, 64)).astype(numpy_dtype(dtype)) for _ in range(2))
    keys = [("norm", 1), ("gated", 0)]
    norms = opened(model, {"x": x})
    with norms.alone(keys) as alone:
        found = alone({keys[0]: NormFeed(x), keys[1]: NormFeed(x, gate)})
    tensors = [torch.from_numpy(array.astype(np.float32)).to(getattr(torch, dtype)) for array in (x, gate)]
    with torch.no_grad():
        wanted = [model.norm(tensors[0]), model.gated(*tensors)]
    for key, tensor in zip(keys, wanted, strict=True):
        assert found[key].total is None
        np.testing.assert_array_equal(found[key].y.astype(np.float64), tensor.double().numpy())


def test_between_goes_on_with_the_store_at_every_cut(store: ActivationStore) -> None:
    model, feeds = Residual().eval(), feeds_of()
    norms, _, _ = written(model, feeds, store)
    fed_x, fed_y = np.full((2, 5, 16), 3.0, np.float32), np.zeros((2, 5, 16), np.float32)
    store.put(FIRST, "fed_x", fed_x)
    store.put(FIRST, "fed_y", fed_y)
    store.put(SECOND, "fed_y", fed_y)
    seen: dict[tuple[Key, str], np.ndarray] = {}
    outputs = norms.between(
        feeds, [FIRST, SECOND], store, lambda key, role, value: seen.update({(key, role): value.copy()})
    )
    assert list(seen) == [(FIRST, "x"), (SECOND, "x")]
    with torch.no_grad():
        x = torch.from_numpy(feeds["x"])
        np.testing.assert_array_equal(seen[FIRST, "x"], (x + model.first(x)).numpy())
        np.testing.assert_array_equal(seen[SECOND, "x"], (3.0 + model.second(torch.zeros(2, 5, 16))).numpy())
    # norm + x: zeros, and the store's x in the place of the one that was computed.
    np.testing.assert_array_equal(outputs["output"], store.get(SECOND, "fed_x"))
    np.testing.assert_array_equal(feeds["x"], feeds_of()["x"])


def test_between_leaves_other_norms_to_themselves(store: ActivationStore) -> None:
    model, feeds = Residual().eval(), feeds_of()
    norms, _, _ = written(model, feeds, store)
    seen: list[Key] = []
    outputs = norms.between(feeds, [], store, lambda key, role, value: seen.append(key))
    with torch.no_grad():
        np.testing.assert_array_equal(outputs["output"], model(torch.from_numpy(feeds["x"])).numpy())
    assert seen == []


class First(nn.Module):
    """The model's input is what is normalized first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = HalfCastNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + x


def test_the_callers_arrays_are_never_written_over(store: ActivationStore) -> None:
    model, feeds = First().eval(), feeds_of()
    norms, _, _ = written(model, feeds, store)
    store.put(("norm", 0), "fed_x", np.zeros((2, 5, 16), np.float32))
    norms.between(feeds, [("norm", 0)], store, lambda key, role, value: None)
    np.testing.assert_array_equal(feeds["x"], feeds_of()["x"])
    feeds["x"].setflags(write=False)
    norms.between(feeds, [("norm", 0)], store, lambda key, role, value: None)


# -------------------------------------------------------------------------------------- a candidate of another dtype


def test_values_at_norms_are_rounded_to_the_deployed_dtypes(store: ActivationStore) -> None:
    """The float32 model gets values that float16 represents, and computes with them in float32."""
    model, feeds = Residual().eval(), feeds_of()
    _, survey = surveyed(model, feeds)
    half = {k: dataclasses.replace(n, x_dtype="float16", y_dtype="float16") for k, n in survey.called.items()}
    norms = TorchNorms(model, TorchRunner(model), find_norms(model), survey.called, half)
    with in_float64(model):
        norms.write_reference(wide(feeds), store)
    assert {np.asarray(store.get(FIRST, role)).dtype.name for role in ("fed_x", "fed_y")} == {"float16"}
    seen: dict[Key, np.ndarray] = {}
    outputs = norms.between(feeds, [FIRST, SECOND], store, lambda key, role, value: seen.update({key: value.copy()}))
    assert {value.dtype.name for value in (*seen.values(), *outputs.values())} == {"float32"}
    x = np.asarray(store.get(FIRST, "fed_x"))
    with norms.alone([FIRST]) as run:
        y = run({FIRST: NormFeed(x)})[FIRST].y
    assert y.dtype.name == "float32"
    np.testing.assert_allclose(y, norms.exact(FIRST, NormFeed(x)), rtol=1e-5, atol=1e-6)
    assert (norms.dtypes(FIRST).x, norms.deployed[FIRST].x_dtype) == ("float32", "float16")
