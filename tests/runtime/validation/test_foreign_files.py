"""Files that were changed after the export, or by others, and that are honest: each is judged, none is accused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from rmsnorm_deploy.cli.application import app
from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.runtime.runners.open import open_runner
from rmsnorm_deploy.runtime.validation.api import bisect, validate


class Reader(nn.Module):
    """Reads tokens and returns logits, of the last token only where `last` is set."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(50, 32), nn.RMSNorm(32, eps=1e-6), nn.Linear(32, 50)
        self.last = last

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.embed(input_ids))
        return {"logits": self.head(x[:, -1:] if self.last else x)}


class LongOnly(Reader):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.embed(input_ids))
        return {"logits": self.head(x) * (2 if input_ids.shape[1] > 16 else 1)}


class NormOfNorm(nn.Module):
    def __init__(self, add: bool) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(32, eps=1e-6), nn.RMSNorm(32, eps=1e-6)
        self.head, self.add = nn.Linear(32, 32), add

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(self.second(y + x if self.add else y))


def exported(model: nn.Module, folder: Path, length: int = 9, target: str = "ort") -> Path:
    torch.manual_seed(0)
    export_model(model, folder, target=target, inputs={"input_ids": torch.randint(0, 50, (2, length))})
    return folder


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Reader().eval()


def test_nodes_in_any_order_are_validated(model: nn.Module, tmp_path: Path) -> None:
    file = exported(model, tmp_path / "out") / "model.onnx"
    proto = onnx.load(file)
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, tmp_path / "unsorted.onnx")
    report = validate(tmp_path / "unsorted.onnx", model)
    assert (report.verdict, report.culprits, report.notes) == ("pass", [], [])
    assert len(report.norms) == 1


def test_logits_of_the_last_token_are_compared_with_the_last_token(model: nn.Module, tmp_path: Path) -> None:
    model.last = True  # type: ignore[assignment]
    folder = exported(model, tmp_path / "out")
    model.last = False  # type: ignore[assignment]
    report = validate(folder, model)
    assert (report.verdict, report.culprits) == ("pass", [])
    assert report.notes == ["logits has the last token only, so it was compared with the last token of PyTorch's"]


def test_logits_of_the_first_token_are_an_error(model: nn.Module, tmp_path: Path) -> None:
    class First(Reader):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.norm(self.embed(input_ids)))[:, :1]}

    first = First().eval()
    first.load_state_dict(model.state_dict())
    assert validate(exported(first, tmp_path / "out"), model).verdict == "fail"


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("target", ["primitives", "ort"])
def test_a_norm_of_a_norm_passes(add: bool, target: str, tmp_path: Path) -> None:
    model = NormOfNorm(add).eval()
    export_model(model, tmp_path / "out", target=target, inputs={"x": torch.randn(2, 9, 32)})
    report = validate(tmp_path / "out", model)
    assert (report.verdict, report.culprits, report.notes) == ("pass", [], [])
    assert len(report.norms) == 2


def test_a_file_is_validated_at_the_ends_of_its_range_and_run_inside_it(tmp_path: Path) -> None:
    model = LongOnly().eval()
    folder = exported(model, tmp_path / "out", length=20)
    row: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["inputs"][0]
    assert (row["shape"], row["ranges"]) == (["batch", "sequence"], {"sequence": [17, None]})
    for thing in (folder, folder / "model.onnx"):
        report = validate(thing, model)
        assert report.verdict == "pass"
        assert [name for name, _ in report.rows] == ["1x17", "2x33", "all token ids"]
    with open_runner(folder / "model.onnx") as runner:
        assert runner.run({"input_ids": np.zeros((1, 17), np.int64)})["logits"].shape == (1, 17, 50)
        with pytest.raises(UsageError, match=r"input_ids: dim sequence: expected 17 or more, .*; got 5"):
            runner.run({"input_ids": np.zeros((1, 5), np.int64)})
    for thing in (folder, folder / "model.onnx"):
        shown = CliRunner().invoke(app, ["inspect", str(thing)])
        assert "valid for sequence: 17 or more" in shown.output
        payload = json.loads(CliRunner().invoke(app, ["inspect", str(thing), "--json"]).stdout)
        assert payload["sizes"] == {"ranges": {"sequence": [17, None]}, "conditions": []}


def changed(file: Path, change: Any) -> Path:
    proto = onnx.load(file)
    change(proto.graph)
    onnx.save(proto, file.parent / "changed.onnx")
    return file.parent / "changed.onnx"


def wrong_epsilon(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 0.25


def test_the_reason_of_a_norm_ends_with_the_cause(model: nn.Module, tmp_path: Path) -> None:
    file = changed(exported(model, tmp_path / "out") / "model.onnx", wrong_epsilon)
    for compare in (validate, bisect):
        (culprit,) = compare(file, model).culprits
        assert (culprit.kind, culprit.name) == ("norm", "norm")
        assert culprit.reason.endswith("; epsilon is 0.25 in the file and 1e-06 in the module")


def test_the_cause_of_a_pytorch_candidate_is_its_weight(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm.weight[3] = 1.5
    (culprit,) = validate(other, model, cases=[{"input_ids": np.arange(14).reshape(2, 7)}]).culprits
    assert culprit.reason.endswith("the weight differs in 1 of 32 channels, at 3: 1.5 in the file, 1 in the module")


class Overridden(nn.RMSNorm):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 1.5  # type: ignore[no-any-return]


def test_a_module_that_is_not_recognized_is_said_and_so_is_that_no_norm_was_checked(
    model: nn.Module, tmp_path: Path
) -> None:
    folder = exported(model, tmp_path / "out")
    model.norm = Overridden(32, eps=1e-6)
    report = bisect(folder, model)
    assert report.verdict == "fail"
    (note,) = report.notes
    assert note.startswith("norm could not be checked alone: PyTorch's module is not recognized: ")
    assert f"no norm was checked, so the place where error is introduced is not known: {note}" in report.summary


def test_a_pass_without_norms_says_so(tmp_path: Path) -> None:
    class Plain(Reader):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.embed(input_ids))}

    plain = Plain().eval()
    del plain.norm
    report = validate(exported(plain, tmp_path / "out"), plain)
    assert report.verdict == "pass"
    assert report.summary.endswith("; no norm was checked: no module of PyTorch's model is recognized as an RMSNorm.")
    assert "no norm" not in validate(tmp_path / "out", plain, outputs_only=True).summary


def test_an_operator_of_another_domain_cannot_be_judged_and_is_not_accused(model: nn.Module, tmp_path: Path) -> None:
    def foreign(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if "LayerNormalization" in node.op_type:
                node.domain, node.op_type = "acme", "RMSNorm"

    file = changed(exported(model, tmp_path / "out") / "model.onnx", foreign)
    proto = onnx.load(file)
    proto.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    onnx.save(proto, file)
    with pytest.raises(UnsupportedError, match="The domain acme is not one of ONNX Runtime's"):
        validate(file, model)


@torch.library.custom_op("tests_foreign_files::norm", mutates_args=())
def opaque_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


class OpaqueNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return opaque_norm(x, self.weight)


def test_a_norm_that_is_an_opaque_operator_of_pytorch_is_checked(model: nn.Module, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "out")
    model.norm = OpaqueNorm()
    report = validate(folder, model)
    assert (report.verdict, len(report.norms), report.notes) == ("pass", 1, [])
