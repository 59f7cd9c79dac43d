"""Which name of a file is which of PyTorch's: by name, by what only one can be, by order; never silently."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.runners.base import TensorInfo
from rmsnorm_deploy.runtime.validation.api import bisect, validate
from rmsnorm_deploy.runtime.validation.names import Renamed, match_inputs, match_outputs, names_for_torch
from tests.helpers.runtime.stand_ins import FunctionRunner


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(50, 32), nn.RMSNorm(32, eps=1e-6), nn.Linear(32, 50)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(input_ids) * attention_mask[..., None]
        return {"logits": self.head(self.norm(hidden)), "hidden": hidden}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(32, eps=1e-6), nn.RMSNorm(32, eps=1e-6)
        self.linear, self.head = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x + self.linear(self.first(x)) * y
        return self.head(self.second(total)), total


class Optional(nn.Module):
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor | None:
        return input_ids


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reader, Path]:
    torch.manual_seed(0)
    model, folder = Reader().eval(), tmp_path_factory.mktemp("reader") / "out"
    inputs = {"input_ids": torch.randint(0, 50, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    export_model(model, folder, target="primitives", inputs=inputs)
    return model, folder


@pytest.fixture(scope="module", params=["primitives", "ort", "plugin"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Path]:
    torch.manual_seed(0)
    model, folder = Pair().eval(), tmp_path_factory.mktemp("pair") / "out"
    inputs = {"x": torch.randn(2, 5, 32), "y": torch.randn(2, 5, 32)}
    export_model(model, folder, target=request.param, inputs=inputs)
    return model, folder


def renamed(folder: Path, names: Mapping[str, str], place: Path, *, backwards: bool = False) -> Path:
    """A file with other names of inputs and outputs, which are in the opposite order if `backwards` is set."""
    proto = onnx.load(folder / "model.onnx")
    graph = proto.graph
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for values in (graph.input, graph.output) if backwards else ():
        items = list(values)[::-1]
        del values[:]
        values.extend(items)
    onnx.save(proto, place / "renamed.onnx")
    return place / "renamed.onnx"


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("names", "notes"),
    [
        ({}, []),
        ({"input_ids": "ids"}, ["input ids is taken for input_ids (by its name)"]),
        (
            {"input_ids": "ids", "attention_mask": "mask"},
            ["input ids is taken for input_ids (by its name)", "input mask is taken for attention_mask (by its name)"],
        ),
        ({"logits": "logits.1"}, ["output logits.1 is taken for logits (by its name)"]),
        (
            {"logits": "o1", "hidden": "o0"},
            [
                "output o0 is taken for hidden (by its dtype and dims)",
                "output o1 is taken for logits (by its dtype and dims)",
            ],
        ),
    ],
)
def test_renamed_inputs_and_outputs_are_matched_and_noted(
    names: dict[str, str], notes: list[str], backwards: bool, reader: tuple[Reader, Path], tmp_path: Path
) -> None:
    model, folder = reader
    report = validate(renamed(folder, names, tmp_path, backwards=backwards), model)
    assert (report.verdict, report.culprits) == ("pass", [])
    assert sorted(report.notes) == sorted(f"the file's {note}" for note in notes)
    assert (len(report.norms), len(report.rows)) == (1, 16)


@pytest.mark.parametrize(
    "names",
    [
        {"x": "hidden"},
        {"x": "hidden", "y": "other"},
        {"output_0": "logits", "output_1": "hidden"},
        {"x": "a", "y": "b", "output_0": "c", "output_1": "d"},
    ],
)
def test_a_norm_whose_values_were_renamed_is_checked(
    names: dict[str, str], pair: tuple[Pair, Path], tmp_path: Path
) -> None:
    model, folder = pair
    report = bisect(renamed(folder, names, tmp_path), model)
    assert (report.verdict, report.culprits) == ("pass", [])
    assert (len(report.norms), len(report.segments)) == (2, 4)
    assert not [note for note in report.notes if "could not be checked" in note]


def test_given_inputs_have_the_names_of_either_side(pair: tuple[Pair, Path], tmp_path: Path) -> None:
    model, folder = pair
    file = renamed(folder, {"x": "hidden"}, tmp_path)
    x, y = (np.random.default_rng(n).standard_normal((2, 5, 32)).astype(np.float32) for n in (1, 2))
    for feeds in ({"hidden": x, "y": y}, {"x": x, "y": y}):
        np.savez(tmp_path / "given.npz", **feeds)
        assert validate(file, model, cases=[feeds]).verdict == "pass"
        assert validate(file, model, inputs=str(tmp_path / "given.npz")).verdict == "pass"


def test_sides_that_contradict_are_listed(reader: tuple[Reader, Path]) -> None:
    class Other(nn.Module):
        def forward(self, input_ids: Tensor, pixels: Tensor, more: Tensor) -> Tensor:
            return input_ids

    with pytest.raises(UsageError) as error:
        validate(reader[1] / "model.onnx", Other())
    for text in ("input_ids (int64 [", "attention_mask (int64 [", "PyTorch has", "pixels, more", "--against"):
        assert text in str(error.value)


def test_a_dtype_that_cannot_be_is_refused() -> None:
    class Tokens(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    with pytest.raises(UsageError, match=r"it has a \(float32 \[2, 3\]\); PyTorch has input_ids \(int64\)"):
        match_inputs([TensorInfo("a", "float32", (2, 3))], Tokens(), (), "it")


def test_optional_parameters_are_taken_in_order_and_a_cache_is_not_matched() -> None:
    infos = [TensorInfo("tokens", "int64", (None, None)), TensorInfo("past_key_values.0.key", "float32", None)]
    found = match_inputs(infos, Optional(), (), "it")
    assert found.names == {"tokens": "input_ids"}
    assert found.notes == ("the file's input tokens is taken for input_ids (by order)",)


def test_what_the_manifest_says_of_the_inputs_decides() -> None:
    rows = [
        {"name": "x", "dtype": "float32", "shape": ["batch", 8]},
        {"name": "y", "dtype": "float32", "shape": ["batch", 4]},
    ]
    infos = [TensorInfo("a", "float32", ("batch", 4)), TensorInfo("b", "float32", ("batch", 8))]
    assert match_inputs(infos, Pair(), rows, "it").names == {"a": "y", "b": "x"}


def test_a_name_that_says_more_is_kept() -> None:
    class Tokens(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens

    found = match_inputs([TensorInfo("input_ids", "int64", (None, None))], Tokens(), (), "it")
    assert (found.names, found.kept) == ({}, {"tokens": "input_ids"})
    assert found.notes == ("the file's input input_ids is taken for tokens (by order)",)


def test_outputs_that_are_left_are_extra_and_names_that_collide_are_set_apart() -> None:
    row, table = np.zeros((2, 3), np.float32), np.zeros((2, 5), np.float32)
    found = match_outputs({"output_0": table, "more": row}, {"output_0": row, "output_1": table}, "it", "Model")
    assert (found.names, found.extra) == ({"output_0": "output_1", "more": "output_0"}, ())
    alone = match_outputs({"output_0": table}, {"output_0": row, "output_1": table}, "it", "Model")
    names = names_for_torch(alone, ["output_0", "output_1"], ["output_0"])
    assert names == {"output_1": "output_0", "output_0": "output_0 of PyTorch"}


def test_a_renamed_runner_takes_and_returns_the_new_names() -> None:
    runner = Renamed(FunctionRunner(lambda feeds: {"y": feeds["a"]}, outputs=["y"]), {"a": "x"}, {"y": "logits"})
    assert list(runner.run({"x": np.ones(1)})) == ["logits"]
    assert [info.name for info in runner.outputs()] == ["logits"]
