"""`rmsnorm ship` of an .onnx file, and of engines: which steps are done, and done again after a change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from rmsnorm_deploy import export_model
from tests.helpers.interface.command_line import CommandLine
from tests.helpers.models.factory_file import SMALL_MODEL
from tests.helpers.spellings.norm_spellings import Way, build
from tests.helpers.tensorrt.stand_in import StandIn

_FILE = """
[[model]]
name = "given"
source = "given.onnx"
against = "models.py:net"
targets = ["ort"]
package = ["ort-server"]
reports = ["junit"]
"""
_ENGINE = """
[[model]]
name = "net"
source = "models.py:net"
targets = ["plugin"]
build = ["rtx"]
architectures = ["sm_89"]
profiles = ["input_ids:1x1,2x8,4x32"]
package = ["ort-server"]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text(SMALL_MODEL)
    return tmp_path / "rmsnorm.toml"


def _ship(rmsnorm: CommandLine, recipe: Path, text: str) -> tuple[int, dict[str, tuple[str, Any]], list[str]]:
    """The exit code; the status and result or error of each step of the only row; and its notes."""
    recipe.write_text(text)
    outcome = rmsnorm("ship", recipe, "--json")
    (row,) = outcome.json["rows"]
    steps = {step["step"]: (step["status"], step["error"] or step["result"]) for step in row["steps"]}
    return outcome.code, steps, row["notes"]


def _plan(rmsnorm: CommandLine, recipe: Path, text: str) -> str:
    recipe.write_text(text)
    return rmsnorm("ship", recipe, "--dry-run").out.strip()


def _given(recipe: Path) -> Path:
    """An .onnx file of the model, as another exporter leaves it: alone in its folder."""
    export_model(f"{recipe.parent / 'models.py'}:net", recipe.parent / "made", target="primitives")
    given = recipe.parent / "given.onnx"
    onnx.save(onnx.load(recipe.parent / "made" / "model.onnx"), given)
    return given


def test_an_onnx_file_is_rewritten_compared_and_packaged(rmsnorm: CommandLine, recipe: Path) -> None:
    given = _given(recipe)
    before = given.read_bytes()
    code, steps, notes = _ship(rmsnorm, recipe, _FILE)
    assert (code, [status for status, _ in steps.values()]) == (0, ["done"] * 3)
    assert list(steps) == ["rewrite", "validate", "package:ort-server"]
    assert steps["rewrite"][1]["proof"] == "pass"
    assert not any("not with PyTorch" in note for note in notes)
    row = recipe.parent / "dist" / "given"
    manifest = json.loads((row / "model" / "manifest.json").read_text())
    assert (len(manifest["sites"]), given.read_bytes()) == (1, before)
    nodes = [node.op_type for node in onnx.load(row / "model" / "given.onnx").graph.node]
    assert "SimplifiedLayerNormalization" in nodes
    report = json.loads((row / "report.json").read_text())
    assert (report["verdict"], len(report["norms"])) == ("pass", 1)
    assert (row / "report.junit.xml").exists()
    assert not (row / "report.html").exists()

    assert _plan(rmsnorm, recipe, _FILE) == "given: unchanged"
    limits = 'limits = {"@norms" = {max_rms = 1e-5}}\n'
    assert _plan(rmsnorm, recipe, _FILE + limits) == "given: validate, package:ort-server (changed: limits)"
    assert _plan(rmsnorm, recipe, _FILE.replace('"ort"', '"standard"')) == (
        "given: rewrite, validate, package:ort-server (changed: target)"
    )
    code, steps, _ = _ship(rmsnorm, recipe, _FILE + 'limits = {"@norms" = {max_rms = 1e-30}}\n')
    assert (code, [status for status, _ in steps.values()]) == (1, ["unchanged", "failed", "not run"])
    # A report that is no longer asked for would be that of an earlier comparison.
    code, _, _ = _ship(rmsnorm, recipe, _FILE.replace('"junit"', ""))
    assert (code, (row / "report.junit.xml").exists()) == (0, False)
    given.write_bytes(b"not a model")
    code, steps, _ = _ship(rmsnorm, recipe, _FILE)
    assert (code, [status for status, _ in steps.values()]) == (2, ["failed", "not run", "not run"])
    assert str(given) in steps["rewrite"][1]["message"]


def test_an_onnx_file_alone_says_that_it_was_not_compared_with_pytorch(rmsnorm: CommandLine, recipe: Path) -> None:
    _given(recipe)
    code, steps, notes = _ship(rmsnorm, recipe, '[[model]]\nname = "given"\nsource = "given.onnx"\n')
    assert (code, list(steps)) == (0, ["rewrite"])
    assert any("not with PyTorch: add against = MODEL" in note for note in notes)


def test_an_engine_is_built_and_built_again_if_it_changed(rmsnorm: CommandLine, recipe: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")
    text = f'{_ENGINE}runners = ["ort"]\nnorm = "plugin"\nplugin = "python"\n'
    code, steps, notes = _ship(rmsnorm, recipe, text)
    assert (code, list(steps)) == (0, ["export", "validate", "build:rtx", "package:ort-server"])
    built = steps["build:rtx"][1]
    assert (built["architectures"], built["norms"], built["plugin_layers"]) == (["sm_89"], 1, 1)
    assert any("rtx/model.engine was not compared with PyTorch" in note for note in notes)
    assert _plan(rmsnorm, recipe, text) == "net: unchanged"
    assert _plan(rmsnorm, recipe, text.replace("sm_89", "sm_86")) == "net: build:rtx (changed: architectures)"
    engine = recipe.parent / "dist" / "net" / "rtx" / "model.engine"
    content = engine.read_bytes()
    engine.write_bytes(content[:-1])
    assert _plan(rmsnorm, recipe, text) == "net: build:rtx (rtx/model.engine was changed)"
    code, steps, notes = _ship(rmsnorm, recipe, text)
    assert (code, steps["build:rtx"][0], steps["package:ort-server"][0]) == (0, "done", "unchanged")
    assert "rtx was changed since it was written; it was kept as rtx.changed-1" in notes
    assert (engine.parent.with_name("rtx.changed-1") / "model.engine").read_bytes() == content[:-1]
    (engine.parent / "model.engine.json").unlink()
    assert _plan(rmsnorm, recipe, text) == "net: build:rtx (rtx/model.engine.json is missing)"


def test_without_a_gpu_an_engine_is_not_compared_and_the_rest_is_done(rmsnorm: CommandLine, recipe: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")
    code, steps, _ = _ship(rmsnorm, recipe, _ENGINE.replace("plugin", "standard"))
    if code == 0:
        pytest.skip("there is a GPU, which compares the engine")
    assert [status for status, _ in steps.values()] == ["done", "done", "done", "failed", "done"]
    error = steps["validate:rtx"][1]
    assert (code, error["kind"]) == (4, "EnvironmentMissingError")
    assert error["message"].endswith('To ship without comparing engines, set runners = ["ort"].')


def test_an_engine_is_compared_with_a_report_of_its_own(stand_in: StandIn, rmsnorm: CommandLine, recipe: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")
    pytest.importorskip("jinja2")
    code, steps, _ = _ship(rmsnorm, recipe, _ENGINE.replace("plugin", "standard"))
    assert (code, [status for status, _ in steps.values()]) == (0, ["done"] * 5)
    row = recipe.parent / "dist" / "net"
    report = json.loads((row / "report-rtx.json").read_text())
    assert (report["verdict"], Path(report["provenance"]["candidate"]["engine"]["path"])) == (
        "pass", row / "rtx" / "model.engine",
    )  # fmt: skip
    page = (recipe.parent / "dist" / "summary.html").read_text()
    for link in ("net/report.html", "net/report.json", "net/report-rtx.html", "net/report-rtx.json"):
        assert f'href="{link}"' in page
    (row / "report-rtx.json").unlink()
    recipe.write_text(_ENGINE.replace("plugin", "standard"))
    assert rmsnorm("ship", recipe, "--dry-run").out == "net: validate:rtx (report-rtx.json is missing)\n"


def test_a_rewriting_that_is_not_proven_is_not_a_pass(rmsnorm: CommandLine, recipe: Path) -> None:
    way = Way(dtype="bfloat16", casts="cast_then_scale", eps=1e-5, opset=20)
    onnx.save(build(way), recipe.parent / "given.onnx")
    text = '[[model]]\nname = "given"\nsource = "given.onnx"\npackage = ["ort-server"]\n'
    code, steps, _ = _ship(rmsnorm, recipe, text)
    assert (code, [status for status, _ in steps.values()]) == (3, ["failed", "not run"])
    assert "it was written, but not proven to compute the same: " in steps["rewrite"][1]["message"]
    code, steps, notes = _ship(rmsnorm, recipe, text + "validate = false\n")
    assert (code, [status for status, _ in steps.values()]) == (0, ["done", "done"])
    assert any(note.startswith("the rewriting is unproven: ") for note in notes)


def test_a_file_where_an_engine_would_be_is_kept(rmsnorm: CommandLine, recipe: Path) -> None:
    _given(recipe)
    place = recipe.parent / "dist" / "given" / "rtx"
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    text = '[[model]]\nname = "given"\nsource = "given.onnx"\nbuild = ["rtx"]\narchitectures = ["sm_89"]\n'
    code, steps, _ = _ship(rmsnorm, recipe, text)
    assert (code, place.read_text()) == (2, "mine")
    assert steps["build:rtx"][1]["message"].endswith("rtx exists and is not a folder; move it away, and ship again.")


def test_prompts_are_read_with_the_tokenizer_that_the_recipe_names(rmsnorm: CommandLine, recipe: Path) -> None:
    _given(recipe)
    text = f'{_FILE.replace(chr(34) + "ort-server" + chr(34), "")}prompts = ["1+1"]\n'
    code, steps, _ = _ship(rmsnorm, recipe, text)
    assert (code, steps["validate"][0]) == (2, "failed")
    assert (
        "prompts require a tokenizer, and neither the candidate nor the PyTorch model has one"
        in (steps["validate"][1]["message"])
    )
    assert "In a recipe, --tokenizer is tokenizer." in steps["validate"][1]["message"]
    code, steps, _ = _ship(rmsnorm, recipe, f'{text}tokenizer = "builtin:addition"\n')
    assert (code, [status for status, _ in steps.values()]) == (0, ["unchanged", "done"])


def test_a_file_without_norms_says_so(rmsnorm: CommandLine, recipe: Path) -> None:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "plain", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, recipe.parent / "given.onnx")
    code, _, notes = _ship(rmsnorm, recipe, '[[model]]\nname = "given"\nsource = "given.onnx"\n')
    assert (code, notes[0]) == (0, "no norm was rewritten: expected RMSNorms in the file, got none")


def test_a_folder_that_is_gone_is_made_again(rmsnorm: CommandLine, recipe: Path) -> None:
    _given(recipe)
    text = '[[model]]\nname = "given"\nsource = "given.onnx"\n'
    assert _ship(rmsnorm, recipe, text)[0] == 0
    shutil.rmtree(recipe.parent / "dist" / "given" / "model")
    assert _plan(rmsnorm, recipe, text) == "given: rewrite (model is missing)"
    assert _ship(rmsnorm, recipe, text)[0] == 0
