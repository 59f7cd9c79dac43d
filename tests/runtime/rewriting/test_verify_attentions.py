"""Tests of runtime/rewriting/verify_attentions.py."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.from_onnx.rewrite import Rewritten, rewrite
from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model
from rmsnorm_deploy.runtime.rewriting.verify_attentions import prove_attentions
from tests.helpers.graphs.attention_graphs import SPELLINGS, attention_model


def proven(result: Rewritten) -> list[tuple[str, str]]:
    proofs = prove_attentions(result, Path(), seed=0, progress=lambda text: None)
    return [(proof.verdict, proof.reason) for proof in proofs]


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_rewritten_attention_is_proven_in_onnx_runtime(name: str) -> None:
    parts, _ = SPELLINGS[name]
    ((verdict, reason),) = proven(rewrite(attention_model(**parts), "ort", attention="node"))
    assert verdict == "pass", reason


@pytest.mark.parametrize("wrong", ["scale", "lowest"])
def test_an_operator_that_differs_is_a_mismatch(wrong: str) -> None:
    result = rewrite(attention_model(), "ort", attention="node")
    (node,) = [node for node in result.model.graph if node.op_type == "Attention"]
    if wrong == "scale":
        node.attributes["scale"] = ir.AttrFloat32("scale", 0.51)
    else:  # the mask as it is: ONNX Runtime returns zeros for a query that attends to nothing
        most = node.inputs[3].producer()
        assert most is not None
        node.replace_input_with(3, most.inputs[0])
    ((verdict, reason),) = proven(result)
    assert verdict == "mismatch", reason
    assert wrong == "scale" or "nothing to attend to" in reason


def test_an_attention_whose_proof_fails_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsnorm_deploy.export.lowering import attention_writer

    original = attention_writer._operator

    def wrong(builder: object, spec: object, *given: object) -> object:
        node, y = original(builder, spec, *given)  # type: ignore[arg-type]
        node.attributes["scale"] = ir.AttrFloat32("scale", 0.4)
        return node, y

    monkeypatch.setattr(attention_writer, "_operator", wrong)
    onnx.save(ir.to_proto(attention_model()), tmp_path / "model.onnx")
    result = rewrite_model(tmp_path / "model.onnx", tmp_path / "out", target="ort", attention="node")
    (row,) = result.manifest["attention"]
    assert row["node"] is None
    assert row["reason"].startswith("its proof fails: ")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


def test_a_whole_file_is_rewritten_and_proven(tmp_path: Path) -> None:
    onnx.save(ir.to_proto(attention_model()), tmp_path / "model.onnx")
    result = rewrite_model(tmp_path / "model.onnx", tmp_path / "out", target="ort", attention="node")
    assert result.proof is not None
    assert result.proof.attentions[0].verdict == "pass"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [row["emits"] for row in manifest["attention"]] == ["Attention, Transpose"]
    written = onnx.load(result.model)
    assert [node.op_type for node in written.graph.node].count("Attention") == 1
    assert {row.key: row.value for row in written.metadata_props} == {
        "rmsnorm_deploy.requires": '{"onnxruntime": "1.27"}'
    }
