"""Checkpoints are exported with their weights at rest, and the results are those of the usual way, bit for bit.

Of the families, a part is tested; `RMSNORM_TESTS=all` tests all.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.loading import load_model
from rmsnorm_deploy.models.weights import stand_ins
from rmsnorm_deploy.models.weights.mapped_file import places_of
from rmsnorm_deploy.runtime.validation.api import validate
from tests.helpers.extent import EVERY, slow
from tests.helpers.models.families import CACHED, FAMILIES, build
from tests.helpers.runtime.feeds import feeds_of

# An encoder-decoder with tied weights; combined experts are those of `test_computed_weights_are_those_of_transformers`.
SOME = ("t5",)
NAMES = list(FAMILIES) if EVERY else SOME
# ONNX Runtime runs the head of the usual file as FusedMatMul, with the scale behind it, and not as Gemm.
ROUNDED = ("t5", "gemma2")
SHARD = "20KB"


def saved(name: str, folder: Path) -> Path:
    build(name).save_pretrained(folder / "m", max_shard_size=SHARD)
    return folder / "m"


def mixtral() -> Any:
    import transformers

    torch.manual_seed(0)
    options = {**FAMILIES["mistral"].options, "num_local_experts": 4, "sliding_window": None}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**options)).eval()


def same_results(rest: Path, usual: Path, off: float = 0.0) -> None:
    sessions = [onnxruntime.InferenceSession(path) for path in (rest, usual)]
    feeds = feeds_of(sessions[1])
    for got, wanted in zip(*(session.run(None, feeds) for session in sessions), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=off, atol=off)


def located(path: Path) -> set[str]:
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}


@pytest.mark.parametrize("name", NAMES)
def test_a_family_gives_the_same_results_from_its_sharded_checkpoint(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    with_past = name in CACHED
    export_model(folder, tmp_path / "rest", with_past=with_past)
    usual = build(name)
    usual.load_state_dict(load_model(str(folder)).model.state_dict())
    export_model(usual, tmp_path / "usual", with_past=with_past)
    paths = tmp_path / "rest" / "model.onnx", tmp_path / "usual" / "model.onnx"
    same_results(*paths, 1e-6 if name in ROUNDED else 0.0)
    shards = {file.name for file in folder.glob("*.safetensors")}
    assert len(shards) > 1
    assert located(tmp_path / "rest" / "model.onnx") & shards


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float16"), ("mixtral", "float32")])
def test_computed_weights_are_those_of_transformers(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another dtype than the checkpoint's, and experts in one tensor, go through a side file."""
    import transformers

    from rmsnorm_deploy.models.weights import load_transformers

    monkeypatch.setattr(load_transformers, "_SMALL", 100)
    model = mixtral() if name == "mixtral" else build(name)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m", max_shard_size=SHARD)
    folder = tmp_path / "m"
    got = load_model(str(folder), dtype=dtype, side_folder=tmp_path).model
    wanted = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    states = [model.state_dict() for model in (got, wanted)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert got.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert got.config.to_dict() == wanted.config.to_dict()
    assert {file.name for file in tmp_path.iterdir()} == {"m"}
    assert all(place is None for place in places_of([t for t in states[0].values() if t.dtype != torch.bfloat16]))
    export_model(got, tmp_path / "out")
    export_model(wanted.eval(), tmp_path / "usual")
    if dtype == "float32":
        same_results(tmp_path / "out" / "model.onnx", tmp_path / "usual" / "model.onnx")


def test_a_model_that_is_too_large_to_run_is_checked_with_other_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_ins, "_SMALL", 1000)
    monkeypatch.setattr(stand_ins, "_READ", 1000)
    folder = saved("llama", tmp_path)
    result = export_model(folder, tmp_path / "out", with_past=True)
    assert any("other values in place of the large weights" in note for note in result.manifest["notes"])
    monkeypatch.undo()
    export_model(folder, tmp_path / "usual", with_past=True)
    same_results(tmp_path / "out" / "model.onnx", tmp_path / "usual" / "model.onnx")
    assert validate(tmp_path / "out", str(folder), shapes=[(2, 5)]).verdict == "pass"


def test_a_norm_that_differs_in_the_model_is_refused_though_weights_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check with other values still runs the norms as the model calls them."""
    monkeypatch.setattr(stand_ins, "_SMALL", 1000)
    monkeypatch.setattr(stand_ins, "_READ", 1000)
    model = load_model(str(saved("llama", tmp_path))).model
    norm = model.model.layers[0].input_layernorm
    original = type(norm).forward

    class Moody(type(norm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = original(self, x)
            return result if x.shape[-2] != 9 else result * 2

    norm.__class__ = Moody
    result = export_model(model, tmp_path / "out")
    assert [site.path for site in result.recognition.sites].count("model.layers.0.input_layernorm") == 0


@slow
def test_two_exports_of_one_checkpoint_at_once_both_succeed(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    code = "import sys; from rmsnorm_deploy import export_model; export_model(sys.argv[1], sys.argv[2])"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), str(tmp_path / name)]) for name in ("a", "b")
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    same_results(tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("mode", ["link", "reference"] if EVERY else ["reference"])
def test_an_export_that_is_killed_leaves_the_checkpoint_and_no_half_folder(tmp_path: Path, mode: str) -> None:
    folder = saved("llama", tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    out = folder if mode == "reference" else tmp_path / "out"
    code = f"""
import sys, time
from rmsnorm_deploy.export.onnx_io import place_weights
import rmsnorm_deploy.export.from_torch.save as save
def slow(*arguments):
    placed = original(*arguments)
    print("written", flush=True)
    time.sleep(60)
original = save._write_model
save._write_model = slow
save.export = None
from rmsnorm_deploy import export_model
export_model(sys.argv[1], sys.argv[2], weights="{mode}")
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    seen = {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}
    assert seen == before
    assert not (tmp_path / "out").exists()
    export_model(folder, out, weights=mode)
    assert not [file for file in (*tmp_path.iterdir(), *folder.iterdir()) if file.name.startswith(".")]
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_an_export_of_a_checkpoint_of_the_hubs_cache(tmp_path: Path) -> None:
    """Links of a snapshot lead to blobs."""
    folder = saved("llama", tmp_path)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    result = export_model(snapshot, tmp_path / "out")
    assert "config.json" in result.files
    assert not [file for file in (tmp_path / "out").iterdir() if file.is_symlink()]
    onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert validate(tmp_path / "out", str(snapshot), shapes=[(2, 5)]).verdict == "pass"


def test_the_manifest_says_what_each_folder_has(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    for mode in ("copy", "pack"):
        export_model(folder, tmp_path / mode, weights=mode)
        manifest = json.loads((tmp_path / mode / "manifest.json").read_text())
        assert manifest["weights"]["mode"] == mode
        assert bool(manifest["weights"]["files"]) == (mode == "copy")
    same_results(tmp_path / "copy" / "model.onnx", tmp_path / "pack" / "model.onnx")
