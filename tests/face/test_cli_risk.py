"""`rmsnorm inspect` on a model that runs, and outlier channels on the way to an export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rmsnorm_deploy.export.lowering.table import TARGETS
from tests.helpers.interface.command_line import CommandLine
from tests.helpers.models.families import build


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer that knows its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "the", "norm", "of", "a", "row"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_generated_inputs_give_a_table_and_a_verdict_for_each_dtype(rmsnorm: CommandLine, models: Path) -> None:
    outcome = rmsnorm("inspect", f"{models}:net", "--made-up")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == f"1 RMSNorm in {models}:net."
    (columns,) = [line.split() for line in lines if "max |x|" in line]
    assert columns[-3:] == ["fp32", "fp16", "bf16"]
    (row,) = [line.split() for line in lines if line.startswith("norm ") and "max" not in line]
    assert row[-3:] == ["safe", "safe", "safe"]
    assert lines[-3:] == ["float32: safe", "float16: safe", "bfloat16: safe"]
    assert "Note: modules that were not recognized as RMSNorm were not checked: 1." in lines
    content = rmsnorm("inspect", f"{models}:net", "--made-up", "--json").json
    (norm,) = content["risk"]["norms"]
    assert (content["risk"]["cases"], norm["path"], norm["calls"], norm["rows"]) == (3, "norm", 3, 1 + 7 + 66)
    assert set(norm["targets"]) == set(TARGETS)
    assert f"{norm['largest']:.3g}" == row[1]


def test_without_inputs_there_is_no_risk(rmsnorm: CommandLine, models: Path) -> None:
    assert "risk" not in rmsnorm("inspect", f"{models}:net", "--json").json


def test_inputs_from_a_file(rmsnorm: CommandLine, models: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.full((5, 8), 1e6, np.float32))
    outcome = rmsnorm("inspect", f"{models}:floats", "--inputs", tmp_path / "x.npz")
    assert outcome.code == 0
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("float16: ")]
    assert line.startswith("float16: unsafe, norm: x overflows float16: it is ")
    found = rmsnorm("inspect", f"{models}:floats", "--inputs", tmp_path / "x.npz", "--json").json["risk"]
    assert (found["cases"], found["norms"][0]["rows"]) == (1, 5)
    assert found["verdicts"]["float16"]["verdict"] == "unsafe"
    assert found["verdicts"]["float32"]["verdict"] == "safe"


def test_inputs_are_cast_to_the_model_and_run_with_generated_ones(
    rmsnorm: CommandLine, models: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((5, 8), np.float32))
    arguments = ("--inputs", tmp_path / "x.npz", "--made-up", "--dtype", "bfloat16", "--json")
    found = rmsnorm("inspect", f"{models}:floats", *arguments).json["risk"]
    assert (found["cases"], found["norms"][0]["rows"]) == (2, 5 + 6)


def test_inputs_and_prompts_for_a_checkpoint(rmsnorm: CommandLine, llama: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", input_ids=np.arange(3, 12)[None])
    found = rmsnorm("inspect", llama, "--inputs", tmp_path / "ids.npz", "--json").json["risk"]
    assert [norm["rows"] for norm in found["norms"]] == [9] * 5
    arguments = ("--prompt", "the norm of a row", "--prompt", "a row", "--json")
    found = rmsnorm("inspect", llama, *arguments).json["risk"]
    assert [norm["rows"] for norm in found["norms"]] == [7] * 5
    assert found["cases"] == 2


def test_inputs_need_a_model_that_runs(rmsnorm: CommandLine, exported: Path, models: Path, tmp_path: Path) -> None:
    for place in (exported / "ort", exported / "ort" / "model.onnx"):
        for option in (("--made-up",), ("--inputs", "x.npz"), ("--prompt", "hello")):
            outcome = rmsnorm("inspect", place, *option)
            assert outcome.code == 2
            assert "is an exported model" in outcome.err
            assert "require a PyTorch model. Give the model that it was exported from" in outcome.err
    outcome = rmsnorm("inspect", f"{models}:net", "--prompt", "hello")
    assert outcome.code == 2
    assert "--prompt requires a tokenizer" in outcome.err
    outcome = rmsnorm("inspect", f"{models}:net", "--inputs", tmp_path / "nothing.npz")
    assert outcome.code == 2
    assert "nothing.npz" in outcome.err
    np.savez(tmp_path / "y.npz", y=np.ones((2, 8), np.float32))
    outcome = rmsnorm("inspect", f"{models}:floats", "--inputs", tmp_path / "y.npz")
    assert outcome.code == 2
    assert "missing: x" in outcome.err


def test_a_model_without_norms_has_nothing_at_risk(rmsnorm: CommandLine, models: Path) -> None:
    name = f"{models}:without_norms"
    outcome = rmsnorm("inspect", name, "--made-up")
    assert (outcome.code, outcome.out) == (
        0,
        f"No module in {name} was recognized as an RMSNorm. Norms outside of modules are found at export.\n",
    )
    assert rmsnorm("inspect", name, "--made-up", "--json").json["risk"]["verdicts"] == {}


# ------------------------------------------------------------------------------------------------------ export


def _weights(folder: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(folder / "model.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_outliers_are_injected_and_recorded(rmsnorm: CommandLine, models: Path, exported: Path, tmp_path: Path) -> None:
    arguments = ("--target", "primitives", "--outliers", "3x64", "--outlier-seed", "5")
    outcome = rmsnorm("export", f"{models}:net", "-o", tmp_path / "out", *arguments, "--json")
    assert outcome.code == 0
    found = outcome.json["outliers"]
    assert (found["channels"], found["factor"], found["seed"], found["width"]) == (3, 64.0, 5, 16)
    assert (found["embeddings"], found["norms"], len(found["indices"])) == (["embed"], ["norm"], 3)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["outliers"] == {"channels": 3, "factor": 64.0, "seed": 5}
    plain, changed = _weights(exported / "primitives"), _weights(tmp_path / "out")
    wanted = np.where(np.isin(np.arange(16), found["indices"]), 64.0, 1.0).astype(np.float32)
    assert np.array_equal(changed["embed.weight"], plain["embed.weight"] * wanted)
    assert np.array_equal(changed["norm.weight"], plain["norm.weight"] / np.sqrt(wanted))
    assert "outliers" not in json.loads((exported / "primitives" / "manifest.json").read_text())


def test_outliers_for_people(rmsnorm: CommandLine, models: Path, tmp_path: Path) -> None:
    outcome = rmsnorm("export", f"{models}:net", "-o", tmp_path / "out", "--outliers", "2x50")
    wanted = "Outlier channels: 2 of 16, 50 times larger in embed (norms changed: 1; seed 0)."
    assert wanted in outcome.out.splitlines()


def test_outliers_that_cannot_be_injected_are_refused(rmsnorm: CommandLine, models: Path, tmp_path: Path) -> None:
    for name, text, message in (
        ("net", "4by50", "such as 4x50"),
        ("net", "17x50", "expected 1 to 16, the hidden size, got 17"),
        ("floats", "2x50", "no embedding of its hidden size 16"),
        ("without_norms", "2x50", "no recognized norm with a weight"),
    ):
        outcome = rmsnorm("export", f"{models}:{name}", "-o", tmp_path / "out", "--outliers", text)
        assert outcome.code == 2
        assert message in outcome.err
        assert not (tmp_path / "out").exists()
