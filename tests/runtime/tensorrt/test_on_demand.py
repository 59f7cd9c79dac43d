"""Engines that are built for the shapes that come, and models opened in the runtime that a user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.runtime.inputs.exported import open_exported
from rmsnorm_deploy.runtime.runners.base import Runner
from rmsnorm_deploy.runtime.runners.open import open_runner
from rmsnorm_deploy.runtime.tensorrt import on_demand
from rmsnorm_deploy.runtime.tensorrt.build import build_engine
from rmsnorm_deploy.runtime.tensorrt.on_demand import BuiltOnDemand, _reach, open_model
from rmsnorm_deploy.runtime.tensorrt.options import BuildOptions
from tests.helpers.tensorrt.engines import DecoderEngine
from tests.helpers.tensorrt.stand_in import StandIn

pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")

WIDTH = 32
FAST = BuildOptions(architectures=(89,))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The profiles of every build."""
    found: list[tuple[str, ...]] = []

    def build(model: Any, place: Any, options: BuildOptions) -> Any:
        found.append(options.profiles)
        return build_engine(model, place, options)

    monkeypatch.setattr(on_demand, "build_engine", build)
    return found


def test_one_engine_for_most_shapes(stand_in: StandIn, files: Any, builds: list[Any]) -> None:
    path = files.primitives(dims=("batch", "sequence", WIDTH))
    told: list[str] = []
    with BuiltOnDemand(path, FAST, progress=told.append) as runner, open_runner(path) as onnx_runner:
        assert isinstance(runner, Runner)
        assert [info.shape for info in runner.inputs()] == [("batch", "sequence", WIDTH)]
        assert [info.name for info in runner.outputs()] == ["y"]
        with pytest.raises(UsageError, match="no engine is built yet"):
            runner.provenance()
        for batch, length in ((1, 5), (4, 128), (2, 1), (5, 3), (1, 129), (1, 200)):
            x = np.random.default_rng(length).standard_normal((batch, length, WIDTH), np.float32)
            assert np.array_equal(runner.run({"x": x})["y"], onnx_runner.run({"x": x})["y"])
        assert runner.provenance()["engine"] == {"built_on_demand": 3}
    assert builds == [
        ("batch:1,1,4 sequence:1,5,128",), ("batch:1,5,5 sequence:1,3,128",), ("batch:1,1,5 sequence:1,129,258",),
    ]  # fmt: skip
    assert told[1:] == [f"building an engine for {path}, number {number}" for number in (2, 3)]


def test_other_dims_are_fixed_until_they_change(stand_in: StandIn, files: Any, builds: list[Any]) -> None:
    """The plugin requires a width that is known when an engine is built."""
    path = files.matmul(dims=("rows", WIDTH))
    with BuiltOnDemand(path.read_bytes(), FAST) as runner:
        for rows in (3, 3, 7, 5):
            assert runner.run({"x": np.ones((rows, WIDTH), np.float32)})["y"].shape == (rows, WIDTH)
    assert builds == [(), ("rows:3,7,7",)]


def test_dims_without_a_name_get_one(stand_in: StandIn, files: Any, builds: list[Any]) -> None:
    path = files.matmul(dims=(None, None, WIDTH))
    with BuiltOnDemand(path, FAST) as runner:
        for rows in (2, 4):
            runner.run({"x": np.ones((rows, 3, WIDTH), np.float32)})
    assert builds == [(), ("x_dim_0:2,4,4",)]


@pytest.mark.parametrize("links", [True, False])
def test_weights_in_other_files_are_found(
    stand_in: StandIn, files: Any, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """They are linked, or copied where the file system has no links."""

    def no_link(*_: Any) -> None:
        raise OSError("cross-device link")

    if not links:
        monkeypatch.setattr(on_demand.os, "link", no_link)
    path = files.matmul(external=True)
    x = np.random.default_rng(0).standard_normal((2, 3, WIDTH), np.float32)
    with open_runner(path) as onnx_runner:
        expected = onnx_runner.run({"x": x})["y"]
    with BuiltOnDemand(path, FAST) as runner:
        assert np.array_equal(runner.run({"x": x})["y"], expected)
    with BuiltOnDemand(path.read_bytes(), FAST, path.parent) as runner:
        assert np.array_equal(runner.run({"x": x}, ["y"])["y"], expected)
        folder = runner._folder
    assert not folder.exists()


def test_feeds_and_types_are_checked(stand_in: StandIn, files: Any, tmp_path: Path) -> None:
    with (
        BuiltOnDemand(files.matmul(), FAST) as runner,
        pytest.raises(UsageError, match=r"input x: expected dtype float32, got float64"),
    ):
        runner.run({"x": np.ones((1, 1, WIDTH))})
    text = helper.make_tensor_value_info("x", TensorProto.STRING, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [text], [text])
    graph.output[0].name = "y"
    onnx.save(helper.make_model(graph), tmp_path / "text.onnx")
    with pytest.raises(UnsupportedError, match=r"x: expected a tensor of numbers, got ONNX's type 8"):
        BuiltOnDemand(tmp_path / "text.onnx", FAST)


@pytest.mark.parametrize(
    ("dim", "size", "known", "expected"),
    [
        ("batch_size", 2, None, (1, 4)), ("batch", 9, None, (1, 9)), ("batch", 9, (1, 4), (1, 9)),
        ("sequence", 3, None, (1, 128)), ("sequence", 300, None, (1, 300)), ("sequence", 300, (1, 128), (1, 600)),
        ("past_sequence", 0, None, (0, 128)), ("past_sequence", 5, (0, 128), (0, 128)),
        ("height", 7, None, (7, 7)), ("height", 5, (7, 7), (5, 7)), ("height", 9, (5, 7), (5, 9)),
        ("sequence", 0, None, (0, 128)), ("batch", 0, None, (0, 4)),
    ],
)  # fmt: skip
def test_how_far_a_profile_reaches(
    dim: str, size: int, known: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    assert _reach(dim, size, known) == expected


def test_models_open_in_the_runtime_that_is_named(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    folder, engine = open_exported(decoder_engine.folder), open_exported(decoder_engine.engine)
    for exported, runner, expected in (
        (folder, None, "OrtRunner"), (folder, "ort", "OrtRunner"), (folder, "rtx", "BuiltOnDemand"),
        (engine, None, "TensorRTRunner"), (engine, "rtx", "TensorRTRunner"),
    ):  # fmt: skip
        with open_model(exported, runner) as opened:
            assert type(opened).__name__ == expected
    for exported, runner, provider, message in (
        (folder, "onnx", "cpu", "--runner: expected ort, tensorrt, rtx, got onnx"),
        (folder, "rtx", "cuda", "expected no provider of ONNX Runtime for a run in TensorRT, got cuda"),
        (engine, "ort", "cpu", "is an engine, which ONNX Runtime cannot run; name the folder it was built from"),
        (engine, "tensorrt", "cpu", "was built by TensorRT-RTX, so TensorRT cannot run it"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            open_model(exported, runner, provider)
