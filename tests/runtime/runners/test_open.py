"""Opening what runs a model: each kind of source, the options that go on to it, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.runtime.runners.base import Runner
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from rmsnorm_deploy.runtime.runners.open import has_large_weights, open_runner
from rmsnorm_deploy.runtime.runners.threads import using_threads
from rmsnorm_deploy.runtime.runners.torch import TorchRunner

TEXT = '<ir_version: 8, opset_import: ["" : 18]> g (float[n,2] x) => (float[n,2] y) { y = Add(x, x) }'
X = np.array([[1.0, -2.0]], np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


class Named(os.PathLike[str]):
    """A path that is neither a text nor a `Path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


@pytest.mark.parametrize("kind", [str, Path, Named, Path.read_bytes])
def test_onnx_in_any_form_runs_in_onnx_runtime(path: Path, kind: Any) -> None:
    with open_runner(kind(path)) as runner:
        assert isinstance(runner, OrtRunner)
        assert isinstance(runner, Runner)
        assert np.array_equal(runner.run({"x": X})["y"], 2 * X)


def test_a_module_runs_in_pytorch() -> None:
    with open_runner(Twice()) as runner:
        assert isinstance(runner, TorchRunner)
        assert np.array_equal(runner.run({"x": X})["output"], 2 * X)


@pytest.mark.parametrize("provider", ["cpu", "CPUExecutionProvider", ["cpu"], ("CPU",)])
def test_one_provider_or_several(path: Path, provider: Any) -> None:
    with open_runner(path, provider) as runner:
        assert runner.provenance()["providers_asked"] == ["CPUExecutionProvider"]


def test_the_cpu_is_what_runs_when_nothing_is_asked_for(path: Path) -> None:
    with open_runner(path) as runner:
        assert runner.provenance()["providers_used"] == ["CPUExecutionProvider"]


def test_options_go_on_to_onnx_runtime(path: Path) -> None:
    options = {"intra_op_num_threads": 1}
    with open_runner(path, session_options=options, io_binding=True) as runner:
        told = runner.provenance()
    assert told["session_options"] == options
    assert told["io_binding"] is True
    with pytest.raises(UsageError, match="no_such_option"):
        open_runner(path, session_options={"no_such_option": 1})


def test_options_go_on_to_pytorch() -> None:
    with open_runner(Twice(), input_names=["rows"], output_names=["sum"], dtype="float64") as runner:
        assert [info.name for info in runner.inputs()] == ["rows"]
        result = runner.run({"rows": X})
    assert list(result) == ["sum"]
    assert result["sum"].dtype == np.float64


def test_an_option_of_the_other_backend_is_an_error(path: Path) -> None:
    with pytest.raises(TypeError, match="input_names"):
        open_runner(path, input_names=["x"])
    with pytest.raises(TypeError, match="session_options"):
        open_runner(Twice(), session_options={})


def test_a_module_ignores_the_provider() -> None:
    with open_runner(Twice(), "nothing that exists") as runner:
        assert runner.provenance()["device"] == "cpu"


@pytest.mark.parametrize("source", [None, 3, ["model.onnx"], torch.ones(1), Twice])
def test_other_sources_are_refused(source: Any) -> None:
    with pytest.raises(UsageError, match=f"got {type(source).__name__}"):
        open_runner(source)


def test_what_cannot_be_opened_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.onnx"):
        open_runner(tmp_path / "gone.onnx")
    with pytest.raises(UsageError):
        open_runner(b"no model")
    with pytest.raises(UsageError, match="abacus"):
        open_runner(path, "abacus")
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentMissingError, match="CUDA"):
            open_runner(path, "cuda")


# --------------------------------------------------------------------------------------------- has_large_weights


def sized(folder: Path, *sizes: int) -> list[Path]:
    """Files of these sizes that take no room on the disk."""
    files = []
    for number, size in enumerate(sizes):
        files.append(folder / f"{number}.bin")
        with files[-1].open("wb") as stream:
            stream.truncate(size)
    return files


@pytest.mark.parametrize(
    ("sizes", "large"),
    [((), False), ((1 << 30,), False), (((1 << 30) + 1,), True), ((1 << 29, 1 << 29), False), ((1 << 30, 1), True)],
)
def test_weights_are_large_beyond_one_gib_together(tmp_path: Path, sizes: tuple[int, ...], large: bool) -> None:
    assert has_large_weights(sized(tmp_path, *sizes)) is large


def test_threads_where_nothing_else_says_so(path: Path) -> None:
    def threads(**options: Any) -> int:
        with OrtRunner(path, **options) as runner:
            return int(runner._session.get_session_options().intra_op_num_threads)

    with using_threads(3):
        assert (threads(), threads(session_options={"intra_op_num_threads": 1})) == (3, 1)
    assert threads() == 0
