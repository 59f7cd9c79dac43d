"""From a model to its engine on the command line: build (the real builder), run, validate, generate, bisect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.interface.command_line import CommandLine
from tests.helpers.models.families import build
from tests.helpers.tensorrt.stand_in import StandIn

pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("qwen3") / "checkpoint"
    build("qwen3").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The export and the engine, as the command line makes them; filled by the first test."""
    folder = tmp_path_factory.mktemp("made")
    return {"out": folder / "out", "engine": folder / "qwen3.engine", "checkpoint": checkpoint}


@pytest.fixture
def engine(made: dict[str, Any], rmsnorm: CommandLine) -> Path:
    """The engine of a Qwen3 with a cache."""
    if not made["engine"].exists():
        outcome = rmsnorm("export", made["checkpoint"], "-o", made["out"], "--target", "ort", "--with-past")
        assert outcome.code == 0, outcome.err
        profiles = (
            "batch:1,1,3;sequence:1,8,24;past_sequence:0,0,0",
            "batch:1,1,3;sequence:1,1,4;past_sequence:0,16,99",
        )
        ask = [part for text in profiles for part in ("--profile", text)]
        outcome = rmsnorm("build", made["out"], "-o", made["engine"], "--arch", "89", *ask)
        assert outcome.code == 0, outcome.err
    return made["engine"]


def test_an_engine_is_run_as_its_folder_is(
    stand_in: StandIn, rmsnorm: CommandLine, engine: Path, made: dict[str, Any], tmp_path: Path
) -> None:
    feeds = {"input_ids": np.array([[3, 5, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    feeds |= {"position_ids": np.arange(3)[None]}
    feeds |= {
        f"past_key_values.{layer}.{kind}": np.zeros((1, 2, 0, 8), np.float32)
        for layer in range(2) for kind in ("key", "value")
    }  # fmt: skip
    np.savez(tmp_path / "x.npz", **feeds)
    results = {}
    sources: dict[str, tuple[Any, ...]] = {
        "engine": (engine,), "file": (made["out"],), "rtx": (made["out"], "--runner", "rtx"),
    }  # fmt: skip
    for name, source in sources.items():
        place = tmp_path / f"{name}.npz"
        outcome = rmsnorm("run", *source, "--inputs", tmp_path / "x.npz", "-o", place, "--json")
        assert outcome.code == 0, outcome.err
        results[name] = np.load(place)["logits"]
        expected = "onnxruntime" if name == "file" else "tensorrt"
        assert outcome.json["provenance"]["runner"] == expected
    assert np.array_equal(results["engine"], results["file"])
    assert np.array_equal(results["rtx"], results["file"])
    np.savez(tmp_path / "long.npz", **(feeds | {"input_ids": np.zeros((1, 25), np.int64)}))
    outcome = rmsnorm("run", engine, "--inputs", tmp_path / "long.npz", "-o", tmp_path / "no.npz")
    assert (outcome.code, (tmp_path / "no.npz").exists()) == (2, False)
    assert "sequence is 25 in input input_ids" in outcome.err


def test_an_engine_generates_what_its_folder_generates(
    stand_in: StandIn, rmsnorm: CommandLine, engine: Path, made: dict[str, Any]
) -> None:
    ask = ("--prompt-ids", "3,5,7", "--max-new-tokens", "12", "--json")
    wanted = rmsnorm("generate", made["out"], *ask).json
    for more in ((engine,), (made["out"], "--runner", "rtx")):
        found = rmsnorm("generate", *more, *ask).json
        assert (found["generations"], found["with_past"]) == (wanted["generations"], True)
    outcome = rmsnorm("generate", engine, "--prompt-ids", "3,5", "--provider", "cuda")
    assert outcome.code == 2
    assert "expected no provider of ONNX Runtime" in outcome.err


def test_one_verdict_of_two_runtimes(
    stand_in: StandIn, rmsnorm: CommandLine, engine: Path, made: dict[str, Any], tmp_path: Path
) -> None:
    ask = ("--against", made["checkpoint"], "--shape", "1x5")
    outcome = rmsnorm("validate", engine, *ask)
    assert outcome.code == 0, outcome.err
    assert "no norm was checked: an engine shows its outputs; --deep builds engines" in outcome.out
    report = tmp_path / "report.json"
    outcome = rmsnorm("validate", made["out"], *ask, "--runner", "ort", "--runner", "rtx", "-o", report)
    assert outcome.code == 0, outcome.err
    assert "in each runtime" in outcome.out
    assert json.loads(report.read_text())["runners"] == {"ort": "pass", "rtx": "pass"}
    again = rmsnorm("validate", "--replay", report)
    assert (again.code, "the same report, except for the time" in again.out) == (0, True)
    stand_in.behavior.change = lambda name, value: value + np.float32(0.1) if name == "logits" else value
    outcome = rmsnorm("bisect", engine, *ask)
    assert outcome.code == 1
    assert "segment" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("validate", "ENGINE", "--runner", "ort"), "is an engine, which ONNX Runtime cannot run"),
        (("validate", "ENGINE", "--runner", "onnx"), "runners: expected ort, tensorrt, rtx"),
        (("validate", "ENGINE", "--provider", "cuda"), "expected no provider of ONNX Runtime for a run in TensorRT"),
        (("validate", "ENGINE", "--deep", "--outputs-only"), "deep checks norms and segments"),
        (("build", "ENGINE", "-o", "other.engine"), "is an engine; expected"),
        (("inspect", "ENGINE"), "qwen3.engine is a file. Give a folder with config.json"),
        (("rewrite", "ENGINE", "-o", "other"), "is an engine; expected"),
    ],
)
def test_what_engines_are_not_for(
    stand_in: StandIn,
    rmsnorm: CommandLine,
    engine: Path,
    made: dict[str, Any],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    named = [str(engine) if word == "ENGINE" else word for word in arguments]
    against = ("--against", str(made["checkpoint"])) if arguments[0] == "validate" else ()
    outcome = rmsnorm(*named, *against)
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err


def test_without_a_gpu_an_engine_says_what_it_needs(rmsnorm: CommandLine, engine: Path) -> None:
    outcome = rmsnorm("generate", engine, "--prompt-ids", "3,5")
    assert outcome.code == 4
    assert "requires" in outcome.err
