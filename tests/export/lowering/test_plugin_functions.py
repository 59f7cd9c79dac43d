"""The styles of target `plugin`: with local functions, without them, and for ONNX Runtime's TensorRT provider."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from rmsnorm_deploy.cli.application import run
from rmsnorm_deploy.export.from_onnx.rewrite import rewrite
from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.lowering.plugin_functions import PluginStyle, check_style, plugin_style
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from rmsnorm_deploy.models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError, UsageError
from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.graphs.capture_graph import run as run_model
from tests.helpers.models.families import build
from tests.helpers.norms.norm_cases import FLOAT32, case, residual_model

NORMS = 5
OPTIONS: dict[PluginStyle, dict[str, bool]] = {
    "function": {}, "bare": {"function": False}, "ort_trt": {"ort_trt": True},
}  # fmt: skip
FLAGS: dict[PluginStyle, list[str]] = {"function": [], "bare": ["--no-function"], "ort_trt": ["--ort-trt"]}
DOMAINS: dict[PluginStyle, str] = {"function": "rmsnorm_deploy", "bare": "rmsnorm_deploy", "ort_trt": "trt.plugins"}
NOTES: dict[PluginStyle, str] = {"bare": "ONNX Runtime cannot run it", "ort_trt": "with its TensorRT provider"}
STYLES = list(OPTIONS)
rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small llama in float16, in each style and as primitives."""
    model, root = build("llama", torch.float16), tmp_path_factory.mktemp("styles")
    for style, options in OPTIONS.items():
        export_model(model, root / style, target="plugin", **options)
    export_model(model, root / "primitives")
    return {name: root / name for name in (*STYLES, "primitives")}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def check_file(path: Path, style: PluginStyle) -> None:
    """The file has all norms as plugin nodes in the style's domain, with the contract's attributes."""
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type in contract.INPUTS]
    assert [node.domain for node in nodes] == [DOMAINS[style]] * NORMS
    assert all(sorted(a.name for a in node.attribute) == sorted(contract.ATTRIBUTES) for node in nodes)
    wanted = [("rmsnorm_deploy", name) for name in ("AddRMSNorm", "RMSNorm")] if style == "function" else []
    assert sorted((f.domain, f.name) for f in model.functions) == wanted
    assert {i.domain: i.version for i in model.opset_import} == {"": 20, DOMAINS[style]: 1}


@pytest.mark.parametrize("style", STYLES)
def test_an_exported_file_has_nodes_functions_and_imports_of_its_style(
    folders: dict[str, Path], style: PluginStyle
) -> None:
    check_file(folders[style] / "model.onnx", style)
    notes = manifest_of(folders[style])["notes"]
    assert [NOTES[style] in note for note in notes] == [True] if style in NOTES else notes == []


@pytest.mark.parametrize("style", ["bare", "ort_trt"])
def test_onnxruntime_refuses_a_file_without_functions(folders: dict[str, Path], style: str) -> None:
    with (
        pytest.raises(RmsnormDeployError, match=r"is not a registered .*plugin nodes without the local functions"),
        OrtRunner(folders[style] / "model.onnx"),
    ):
        pass


@pytest.mark.parametrize("given", [*STYLES, "primitives"])
@pytest.mark.parametrize("style", STYLES)
def test_a_file_of_any_style_is_rewritten_to_any_other(
    folders: dict[str, Path], given: str, style: PluginStyle, tmp_path: Path
) -> None:
    result = rewrite_model(folders[given] / "model.onnx", tmp_path / "out", target="plugin", **OPTIONS[style])
    check_file(result.model, style)
    assert result.proof is not None
    assert result.proof.verdict == "pass"
    assert [site.changed for site in result.rewritten.sites] == [given == "primitives"] * NORMS
    assert len(result.proof.sites) == (NORMS if given == "primitives" else 0)
    assert result.manifest["refusals"] == []
    notes = [note for note in result.manifest["notes"] if "local function" in note]
    assert [NOTES[style] in note for note in notes] == [True] if style in NOTES else notes == []


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("target", ["standard", "ort", "primitives"])
def test_a_file_of_any_style_is_rewritten_for_other_targets(
    folders: dict[str, Path], style: PluginStyle, target: str, tmp_path: Path
) -> None:
    result = rewrite_model(folders[style] / "model.onnx", tmp_path / "out", target=target)
    assert result.proof is not None
    assert result.proof.verdict == "pass"
    model = onnx.load(result.model, load_external_data=False)
    assert not any(node.domain in ("rmsnorm_deploy", "trt.plugins") for node in model.graph.node)
    assert len(model.functions) == 0
    assert not {"rmsnorm_deploy", "trt.plugins"} & {i.domain for i in model.opset_import}
    with OrtRunner(folders["primitives"] / "model.onnx") as before, OrtRunner(result.model) as after:
        ids = np.arange(8, dtype=np.int64).reshape(2, 4)
        feeds = {info.name: ids if info.name == "input_ids" else np.ones_like(ids) for info in before.inputs()}
        a, b = before.run(feeds)["logits"], after.run(feeds)["logits"]
    assert np.abs(a.astype(np.float64) - b).max() <= 8 * np.finfo(np.float16).eps * np.abs(a).max()


def test_beside_the_model_and_without_proof(folders: dict[str, Path], tmp_path: Path) -> None:
    source = rewrite_model(folders["primitives"] / "model.onnx", tmp_path / "in", target="primitives").model
    for verify in (True, False):
        place = source.with_name(f"{verify}.onnx")
        result = rewrite_model(source, place, target="plugin", ort_trt=True, verify=verify)
        assert (result.proof is not None) is verify
        check_file(place, "ort_trt")
        assert NOTES["ort_trt"] in result.manifest["notes"][-1]


def test_the_graph_of_a_rewrite_runs_and_the_bare_style_only_drops_functions() -> None:
    it = case("llama", torch.float32)
    whole, _ = lower(it.model, "plugin")
    bare, _ = lower(it.model, "plugin", style="bare")
    assert dict(bare.functions) == {}
    again = rewrite(bare, "plugin")
    assert [site.stood for site in again.sites] == [True]
    results = zip(run_model(whole, it.feeds), run_model(again.model, it.feeds), strict=True)
    assert all(np.array_equal(a, b) for a, b in results)


@pytest.mark.parametrize("add", [False, True])
def test_a_plugin_of_others_in_onnxruntimes_domain_is_no_norm_of_ours(add: bool) -> None:
    captured = residual_model(FLOAT32) if add else case("llama", torch.float32).model
    model, _ = lower(captured, "plugin", style="ort_trt")
    assert [len(find_graph_norms(model).sites), len(find_graph_norms(model).refusals)] == [1, 0]
    (node,) = (node for node in model.graph if node.domain == "trt.plugins")
    node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", "acme")
    found = find_graph_norms(model)
    assert found.sites == []
    assert [row.reason for row in found.refusals] == ["its plugin is not in namespace 'rmsnorm_deploy'"]
    result = rewrite(model, "plugin")
    assert [n.domain for n in result.model.graph if n.op_type in contract.INPUTS] == ["trt.plugins"]
    del node.attributes["plugin_namespace"]
    assert find_graph_norms(model).sites == []


# Refusals ---------------------------------------------------------------------------------------------------------


def test_options_make_a_style() -> None:
    given = ((True, False), (False, False), (True, True), (False, True))
    styles = [plugin_style(function, ort_trt, ["plugin"]) for function, ort_trt in given]
    assert styles == ["function", "bare", "ort_trt", "ort_trt"]
    assert plugin_style(True, False, ["ort"]) == "function"
    assert plugin_style(False, False, ["ort", "plugin"]) == "bare"


@pytest.mark.parametrize("style", ["bare", "ort_trt"])
def test_a_style_is_for_target_plugin_only(style: PluginStyle, tmp_path: Path) -> None:
    (flag,) = FLAGS[style]
    wanted = f"{flag} requires --target plugin, whose file has plugin nodes; got ort"
    with pytest.raises(UsageError, match=wanted):
        export_model(torch.nn.Identity(), tmp_path / "out", target="ort", **OPTIONS[style])
    with pytest.raises(UsageError, match=wanted):
        rewrite_model(tmp_path / "none.onnx", tmp_path / "out", target="ort", **OPTIONS[style])
    with pytest.raises(UsageError, match=wanted):
        lower(case("llama", torch.float32).model, "ort", style=style)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(UsageError, match="plugin style: expected one of function, bare, ort_trt, got 'other'"):
        check_style("other", ["plugin"])  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", ["--no-function", "--ort-trt"])
@pytest.mark.parametrize("target", ["ort", "primitives", "standard"])
def test_the_commands_refuse_it_for_other_targets(
    flag: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("export", "rewrite"):
        assert run([command, "nothing.onnx", "-o", str(tmp_path / "out"), "--target", target, flag]) == 2
        assert f"{flag} requires --target plugin" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("style", ["bare", "ort_trt"])
def test_the_commands_say_what_the_file_needs(
    folders: dict[str, Path], style: PluginStyle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-o", str(tmp_path / "out"), "--target", "plugin", *FLAGS[style]]
    assert run(["rewrite", str(folders["primitives"] / "model.onnx"), *arguments]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Note: the norms are plugin nodes" in printed
    assert NOTES[style] in printed
    check_file(tmp_path / "out" / "model.onnx", style)
    assert run(["export", "builtin:addition", "-o", str(tmp_path / "export"), "--target", "ort", *arguments[2:]]) == 0
    assert NOTES[style] in " ".join(capsys.readouterr().out.split())
    assert [NOTES[style] in note for note in manifest_of(tmp_path / "export" / "plugin")["notes"]] == [True]
    assert manifest_of(tmp_path / "export" / "ort")["notes"] == []


# TensorRT ---------------------------------------------------------------------------------------------------------


@rtx
@pytest.mark.parametrize("style", STYLES)
def test_the_plugin_runs_every_norm_of_a_file_of_any_style(
    folders: dict[str, Path], style: PluginStyle, tmp_path: Path
) -> None:
    from rmsnorm_deploy.runtime.tensorrt.build import build_engine

    try:
        engine = build_engine(folders[style], tmp_path / "model.engine", norm="auto")
    except EnvironmentMissingError as error:
        pytest.skip(str(error))
    assert engine.record["plugin_layers"] == NORMS
    assert [row["plugin"] for row in engine.record["norms"]] == [True] * NORMS
    assert engine.record["warnings"] == []


@rtx
def test_the_functions_are_built_natively_without_warnings_of_repeated_nodes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from rmsnorm_deploy.runtime.tensorrt.build import build_engine

    try:
        engine = build_engine(folders["function"], tmp_path / "model.engine", norm="native")
    except EnvironmentMissingError as error:
        pytest.skip(str(error))
    assert engine.record["plugin_layers"] == 0
    assert all(row["layer"] for row in engine.record["norms"])
    assert engine.record["warnings"] == []
    assert "A node named rmsnorm_deploy::AddRMSNorm/x32 already exists" in engine.log.read_text()


@rtx
@pytest.mark.parametrize("style", ["bare", "ort_trt"])
def test_a_file_without_functions_is_not_built_natively(
    folders: dict[str, Path], style: PluginStyle, tmp_path: Path
) -> None:
    from rmsnorm_deploy.runtime.tensorrt.build import build_engine

    with pytest.raises(UnsupportedError, match="the file has no local functions"):
        build_engine(folders[style], tmp_path / "model.engine", norm="native")
