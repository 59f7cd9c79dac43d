"""An ONNX file opened at its norms: every number held to a few lines of numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.graph.metadata import FORM_KEY, PATH_KEY, SPEC_KEY, VALUES_KEY
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.norms import onnx_norms
from rmsnorm_deploy.runtime.norms.access import NormDtypes, NormFeed
from rmsnorm_deploy.runtime.norms.activation_store import ActivationStore, Key
from rmsnorm_deploy.runtime.norms.onnx_norms import OnnxNorms
from tests.helpers.graphs.onnx_text import parsed, values
from tests.helpers.norms.norm_cases import residual_model

FIRST, SECOND, GATED, LAST = ("first", 0), ("second", 0), ("gated", 0), ("last", 0)
EPS = 2.0**-10
# `last` is a norm whose result nothing reads.
TEXT = """g (float[n,4] x, float[n,4] other) => (float[n,4] out, float[n,4] total)
    <float[4] w1 = {1, 2, 3, 4}, float[4] w2 = {-1, 0.5, 2, 1}> {
    y1 = RMSNormalization<axis = -1, epsilon = 0.0009765625>(x, w1)
    half = Neg(y1)
    total = Add(x, half)
    y2 = RMSNormalization<axis = -1, epsilon = 0.0009765625>(total, w2)
    shut = Sigmoid(other)
    plain = RMSNormalization<axis = -1, epsilon = 0.0009765625>(y2, w1)
    y3 = Mul(plain, shut)
    y4 = RMSNormalization<axis = -1, epsilon = 0.0009765625>(y3, w1)
    out = Add(y3, y3)
}"""
W1, W2 = np.array([1, 2, 3, 4], np.float32), np.array([-1, 0.5, 2, 1], np.float32)
ROWS = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
OTHER = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
FEEDS = {"x": ROWS, "other": OTHER}
SEEN = dict[tuple[Key, str], np.ndarray]


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + EPS) * weight


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def note(model: ir.Model, path: str, core: str, names: dict[str, str], nodes: tuple[str, ...] = ()) -> None:
    """Say on nodes, told by their first outputs, that they are a norm's."""
    by_name = values(model)
    for output in (core, *nodes):
        node = by_name[output].producer()
        assert node is not None
        node.metadata_props.update({PATH_KEY: path, FORM_KEY: "plain"})
    main = by_name[core].producer()
    assert main is not None
    gate = {"gate": "after", "activation": "sigmoid"} if "gate" in names else {}
    main.metadata_props[SPEC_KEY] = NormSpec(eps=EPS, **gate).to_json()  # type: ignore[arg-type]
    main.metadata_props[VALUES_KEY] = json.dumps(names)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = parsed(TEXT, 23)
    note(model, "first", "y1", {"x": "x", "y": "y1"})
    note(model, "second", "y2", {"x": "total", "y": "y2"})
    note(model, "gated", "plain", {"x": "y2", "y": "y3", "gate": "other"}, ("shut", "y3"))
    note(model, "last", "y4", {"x": "y3", "y": "y4"})
    file = tmp_path_factory.mktemp("norms") / "model.onnx"
    ir.save(model, file)
    return file


def collected() -> tuple[SEEN, object]:
    seen: SEEN = {}

    def sink(key: Key, role: str, value: np.ndarray) -> None:
        assert (key, role) not in seen
        seen[key, role] = value

    return seen, sink


def test_what_the_file_says_of_itself(path: Path) -> None:
    norms = OnnxNorms(path, "cpu")
    assert norms.keys == [FIRST, SECOND, GATED, LAST]
    assert dict(norms.problems) == {}
    assert norms.remarks == []
    assert norms.unused == {LAST}


def test_a_norm_that_cannot_be_cut_out_is_a_problem(path: Path, tmp_path: Path) -> None:
    model = ir.load(path)
    node = values(model)["y2"].producer()
    assert node is not None
    node.metadata_props[VALUES_KEY] = "{gone"
    ir.save(model, tmp_path / "model.onnx")
    norms = OnnxNorms(tmp_path / "model.onnx", "cpu")
    assert norms.keys == [FIRST, GATED, LAST]
    assert "cannot be read" in norms.problems["second"]


def test_a_large_file_is_run_without_repacking_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def opening(*arguments: object, **options: object) -> object:
        opened.append(options)
        raise ArithmeticError

    monkeypatch.setattr(onnx_norms, "has_large_weights", lambda files: True)
    monkeypatch.setattr(onnx_norms, "open_runner", opening)
    norms = OnnxNorms(path, "cpu")
    (remark,) = norms.remarks
    assert "repacking" in remark
    with pytest.raises(ArithmeticError):
        norms.trace(FEEDS, norms.keys, lambda *_: None)
    assert opened == [{"weights_folder": path.parent, "session_options": {"repack_weights": False}}]


def test_sources_of_a_segment(path: Path) -> None:
    norms = OnnxNorms(path, "cpu")
    keys = norms.keys
    first, second = norms.sources(keys, FIRST), norms.sources(keys, SECOND)
    assert (first.keys, first.reads_inputs) == ([], True)
    assert second.keys == [FIRST]  # its x, which is the model's, and its y
    assert second.reads_inputs is False
    assert norms.sources(keys, "out").keys == [GATED, LAST]
    inside = norms.sources([FIRST, GATED], "total")
    assert (inside.keys, inside.paths) == ([FIRST], frozenset())
    assert norms.sources([FIRST], "out").paths == {"second", "gated"}


def test_each_norm_alone(path: Path) -> None:
    with OnnxNorms(path, "cpu").alone([SECOND, GATED]) as run:
        found = run({SECOND: NormFeed(ROWS.astype(np.float64)), GATED: NormFeed(3 * ROWS[:2], OTHER[:2])})
    assert set(found) == {SECOND, GATED}
    assert found[SECOND].y.dtype == np.float32
    close(found[SECOND].y, norm(ROWS, W2))
    close(found[GATED].y, norm(3 * ROWS[:2], W1) * sigmoid(OTHER[:2]))
    assert found[SECOND].total is None


def test_a_norm_that_adds_gives_its_sum_too(tmp_path: Path) -> None:
    model, _ = lower(residual_model(ir.DataType.FLOAT), "plugin")
    ir.save(model, tmp_path / "model.onnx")
    norms = OnnxNorms(tmp_path / "model.onnx", "cpu")
    (key,) = norms.keys
    x = np.random.default_rng(2).standard_normal((3, 2, 64)).astype(np.float32)
    with norms.alone([key]) as run:
        result = run({key: NormFeed(x)})[key]
    assert result.total is not None
    assert np.array_equal(result.total, x)
    scale = np.linspace(0.5, 1.5, 64)
    wide = x.astype(np.float64)
    close(result.y, wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + 1e-6) * scale)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_segments_are_fed_at_the_norms(path: Path, window: int | None) -> None:
    """Values that have nothing to do with the model's: what arrives is made of them and of the inputs alone."""
    norms = OnnxNorms(path, "cpu", window)
    rng = np.random.default_rng(5)
    seen, sink = collected()
    with ActivationStore() as store:
        for key in norms.keys:
            for role in ("fed_x", "fed_y"):
                store.put(key, role, rng.standard_normal((5, 4)))  # float64: it is cast
        # One value under two names: the second norm's result is what goes into the gated one.
        store.put(GATED, "fed_x", store.get(SECOND, "fed_y"))
        store.put(LAST, "fed_x", store.get(GATED, "fed_y"))
        fed = {(key, role): np.array(store.get(key, role)) for key in norms.keys for role in ("fed_x", "fed_y")}
        outputs = norms.between(FEEDS, norms.keys, store, sink)  # type: ignore[arg-type]
    assert set(seen) == {(FIRST, "x"), (SECOND, "x"), (GATED, "x"), (GATED, "gate"), (LAST, "x")}
    assert np.array_equal(seen[FIRST, "x"], ROWS)
    close(seen[SECOND, "x"], fed[FIRST, "fed_x"] - fed[FIRST, "fed_y"])
    close(seen[GATED, "x"], norm(fed[SECOND, "fed_x"], W2))
    assert np.array_equal(seen[GATED, "gate"], OTHER)
    assert set(outputs) == {"out", "total"}
    close(outputs["out"], 2 * fed[GATED, "fed_y"])
    close(outputs["total"], fed[FIRST, "fed_x"] - fed[FIRST, "fed_y"])


@pytest.mark.parametrize("window", [None, 1])
def test_the_whole_model_is_traced(path: Path, window: int | None) -> None:
    norms = OnnxNorms(path, "cpu", window)
    seen, sink = collected()
    outputs = norms.trace(FEEDS, [FIRST, SECOND, GATED], sink)  # type: ignore[arg-type]
    y1 = norm(ROWS, W1)
    y2 = norm(ROWS - y1, W2)
    y3 = norm(y2, W1) * sigmoid(OTHER)
    expected = {(FIRST, "x"): ROWS, (FIRST, "y"): y1, (SECOND, "x"): ROWS - y1, (SECOND, "y"): y2,
                (GATED, "x"): y2, (GATED, "y"): y3, (GATED, "gate"): OTHER}  # fmt: skip
    assert set(seen) == set(expected)
    for place, value in expected.items():
        close(seen[place], value)
    assert list(outputs) == ["out", "total"]
    close(outputs["out"], 2 * y3)
    close(outputs["total"], ROWS - y1)


def test_without_norms_the_outputs_are_computed_all_the_same(path: Path) -> None:
    norms = OnnxNorms(path, "cpu")
    with ActivationStore() as store:
        between = norms.between(FEEDS, [], store, lambda *_: None)
    traced = norms.trace(FEEDS, [], lambda *_: None)
    assert set(between) == set(traced) == {"out", "total"}
    assert all(np.array_equal(between[name], traced[name]) for name in traced)


def test_the_dtypes_of_a_norm_are_the_files(path: Path) -> None:
    norms = OnnxNorms(path, "cpu")
    assert norms.dtypes(GATED) == NormDtypes("float32", "float32", "float32")
    assert norms.dtypes(FIRST).gate is None
