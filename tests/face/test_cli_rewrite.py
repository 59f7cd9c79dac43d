"""`rmsnorm rewrite` at the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rmsnorm_deploy.cli.application import run
from tests.helpers.graphs.attention_graphs import attention_model
from tests.helpers.spellings.look_alike_graphs import LOOK_ALIKES
from tests.helpers.spellings.norm_places import PLACES
from tests.helpers.spellings.norm_spellings import SPELLINGS, WIDTH


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(PLACES["three residuals, dynamo"].build(), path)
    return path


def test_what_was_found_done_and_proven(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rewrite", str(model), "-o", str(tmp_path / "out"), "--target", "plugin"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == f"4 RMSNorms in {model}."
    assert "weight, scale-then-cast, eps 1e-06" in printed.out
    assert "Rewritten for plugin: 4 of 4." in lines
    assert lines[-1] == "proof: pass (4 norms alone on 10 kinds of rows; the whole model, 2 outputs)"
    assert (
        run(["rewrite", str(tmp_path / "out" / "model.onnx"), "-o", str(tmp_path / "again"), "--target", "plugin"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert "Rewritten for plugin: 0 of 4, 4 were in its form already." in lines
    assert lines[-1] == "proof: pass (no norm was rewritten)"


def test_json_is_one_object(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rewrite", str(model), "-o", str(tmp_path / "out"), "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["schema"] == "rmsnorm_deploy.rewrite/3"
    assert (payload["norms"], payload["changed"], payload["kept"], payload["refusals"]) == (4, 4, 0, [])
    assert payload["proof"]["verdict"] == "pass"
    assert [row["kinds"] for row in payload["proof"]["norms"]] == [10, 10, 10, 10]
    assert all(Path(file).is_file() for file in payload["files"])
    assert run(["rewrite", str(model), "-o", str(tmp_path / "out2"), "--json", "--no-verify"]) == 0
    assert json.loads(capsys.readouterr().out)["proof"] is None


def test_attentions_are_listed_with_the_reason_of_those_that_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, parts in {"plain": {}, "dropout": {"behind": "used = Dropout (weights)"}}.items():
        onnx.save(ir.to_proto(attention_model(**parts)), tmp_path / f"{name}.onnx")
    options = ["--target", "ort", "--attention", "node", "--no-verify"]
    assert run(["rewrite", str(tmp_path / "plain.onnx"), "-o", str(tmp_path / "one"), *options]) == 0
    assert "Attentions as one operator: 1 of 1." in capsys.readouterr().out.splitlines()
    assert run(["rewrite", str(tmp_path / "dropout.onnx"), "-o", str(tmp_path / "none"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("Attentions as one operator: 0 of 1.")
    assert lines[first + 1] == "Attentions left as they are: 1"
    assert lines[first + 2] == "  weights: its weights are read by Dropout, expected a product with the values"
    assert (tmp_path / "none" / "dropout.onnx").read_bytes() == (tmp_path / "dropout.onnx").read_bytes()
    assert run(["rewrite", str(tmp_path / "dropout.onnx"), "-o", str(tmp_path / "json"), *options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["attention"]
    assert (row["node"], row["softmax"], row["class"]) == (None, "weights", "Softmax")
    plain = str(tmp_path / "plain.onnx")
    for target in ("standard", "plugin", "primitives"):
        assert run(["rewrite", plain, "-o", str(tmp_path / "no"), "--target", target, "--attention", "node"]) == 2
        assert f"attention: node is for target ort, which has an operator for attention, got target {target}" in (
            capsys.readouterr().err
        )


def test_what_is_left_alone_is_listed_with_node_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(LOOK_ALIKES["LayerNorm, sub, div"], path)
    assert run(["rewrite", str(path), "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "There is no RMSNorm in" in out
    assert re.search(r"^  ReduceMean\d+: the mean is subtracted first, so it is a LayerNorm$", out, re.MULTILINE)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == path.read_bytes()


def test_a_norm_in_a_body_is_left_for_the_plugin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(PLACES["in a Loop, dynamo"].build(), path)
    assert run(["rewrite", str(path), "-o", str(tmp_path / "out"), "--target", "plugin"]) == 3
    assert "TensorRT finds plugins in the main graph only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(["rewrite", str(path), "-o", str(tmp_path / "out"), "--target", "ort"]) == 0


def test_exit_codes_of_what_is_wrong(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    cases = {
        2: [
            ["rewrite", str(tmp_path / "none.onnx"), "-o", out],
            ["rewrite", str(text), "-o", out],
            ["rewrite", str(model), "-o", str(tmp_path)],
            ["rewrite", str(model), "-o", out, "--target", "fast"],
            ["rewrite", str(model), "-o", out, "--weights", "move"],
        ],
        3: [["rewrite", str(model), "-o", out, "--target", "standard", "--opset", "20"]],
    }
    for code, lines in cases.items():
        for line in lines:
            assert run(line) == code, line
            printed = capsys.readouterr()
            assert printed.out == ""
            assert printed.err.splitlines()[-1].startswith("error: ")
    assert not Path(out).exists()


def test_given_inputs_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(SPELLINGS["dynamo, weight input"].build(), path)
    feeds = tmp_path / "feeds.npz"
    np.savez(feeds, **{"x": np.ones((2, 3, WIDTH), np.float32), "norm.weight": np.full(WIDTH, 0.5, np.float32)})
    assert run(["rewrite", str(path), "-o", str(tmp_path / "out"), "--inputs", str(feeds)]) == 0
    assert "proof: pass" in capsys.readouterr().out


def test_inspect_reads_any_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(PLACES["groups dynamo, back by static, gate before"].build(), path)
    assert run(["inspect", str(path), "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    (site,) = payload["sites"]
    assert (site["spec"]["group_size"], site["spec"]["gate"], site["width"]) == (8, "before", WIDTH)
