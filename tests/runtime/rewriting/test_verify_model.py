"""The proof of a whole rewritten file: what passes, what does not, and what cannot be said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.from_onnx.rewrite import Rewritten, rewrite
from rmsnorm_deploy.models.errors import EnvironmentMissingError, MismatchError, UsageError
from rmsnorm_deploy.runtime.rewriting import verify_model
from rmsnorm_deploy.runtime.rewriting.verify_model import prove_model
from rmsnorm_deploy.runtime.rewriting.verify_norms import Proof
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.graphs.onnx_text import parsed

X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
W = np.array([1, 2, 3, 4], np.float32)
# A norm written out, and what is made of its result.
NORM = """
    squares = Mul(x, x)
    mean = ReduceMean<keepdims = 1>(squares, axes)
    biased = Add(mean, eps)
    root = Sqrt(biased)
    h = Div(x, root)
    n = Mul(h, w)
"""


def model_of(rest: str, outputs: str = "float[n,4] y", constants: str = "", weight: str = "1, 2, 3, 4") -> ir.Model:
    text = (
        f"g (float[n,4] x) => ({outputs}) <float[4] w = {{{weight}}}, float eps = {{0.001}}, int64[1] axes = {{-1}}"
        f"{constants}> {{{NORM}{rest}}}"
    )
    return parsed(text)


def norm_of(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + 0.001) * W


class Files:
    """The file before and the one after, and the proof that they are the same."""

    def __init__(self, folder: Path, before: ir.Model, after: ir.Model | None = None) -> None:
        self.texts: list[str] = []
        self.before, self.after = folder / "before.onnx", folder / "after" / "model.onnx"
        self.after.parent.mkdir()
        ir.save(before, self.before)
        self.rewritten: Rewritten = rewrite(before, "primitives")
        assert len(self.rewritten.sites) == 1
        ir.save(self.rewritten.model if after is None else after, self.after)

    def proof(self, feeds: dict[str, np.ndarray] | None = None) -> Proof:
        return prove_model(
            self.rewritten, self.before, self.after, Proof(), feeds=feeds, seed=0, progress=self.texts.append
        )


# ----------------------------------------------------------------------------------------------------- prove_model


def test_the_same_model_passes_in_two_shapes(tmp_path: Path) -> None:
    files = Files(tmp_path, model_of("y = Neg(n)\nz = Abs(n)", "float[n,4] y, float[n,4] z"))
    proof = files.proof()
    assert proof.model is not None
    assert [(verdict.name, verdict.passed) for verdict in proof.model] == [("y", True), ("z", True)] * 2
    assert (proof.verdict, proof.alone, proof.notes, proof.unproven) == ("pass", False, [], "")
    assert len(files.texts) == 1  # no rounding was needed


def test_given_inputs_are_one_case_and_are_cast(tmp_path: Path) -> None:
    proof = Files(tmp_path, model_of("y = Neg(n)")).proof({"x": X})
    assert proof.model is not None
    assert len(proof.model) == 1
    assert proof.model[0].figures is not None
    assert proof.model[0].figures.count == 12


def test_a_wrong_weight_is_a_mismatch_after_all_roundings(tmp_path: Path) -> None:
    files = Files(tmp_path, model_of("y = Neg(n)"), model_of("y = Neg(n)", weight="1, 2, 3, 4.04"))
    proof = files.proof({"x": X})
    assert proof.verdict == "mismatch"
    assert proof.model is not None
    assert [verdict.passed for verdict in proof.model] == [False]
    assert len(files.texts) == 1 + 6


def amplified(weight: str = "1, 2, 3, 4") -> ir.Model:
    """(norm - its own result on X) * 1e6: zero before, and all that is left of a rounding after."""
    values = ", ".join(repr(float(value)) for value in np.float32(norm_of(X)).reshape(-1))
    return model_of(
        "gone = Sub(n, own)\ny = Mul(gone, factor)",
        constants=f", float[3,4] own = {{{values}}}, float[1] factor = {{1e6}}", weight=weight,
    )  # fmt: skip


def test_what_one_rounding_does_is_let_pass(tmp_path: Path) -> None:
    nudged = float(np.nextafter(np.float32(4), np.float32(5)))
    files = Files(tmp_path, amplified(), amplified(f"1, 2, 3, {nudged!r}"))
    proof = files.proof({"x": X})
    assert proof.verdict == "pass"
    assert 2 <= len(files.texts) <= 7  # it did not pass without a rounding


def test_what_is_more_than_a_rounding_is_not(tmp_path: Path) -> None:
    assert Files(tmp_path, amplified(), amplified("1, 2, 3, 4.001")).proof({"x": X}).verdict == "mismatch"


def test_a_new_file_that_does_not_run_is_a_mismatch(tmp_path: Path) -> None:
    files = Files(tmp_path, model_of("y = Neg(n)"))
    files.after.write_bytes(b"no model")
    with pytest.raises(MismatchError, match=r"model\.onnx"):
        files.proof()


def test_inputs_that_do_not_fit_are_the_users(tmp_path: Path) -> None:
    files = Files(tmp_path, model_of("y = Neg(n)"))
    with pytest.raises(UsageError, match="other"):
        files.proof({"other": X})
    with pytest.raises(UsageError, match="x"):
        files.proof({"x": X[:, :3]})


def test_made_up_inputs_that_the_file_refuses_prove_nothing(tmp_path: Path) -> None:
    """Its own result on X has three rows, and no made-up input has."""
    proof = Files(tmp_path, amplified()).proof()
    assert (proof.model, proof.verdict) == (None, "unproven")
    assert "not compared" in proof.unproven


def test_a_missing_onnxruntime_is_not_a_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*given: object, **options: object) -> object:
        raise EnvironmentMissingError("no onnxruntime")

    files = Files(tmp_path, model_of("y = Neg(n)"))
    monkeypatch.setattr(verify_model, "open_runner", missing)
    with pytest.raises(EnvironmentMissingError):
        files.proof()


def test_outputs_without_anything_finite(tmp_path: Path) -> None:
    """The logarithm of a negative is NaN."""
    some = model_of("neg = Abs(n)\nless = Neg(neg)\nminus = Sub(less, one)\ny = Log(minus)\nz = Neg(n)",
                    "float[n,4] y, float[n,4] z", ", float[1] one = {1}")  # fmt: skip
    proof = Files(tmp_path, some).proof()
    assert proof.verdict == "pass"
    assert len(proof.notes) == 1
    assert "y not compared" in proof.notes[0]
    (tmp_path / "all").mkdir()
    nothing = model_of("neg = Abs(n)\nless = Neg(neg)\nminus = Sub(less, one)\ny = Log(minus)",
                       constants=", float[1] one = {1}")  # fmt: skip
    proof = Files(tmp_path / "all", nothing).proof()
    assert (proof.model, proof.verdict) == (None, "unproven")
    assert "--inputs" in proof.unproven


# -------------------------------------------------------------------------------- where the file before does not load


def unloadable(files: Files) -> Files:
    """The file before calls an op that does not exist."""
    model = onnx.load(files.before)
    model.graph.node[-1].op_type = "NoSuchOp"
    onnx.save(model, files.before)
    return files


def test_the_new_file_alone_must_run_and_be_finite(tmp_path: Path) -> None:
    proof = unloadable(Files(tmp_path, model_of("y = Neg(n)"))).proof()
    assert (proof.verdict, proof.alone) == ("pass", True)
    assert proof.model is not None
    assert len(proof.model) == 2
    assert "NoSuchOp" in proof.notes[0]


def test_a_new_file_alone_that_is_not_finite_is_a_mismatch(tmp_path: Path) -> None:
    files = Files(tmp_path, model_of("zero = Sub(n, n)\ny = Div(n, zero)"))
    assert unloadable(files).proof().verdict == "mismatch"


def test_where_neither_loads_nothing_is_proven(tmp_path: Path) -> None:
    files = unloadable(Files(tmp_path, model_of("y = Neg(n)")))
    files.after.write_bytes(b"no model")
    proof = files.proof()
    assert (proof.verdict, proof.alone, proof.model) == ("unproven", False, None)
    assert "NoSuchOp" in proof.unproven


# ------------------------------------------------------------------------------------------- the rounded baseline


@pytest.mark.parametrize(("rest", "outputs"), [("y = Neg(n)", "float[n,4] y"), ("y = Neg(n)", "float[n,4] n")])
def test_a_rounding_multiplies_the_norm_by_one_and_an_eps(tmp_path: Path, rest: str, outputs: str) -> None:
    """Wherever its result is read, and where it is an output itself."""
    rewritten = rewrite(model_of(rest, outputs), "primitives")
    before = ir.to_proto(rewritten.original).SerializeToString()
    with OrtRunner(before) as runner:
        (plain,) = runner.run({"x": X}).values()
    with OrtRunner(verify_model._rounded(rewritten, 0)) as runner:
        assert [info.name for info in runner.outputs()] == [outputs.split()[-1]]
        (rounded,) = runner.run({"x": X}).values()
    eps = np.float32(2.0**-23)
    up, down = (plain * (1 + sign * eps) for sign in (np.float32(1), np.float32(-1)))
    assert np.all((rounded == up) | (rounded == down))
    assert not np.array_equal(rounded, plain)
    signs = rounded == up
    assert np.array_equal(signs, np.broadcast_to(signs[:1], signs.shape))  # one sign for each channel
    assert ir.to_proto(rewritten.original).SerializeToString() == before
    assert verify_model._rounded(rewritten, 0) == verify_model._rounded(rewritten, 0)


def test_names_of_roundings_are_free() -> None:
    assert verify_model._free_name(model_of("y = Neg(n)")) == "rounding"
    assert verify_model._free_name(model_of("rounding = Neg(n)\nrounding_3 = Neg(n)\ny = Neg(n)")) == "rounding__"


def test_of_two_baselines_the_worse_counts_element_by_element() -> None:
    reference = np.zeros(4, np.float32)
    one, other = np.array([1, -2, np.nan, 0], np.float32), np.array([-2, 1, 0, np.inf], np.float32)
    worse = verify_model._worse(one, other, reference)
    np.testing.assert_array_equal(worse, np.array([-2, -2, np.nan, np.inf], np.float32))
    assert verify_model._worse(one, other[:2], reference) is one


@pytest.mark.parametrize(
    ("changed", "differs", "passed"), [(0, 0, True), (0, 1, False), (1, 2, True), (1, 3, False), (3, 6, True)]
)
def test_whole_numbers_may_differ_twice_as_often_as_a_rounding_changes_them(
    changed: int, differs: int, passed: bool
) -> None:
    reference = np.zeros(10, np.int64)
    baseline, candidate = reference.copy(), reference.copy()
    baseline[:changed], candidate[10 - differs :] = 1, 7
    verdict = verify_model._judged("ids", candidate, reference, baseline)
    assert verdict.passed is passed


def test_whole_numbers_of_another_shape_or_dtype_fail() -> None:
    reference, baseline = np.zeros(4, np.int64), np.ones(4, np.int64)
    assert not verify_model._judged("ids", np.zeros(3, np.int64), reference, baseline).passed
    assert not verify_model._judged("ids", np.zeros(4, np.float32), reference, baseline).passed


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([np.nan, np.inf]), False),
        (np.array([np.nan, 1.0], np.float16), True),
        (np.zeros((0, 3)), False),
        (np.zeros((0, 3), np.int64), False),
        (np.array([False]), True),
    ],
)
def test_what_says_something(array: np.ndarray, expected: bool) -> None:
    assert verify_model._says_something(array) is expected


def test_the_vocabulary_is_that_of_the_smallest_table() -> None:
    def vocabulary(text: str) -> int | None:
        return verify_model._vocabulary(parsed(text))

    two = """g (int64[n] ids, int64[n] kinds) => (float[n,2] y) <float[7,2] words = {0,0,0,0,0,0,0,0,0,0,0,0,0,0},
        float[3,2] types = {0,0,0,0,0,0}> {
        near = Cast<to = 7>(ids)
        a = Gather(words, near)
        b = Gather(types, kinds)
        y = Add(a, b)
    }"""
    assert vocabulary(two) == 3
    assert vocabulary(two.replace("Gather(types, kinds)", "Cast<to = 1>(kinds)")) == 7
    assert vocabulary("g (float[n] x) => (float[n] y) { y = Neg(x) }") is None
