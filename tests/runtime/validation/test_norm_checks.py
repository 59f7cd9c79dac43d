"""Norms checked alone: each fault fails on the kind of input that is there for it, and float16 traps do not spring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.from_torch.export_model import prepare
from rmsnorm_deploy.export.from_torch.save import PreparedModel, save
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.dtypes import numpy_dtype
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.models.recognition.site import norm_name
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.norms.access import CalledNorm, NormFeed, NormResult
from rmsnorm_deploy.runtime.norms.activation_store import ActivationStore, Key
from rmsnorm_deploy.runtime.norms.adversarial_rows import AS_IT_RUNS, KINDS, adversarial, turns
from rmsnorm_deploy.runtime.norms.check_norm import judge_norm
from rmsnorm_deploy.runtime.norms.float64_model import in_float64
from rmsnorm_deploy.runtime.norms.onnx_norms import OnnxNorms
from rmsnorm_deploy.runtime.norms.torch_norms import TorchNorms, survey_norms
from rmsnorm_deploy.runtime.runners.torch import TorchRunner
from rmsnorm_deploy.runtime.validation.api import validate
from rmsnorm_deploy.runtime.validation.norm_checks import NormCheck, check_norms, try_or_note
from tests.helpers.norms.norm_zoo import ZOO

KIND = {kind.name: kind for kind in KINDS}
NAMES = [AS_IT_RUNS.name, *(kind.name for kind in KINDS)]
KEY: Key = ("0", 0)
ROWS = {"input": np.random.default_rng(1).standard_normal((8, 10, 64)).astype(np.float32)}

Compute = Callable[[np.ndarray, np.ndarray], np.ndarray]


# ------------------------------------------------------------------------------------------------------ one norm


class Faulty:
    """A candidate whose one norm is a function of x and the weight, both float32; its result is cast to x's dtype."""

    def __init__(self, compute: Compute, weight: Tensor, total: Callable[[np.ndarray], np.ndarray] | None) -> None:
        self._compute, self._weight, self._total = compute, weight.detach().float().numpy(), total

    @contextmanager
    def alone(self, keys: Any) -> Iterator[Any]:
        def run(feeds: Any) -> dict[Key, NormResult]:
            x = feeds[KEY].x
            with np.errstate(all="ignore"):
                y = self._compute(x.astype(np.float32), self._weight)
            y = y.astype(x.dtype) if y.dtype == np.float32 else y
            return {KEY: NormResult(y, None if self._total is None else self._total(x))}

        yield run


def checked(compute: Compute, dtype: str, total: Any = None) -> NormCheck:
    """The check of a Llama norm of width 64 against PyTorch's."""
    module = ZOO["llama"].build(getattr(torch, dtype))
    model = nn.Sequential(module).eval()
    runner, recognition = TorchRunner(model), find_norms(model)
    feeds = {"input": ROWS["input"].astype(numpy_dtype(dtype))}
    called = survey_norms(model, runner, recognition, feeds).called
    norms = TorchNorms(model, runner, recognition, called)
    with ActivationStore() as store:
        with in_float64(model):
            norms.write_reference({"input": feeds["input"].astype(np.float64)}, store)
        candidate: Any = Faulty(compute, module.weight, total)
        (check,) = check_norms(candidate, norms, [called[KEY]], store, 0, lambda text: None)
    return check


def right(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6)) * weight


def with_eps(eps: float) -> Compute:
    return lambda x, w: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * w


def eps_outside(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + np.float32(1e-6)) * w


def centered(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return right(x - np.mean(x, axis=-1, keepdims=True), w)


def half_squares(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    squares = (x.astype(np.float16) ** 2).astype(np.float32)
    return x / np.sqrt(np.mean(squares, axis=-1, keepdims=True) + np.float32(1e-6)) * w


def half_sums(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    sums = np.zeros_like(x[..., :1], np.float16)
    for index in range(x.shape[-1]):
        sums = (sums + (x[..., index : index + 1] ** 2).astype(np.float16)).astype(np.float16)
    return x / np.sqrt(sums.astype(np.float32) / x.shape[-1] + np.float32(1e-6)) * w


def flushed(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return right(np.where(np.abs(x) < 2.0**-14, np.float32(0), x), w)


def leaking(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The rows of one matrix share a running sum, as a reduction in place does; its NaN stays."""
    lost = np.float32(0) * np.cumsum(np.sum(x, axis=-1, keepdims=True, dtype=np.float64), axis=-2).astype(np.float32)
    return right(x, w) + lost


def other_axis(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-2, keepdims=True) + np.float32(1e-6)) * w


def clipped(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return right(np.clip(x, -3e4, 3e4), w)


FAULTS: dict[str, tuple[Compute, str, set[str]]] = {
    "no eps": (with_eps(0.0), "float32", {"tiny", "zeros"}),
    "eps ten times too large": (with_eps(1e-5), "float32", {"tiny"}),
    "eps outside the root": (eps_outside, "float32", {"tiny"}),
    "no eps, float16": (with_eps(0.0), "float16", {"tiny", "zeros"}),
    "the mean subtracted": (centered, "float32", {"constant", "normal"}),
    "squares in float16": (half_squares, "float16", {"large", "largest"}),
    "sums in float16": (half_sums, "float16", {"large", "normal"}),
    "subnormals flushed": (flushed, "float16", {"subnormal"}),
    "rows that leak": (leaking, "float32", {"NaN and Inf"}),
    "another axis": (other_axis, "float32", {"normal", "single channel"}),
    "clipped": (clipped, "float16", {"large"}),
    "no weight": (lambda x, w: right(x, np.ones_like(w)), "float32", {"normal", AS_IT_RUNS.name}),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_norm_that_is_right_passes_on_every_kind(dtype: str) -> None:
    def cast_first(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return right(x, np.ones_like(w)).astype(numpy_dtype(dtype)) * w.astype(numpy_dtype(dtype))

    check = checked(cast_first, dtype)
    assert [verdict.name for verdict in check.kinds] == NAMES
    assert check.passed
    assert check.reason == f"correct on {len(NAMES)} kinds of rows"
    row = check.to_dict()
    assert (row["path"], row["call"], row["form"]) == ("0", 0, "plain")
    assert row["computes"] == "weight, cast-then-scale, eps 1e-06"
    assert [kind["kind"] for kind in row["inputs"]] == NAMES
    assert all(kind["figures"]["nonfinite_agree"] for kind in row["inputs"])
    assert all(kind["figures"]["count"] >= 64 for kind in row["inputs"])


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_on_the_kind_that_is_there_for_it(fault: str) -> None:
    compute, dtype, kinds = FAULTS[fault]
    check = checked(compute, dtype)
    failed = {verdict.name for verdict in check.kinds if not verdict.passed}
    assert not check.passed
    assert kinds <= failed
    assert all(name in check.reason for name in failed)
    rows = {row["kind"]: row for row in check.to_dict()["inputs"]}
    assert all(rows[name]["figures"]["worst"] for name in kinds - {"NaN and Inf"})
    assert all(rows[name]["figures"]["histogram"] is None for name in set(rows) - failed)


def test_one_rounding_more_in_a_half_type_is_detected() -> None:
    """Scaled in float32 and rounded twice is half an ULP worse than what PyTorch does."""

    def rounded_down(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        y = right(x, np.ones_like(w)).astype(np.float16) * w.astype(np.float16)
        return np.nextafter(y, np.float16(0))

    check = checked(rounded_down, "float16")
    assert not check.passed
    reasons = [verdict.reason for verdict in check.kinds if not verdict.passed]
    assert any("ULP" in reason or "allowed" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y[:, :5], "expected the shape [8, 10, 64] of PyTorch, got [8, 5, 64]"),
        (lambda y: y.astype(np.int64), "dtype mismatch"),
        (lambda y: np.full_like(y, np.nan), "NaN or infinity out of place"),
        (lambda y: np.where(np.arange(64) == 3, np.float32(np.inf), y), "NaN or infinity out of place"),
    ],
)
def test_results_of_another_shape_or_kind_fail(change: Callable[[np.ndarray], np.ndarray], reason: str) -> None:
    with np.errstate(invalid="ignore"):
        check = checked(lambda x, w: change(right(x, w)), "float32")
    assert not check.passed
    assert reason in check.reason


def test_a_wrong_sum_fails_and_a_correct_one_is_not_listed() -> None:
    check = checked(right, "float32", total=lambda x: x)
    assert (check.passed, check.form) == (True, "residual_add")
    assert [verdict.name for verdict in check.kinds] == NAMES
    check = checked(right, "float32", total=lambda x: x + np.float32(1))
    assert not check.passed
    assert "sum: its second output is not the sum of its inputs" in check.reason


def test_names_say_which_call() -> None:
    assert [norm_name(*key) for key in (("a.b", 0), ("a.b", 2), ("", 0))] == ["a.b", "a.b (call 3)", "the model itself"]


def test_a_part_that_cannot_run_is_noted() -> None:
    notes: list[str] = []

    def fails() -> list[Any]:
        raise UsageError("no kernel")

    assert try_or_note("norms", notes, fails) == []
    assert notes == ["norms could not be checked: no kernel"]
    assert try_or_note("norms", notes, lambda: [1]) == [1]


def test_pytorch_far_from_its_formula_is_not_a_baseline() -> None:
    norm = CalledNorm(KEY, NormSpec(eps=1e-6), (2, 64), "float32", "float32", None, True)
    reference = np.random.default_rng(0).standard_normal((2, 64))
    own = (reference * (1 + 1e-3)).astype(np.float32)
    verdict = judge_norm(KIND["normal"], norm, own, reference, own)
    assert not verdict.passed
    assert "there is no valid reference" in verdict.reason
    assert judge_norm(KIND["largest"], norm, own, reference, own).passed, "overflow is an excuse there"


def test_an_outlier_of_a_wide_row_is_rounded_by_its_own_size() -> None:
    norm = CalledNorm(KEY, NormSpec(eps=1e-6), (1, 4096), "float16", "float16", None, True)
    reference = np.random.default_rng(0).standard_normal((1, 4096))
    reference[0, 7] = 100.03  # between two values of float16 that are 1/16 apart
    own, row = reference.astype(np.float16), np.sqrt(np.mean(reference**2))
    assert np.abs(own - reference).max() / row > 8 * np.finfo(np.float16).eps
    assert judge_norm(KIND["outlier channels"], norm, own, reference, own).passed
    own[0, 7] *= np.float16(1.01)
    verdict = judge_norm(KIND["outlier channels"], norm, own, reference, own)
    assert "PyTorch's own norm differs by 9.93 eps x row scale from the formula" in verdict.reason


# ------------------------------------------------------------------------------------------------- float16 traps


TRAPPED = ("llama", "gemma2", "olmo2", "torch", "l2_weighted", "biased", "mamba2", "qwen3_next", "falcon_h1")


class Trap(nn.Module):
    """Norms of many kinds in a row, each behind a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: ZOO[name].build() for name in TRAPPED})

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for name, norm in self.norms.items():
            h = h * 0.5 + (norm(h, x * 0.1) if ZOO[name].gated else norm(h))
        return h


@pytest.fixture(scope="module")
def trap() -> tuple[nn.Module, PreparedModel]:
    model = Trap().eval().half()
    return model, prepare(model, inputs={"x": torch.ones(2, 5, 64).half()})


@pytest.mark.parametrize("target", TARGETS)
def test_squares_beyond_float16_are_finite_and_right(
    target: str, trap: tuple[nn.Module, PreparedModel], tmp_path: Path
) -> None:
    model, prepared = trap
    save(prepared, tmp_path / "out", target)
    report = validate(tmp_path / "out", model, shapes=[(2, 20)])
    assert [norm.norm.key[0] for norm in report.norms] == [f"norms.{name}" for name in TRAPPED]
    assert report.culprits == []
    for norm in report.to_dict()["norms"]:
        rows = {row["kind"]: row for row in norm["inputs"]}
        for kind in ("large", "largest"):
            assert rows[kind]["passed"]
            assert rows[kind]["figures"]["nonfinite_agree"]
            assert rows[kind]["figures"]["count"] >= 2 * 64
            assert rows[kind]["figures"]["max_rel_row"] < 4 * 2.0**-10
            assert "not finite" not in rows[kind]["reason"]
    access = OnnxNorms(tmp_path / "out" / "model.onnx", "cpu")
    with access.alone(access.keys) as alone:
        _all_finite(alone, [norm.norm for norm in report.norms])


def _all_finite(alone: Callable[..., Any], called: list[CalledNorm]) -> None:
    """No result of a row of up to 65504 is infinite or NaN, and none is zero."""
    for turn in range(turns(called[0])):
        feeds: dict[Key, NormFeed] = {}
        kinds: dict[Key, np.ndarray] = {}
        for norm in called:
            feeds[norm.key], kinds[norm.key] = adversarial(norm, turn, seed=3)
        for key, result in alone(feeds).items():
            big = np.isin(kinds[key], [NAMES.index("large") - 1, NAMES.index("largest") - 1])
            x, y = (array.reshape(len(big), -1)[big] for array in (feeds[key].x, result.y))
            assert np.abs(x).max() > 5e4
            assert np.isfinite(y).all(), key
            assert (np.abs(y).max(axis=1) > 0.05).all(), key


class Closed(nn.Module):
    """A norm whose gate is all but closed in some channels."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.norm = ZOO[name].build()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, torch.where(x > 1.0, x - 20.0, x)) + x


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_a_closed_gate_is_not_a_fault(name: str, tmp_path: Path) -> None:
    """ONNX Runtime's sigmoid is 0 below -18: nothing beside the row, though many ULPs of an element near 0."""
    model = Closed(name).eval().half()
    save(prepare(model, inputs={"x": torch.ones(2, 5, 64).half()}), tmp_path / "out", "ort")
    report = validate(tmp_path / "out", model, shapes=[(2, 20)])
    assert report.culprits == []
