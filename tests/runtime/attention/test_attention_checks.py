"""Attentions of exported files are judged alone: files without faults pass, and each planted fault is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.export.graph.metadata import ATTENTION_KEY, VALUES_KEY
from rmsnorm_deploy.runtime.attention.attention_checks import check_attentions
from rmsnorm_deploy.runtime.attention.file_attentions import FileAttentions
from rmsnorm_deploy.runtime.attention.torch_attentions import recorded_attentions
from rmsnorm_deploy.runtime.norms.onnx_norms import OnnxNorms
from rmsnorm_deploy.runtime.report import html, junit
from rmsnorm_deploy.runtime.report.page import TextPage
from rmsnorm_deploy.runtime.report.printed import print_validation
from rmsnorm_deploy.runtime.validation.api import bisect, validate
from tests.helpers.models.families import build

FAULTY, SOUND = "model.layers.0.self_attn", "model.layers.1.self_attn"
KINDS = {
    "as it runs", "normal", "long cache", "large scores", "window edges", "left padding", "nothing to attend to",
    "grouped heads", "one key",
}  # fmt: skip
# gpt_oss has sinks, for which no target writes the operator.
FILES = [("llama", "ort"), ("llama", "primitives"), ("gemma2", "ort"), ("gemma2", "primitives"), ("gpt_oss", "ort")]
DTYPES = {"float32": torch.float32, "float16": torch.float16}
# One case is enough for the parts, which are checked on the largest.
ONE = {"shapes": ((2, 20),)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports a small model once for each target and dtype; returns the model and its folder."""
    known = {}

    def export(name: str, target: str, dtype: str = "float32"):
        key = (name, target, dtype)
        if key not in known:
            model = build(name, DTYPES[dtype])
            folder = tmp_path_factory.mktemp("-".join(key)) / "out"
            export_model(model, folder, target=target, with_past=True)
            known[key] = model, folder
        return known[key]

    return export


class Edit:
    """An exported file in which one attention is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proto = onnx.load(folder / "model.onnx")
        self.main = next(n for n in self.proto.graph.node if self._path(n) == FAULTY)
        self.names = json.loads(self._metadata(self.main)[VALUES_KEY])

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        return [node for node in self.proto.graph.node if node.name.startswith(f"{FAULTY}/")]

    def one(self, op_type: str) -> onnx.NodeProto:
        return next(node for node in self.nodes if node.op_type == op_type)

    def constant(self, name: str, array: np.ndarray) -> str:
        self.proto.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def between(self, role: str, *made: onnx.NodeProto) -> None:
        """Put nodes between an input of the attention and its readers there; the last one's output is read."""
        for node in self.nodes:
            for number, name in enumerate(node.input):
                if name == self.names[role]:
                    node.input[number] = made[-1].output[0]
        place = min(i for i, node in enumerate(self.proto.graph.node) if node.name.startswith(f"{FAULTY}/"))
        for number, node in enumerate(made):
            self.proto.graph.node.insert(place + number, node)

    def save(self, folder: Path) -> Path:
        shutil.copytree(self.folder, folder)
        onnx.save(self.proto, folder / "model.onnx")
        return folder

    @staticmethod
    def _metadata(node: onnx.NodeProto) -> dict[str, str]:
        return {row.key: row.value for row in node.metadata_props}

    def _path(self, node: onnx.NodeProto) -> str | None:
        found = self._metadata(node).get(ATTENTION_KEY)
        return None if found is None else json.loads(found)["path"]


def _scale(edit: Edit) -> None:
    """The scale is 1% too large."""
    if edit.main.op_type == "Attention":
        next(a for a in edit.main.attribute if a.name == "scale").f *= 1.01
        return
    node = edit.one("Mul")
    factor = next(numpy_helper.to_array(t) for t in edit.proto.graph.initializer if t.name == node.input[1])
    node.input[1] = edit.constant("wrong scale", (factor * 1.01).astype(factor.dtype))


def _softcap(edit: Edit) -> None:
    """The softcap is missing."""
    if edit.main.op_type == "Attention":
        edit.main.attribute.remove(next(a for a in edit.main.attribute if a.name == "softcap"))
        return
    divided, capped = edit.one("Div"), edit.one("Tanh").output[0]
    end = next(node for node in edit.nodes if node.op_type == "Mul" and capped in node.input)
    for node in edit.nodes:
        node.input[:] = [divided.input[0] if name == end.output[0] else name for name in node.input]
    for node in (divided, edit.one("Tanh"), end):
        edit.proto.graph.node.remove(node)


def _keys(edit: Edit) -> None:
    """The keys of two heads are swapped."""
    order = edit.constant("swapped", np.array([1, 0]))
    edit.between("key", helper.make_node("Gather", [edit.names["key"], order], ["wrong key"], axis=1))


def _mask(edit: Edit) -> None:
    """Each query attends to one key before those that its mask shows."""
    ends = [edit.constant(name, np.array([v])) for name, v in (("at", 1), ("to", 2**31), ("axis", 3), ("last", -1))]
    rest = helper.make_node("Slice", [edit.names["bias"], *ends[:3]], ["rest"])
    last = helper.make_node("Slice", [edit.names["bias"], ends[3], ends[1], ends[2]], ["end"])
    shifted = helper.make_node("Concat", ["rest", "end"], ["shifted"], axis=3)
    edit.between("bias", rest, last, shifted, helper.make_node("Max", ["shifted", edit.names["bias"]], ["wrong bias"]))


def _sink(edit: Edit) -> None:
    """The sink is not a term of the sum."""
    total = next(node for node in edit.nodes if node.op_type == "Add" and edit.one("ReduceSum").output[0] in node.input)
    edit.one("Div").input[1] = edit.one("ReduceSum").output[0]
    edit.proto.graph.node.remove(total)


FAULTS = {
    "scale": (_scale, ("llama", "gemma2", "gpt_oss")),
    "softcap": (_softcap, ("gemma2",)),
    "keys": (_keys, ("llama", "gpt_oss")),
    "mask": (_mask, ("llama", "gemma2")),
    "sink": (_sink, ("gpt_oss",)),
}
PLANTED = [(fault, *file) for file in FILES for fault, (_, names) in FAULTS.items() if file[0] in names]
HALF = [
    (*one, "float16")
    for one in (("scale", "llama", "ort"), ("keys", "llama", "primitives"), ("sink", "gpt_oss", "ort"))
]


def _checked(folder: Path, model: torch.nn.Module):
    """The check of each attention by its path, and the notes, as `validate` makes them."""
    called, notes = {}, []
    rows = json.loads((folder / "manifest.json").read_text())["attention"]
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), recorded_attentions(model, {row["path"] for row in rows}, called):
        model(input_ids=ids)
    file = FileAttentions(OnnxNorms(folder / "model.onnx", "cpu"), rows)
    checks = check_attentions(file, called, 0, lambda _: None, notes)
    return {one.key[0]: one for one in checks}, [*file.notes, *notes]


@pytest.mark.parametrize(
    ("name", "target", "dtype"),
    [(*file, "float32") for file in FILES] + [("llama", "ort", "float16"), ("gemma2", "primitives", "float16")],
)
def test_an_attention_without_faults_passes(exported, name, target, dtype):
    model, folder = exported(name, target, dtype)
    checks, notes = _checked(folder, model)
    assert {path: (one.passed, one.reason) for path, one in checks.items()} == dict.fromkeys(
        (FAULTY, SOUND), (True, "correct on 9 kinds of inputs")
    )
    assert all({kind.name for kind in one.kinds} == KINDS for one in checks.values())
    operator = {"ort": "Attention", "primitives": "Softmax"}[target]
    assert {one.form for one in checks.values()} == {"Div" if name == "gpt_oss" else operator}
    assert notes == []
    zeros = {kind.name for one in checks.values() for kind in one.kinds if "nothing get zeros" in kind.reason}
    assert ("nothing to attend to" in zeros) == (operator == "Attention" and name != "gpt_oss")


@pytest.mark.parametrize(("fault", "name", "target", "dtype"), [*((*one, "float32") for one in PLANTED), *HALF])
def test_a_fault_is_named(exported, tmp_path, fault, name, target, dtype):
    model, folder = exported(name, target, dtype)
    edit = Edit(folder)
    FAULTS[fault][0](edit)
    checks, _ = _checked(edit.save(tmp_path / "faulty"), model)
    assert {path: one.passed for path, one in checks.items()} == {FAULTY: False, SOUND: True}
    assert checks[FAULTY].reason.startswith("wrong on: ")


def test_a_file_with_a_window_passes(exported):
    report = validate(exported("gemma3", "ort")[1], exported("gemma3", "ort")[0], **ONE)
    assert [one.key for one in report.attentions] == [(FAULTY, 0), (SOUND, 0)]
    assert report.verdict == "pass", report.summary
    assert "2 of 2 attention nodes" in report.summary


def test_bisect_names_the_attention(exported, tmp_path):
    model, folder = exported("llama", "primitives")
    edit = Edit(folder)
    _scale(edit)
    report = bisect(edit.save(tmp_path / "faulty"), model, **ONE)
    # The segment that contains it is not named too.
    assert [(one.kind, one.name) for one in report.culprits] == [("attention", FAULTY)]
    assert f"error is introduced in {FAULTY}." in report.summary
    content = report.to_dict()
    assert [(row["path"], row["call"], row["passed"]) for row in content["attentions"]] == [
        (FAULTY, 0, False), (SOUND, 0, True),
    ]  # fmt: skip
    assert {kind["kind"] for kind in content["attentions"][0]["inputs"]} == KINDS
    assert f'name="{FAULTY}"' in junit.render(content)
    page = html.render(content)
    assert '<h2 id="attentions">Attentions</h2>' in page
    assert 'href="#attention-1"' in page
    shown = TextPage()
    print_validation(shown, content, show_parts=True)
    assert any(line.startswith(FAULTY) and "fail" in line for line in shown.lines)


def test_zeros_of_primitives_are_a_fault(exported, tmp_path):
    """Where nothing is attended to, only ONNX Runtime's operator may return zeros."""
    model, folder = exported("llama", "primitives")
    edit = Edit(folder)
    zero, low = edit.constant("zero", np.float32(0)), edit.constant("low", np.float32(-1e38))
    weights = edit.main.output[0]
    for node in edit.nodes:
        node.input[:] = ["kept" if name == weights else name for name in node.input]
    place = next(i for i, node in enumerate(edit.proto.graph.node) if node == edit.main) + 1
    made = [
        helper.make_node("ReduceMax", [edit.main.input[0], edit.constant("last", np.array([-1]))], ["most"]),
        helper.make_node("Less", ["most", low], ["nothing"]),
        helper.make_node("Where", ["nothing", zero, weights], ["kept"]),
    ]
    for number, node in enumerate(made):
        edit.proto.graph.node.insert(place + number, node)
    checks, _ = _checked(edit.save(tmp_path / "faulty"), model)
    assert checks[FAULTY].passed is False
    wrong = [kind.name for kind in checks[FAULTY].kinds if not kind.passed]
    assert wrong == ["left padding", "nothing to attend to"]


def _without_values(edit: Edit) -> None:
    edit.main.metadata_props.remove(next(row for row in edit.main.metadata_props if row.key == VALUES_KEY))


def _without_metadata(edit: Edit) -> None:
    del edit.main.metadata_props[:]


def _other_result(edit: Edit) -> None:
    _rename(edit, "y", edit.names["query"])


def _gone(edit: Edit) -> None:
    _rename(edit, "key", "gone")


def _earlier(edit: Edit) -> None:
    """The query is said to be another value, so that the real one is computed from the inputs of the model."""
    other = next(n for n in edit.proto.graph.node if n.op_type == "Attention" and n != edit.main)
    _rename(edit, "query", other.input[0])


def _rename(edit: Edit, role: str, name: str) -> None:
    row = next(row for row in edit.main.metadata_props if row.key == VALUES_KEY)
    row.value = json.dumps({**edit.names, role: name})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_values, "its node has no metadata rmsnorm_deploy.values that name its inputs and its result"),
        (_without_metadata, "no node of the candidate names this attention in its metadata"),
        (_gone, "its metadata name the value 'gone', which is missing in the file"),
        (_other_result, "its metadata name one value twice|its metadata name a result that other nodes compute"),
        (_earlier, "it also reads .*input_ids.*, computed from the model's inputs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_cut_is_noted(exported, tmp_path, change, reason):
    model, folder = exported("llama", "ort")
    edit = Edit(folder)
    change(edit)
    checks, notes = _checked(edit.save(tmp_path / "changed"), model)
    assert [*checks] == [SOUND]
    assert re.fullmatch(f"{FAULTY} could not be checked alone: ({reason})", notes[0])


def test_outputs_only_checks_no_attention(exported):
    model, folder = exported("llama", "ort")
    report = validate(folder, model, outputs_only=True, **ONE)
    assert report.attentions == []
    assert "attention" not in report.summary
