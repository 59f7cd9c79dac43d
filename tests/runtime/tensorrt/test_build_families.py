"""Real engines of real families: four targets, three dtypes, with and without KV cache, built by TensorRT-RTX.

Llama in float32 is built for every target. The other cases have the other families and dtypes, with one target each;
`RMSNORM_TESTS=all` builds the whole cross product of all. The decoders of transformers have one layer here. Every case
is one capture, whose targets are built two at a time; a `plugin` file is built with the plugins in Python and with the
C++ library.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import onnx_ir as ir
import pytest
import torch
import transformers
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.models.loading import load_model
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.runtime.tensorrt.build import Engine, build_engine
from rmsnorm_deploy.runtime.validation.api import validate
from tests.helpers.extent import EVERY
from tests.helpers.models.families import FAMILIES, VOCABULARY, build
from tests.helpers.plugins.plugin_library import BuiltLibrary

pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")

TARGETS = ("primitives", "standard", "ort", "plugin")
DTYPES = ("float32", "float16", "bfloat16")
Made = tuple[nn.Module, dict[str, Any] | None]


def t5_encoder() -> Made:
    config = transformers.T5Config(**{k: v for k, v in FAMILIES["t5"].options.items() if k != "decoder_start_token_id"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.T5EncoderModel(config)
    ids = torch.arange(3, 17).reshape(2, 7) % VOCABULARY
    return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def addition() -> Made:
    loaded = load_model("builtin:addition")
    return loaded.model, loaded.example_inputs


def family(name: str, layers: int = 2) -> Callable[[], Made]:
    def make() -> Made:
        options = {**FAMILIES[name].options, "num_hidden_layers": layers}
        with patch.dict(FAMILIES, {name: replace(FAMILIES[name], options=options)}):
            return build(name), None

    return make


# A maker, and how many norms the model has.
MODELS: dict[str, tuple[Callable[[], Made], int]] = {
    "llama": (family("llama", layers=1), 3),
    "qwen3": (family("qwen3", layers=1), 5), "gemma3": (family("gemma3", layers=1), 7),
    "t5": (t5_encoder, 5), "addition": (addition, 5),
}  # fmt: skip
CASES: list[tuple[str, str, bool, tuple[str, ...]]] = [
    ("llama", "bfloat16", True, ("standard", "plugin")),
    ("qwen3", "float16", False, ("plugin",)),
    ("qwen3", "bfloat16", True, ("primitives",)),
    ("gemma3", "float32", False, ("standard",)),
    ("gemma3", "bfloat16", True, ("ort",)),
    ("t5", "float32", False, ("plugin",)),
    ("addition", "float16", False, ("primitives",)),
]


if EVERY:
    CASES = [
        (name, dtype, past, TARGETS)
        for name, dtype, past in itertools.product(MODELS, DTYPES, (False, True))
        if not past or name not in ("t5", "addition")
    ]


@pytest.mark.parametrize(
    ("name", "dtype", "past", "targets"), CASES, ids=[f"{n}-{d}-{'cache' if p else 'plain'}" for n, d, p, _ in CASES]
)
def test_engines(
    name: str,
    dtype: str,
    past: bool,
    targets: tuple[str, ...],
    tmp_path: Path,
    built_library: BuiltLibrary,
) -> None:
    maker, norms = MODELS[name]
    model, inputs = maker()
    results = export_model(
        model.to(getattr(torch, dtype)), tmp_path / "out", inputs=inputs, target=targets, with_past=past
    )

    def built(form: str) -> Engine:
        target, _, plugin = form.partition(" ")
        folder = results[targets.index(target)].folder
        choices: dict[str, Any] = {"architectures": (89,), "plugin": plugin or "auto"}
        return build_engine(folder, tmp_path / f"{form}.engine", plugin_library=str(built_library.path), **choices)

    forms = [f for t in targets for f in ([f"{t} python", f"{t} library"] if t == "plugin" else [t])]
    with ThreadPoolExecutor(2) as pool:
        records = {form: engine.record for form, engine in zip(forms, pool.map(built, forms), strict=True)}
    for form, record in records.items():
        target, _, plugin = form.partition(" ")
        check(record, target, dtype, norms)
        assert record["plugin"]["kind"] == (plugin or "none"), form
        assert len(record["profiles"]) == (2 if past else 1), form
    paths = {target: [row["path"] for row in record["norms"]] for target, record in records.items()}
    found = {site.path for site in results[0].recognition.sites}
    assert all(len(set(each)) == norms and set(each) == found for each in paths.values()), paths


def check(record: dict[str, Any], target: str, dtype: str, norms: int) -> None:
    rows = record["norms"]
    assert len(rows) == norms, target
    assert record["warnings"] == [], target
    assert record["layer_source"] in ("builder log", "inspector")
    assert {row["precision"] for row in rows} == {dtype}, target
    assert {row["statistics"] for row in rows} == {"float32"}, target
    assert all(row["layer"] for row in rows), target
    is_plugin = target == "plugin"
    assert record["plugin_layers"] == (norms if is_plugin else 0), target
    assert {row["plugin"] for row in rows} == {is_plugin}, target
    if is_plugin:
        assert len({row["layer"] for row in rows}) == norms  # a layer for each
        assert {(kernel["dtype"], *kernel["architectures"]) for kernel in record["kernels"]} == {(dtype, 89)}
    else:
        assert record["kernels"] == []


def test_the_demo_has_no_cache(tmp_path: Path) -> None:
    model, inputs = addition()
    with pytest.raises(UnsupportedError, match="Omit --with-past"):
        export_model(model, tmp_path / "out", inputs=inputs, with_past=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers in float16, with the subfolders `plugin` and `standard`."""
    folder = tmp_path_factory.mktemp("llama") / "out"
    export_model(build("llama", torch.float16), folder, target=("plugin", "standard"))
    return folder


def test_native_builds_of_the_plugins_file_use_its_functions(llama: Path, tmp_path: Path) -> None:
    record = build_engine(llama / "plugin", tmp_path / "m.engine", norm="native", architectures=(89,)).record
    assert (record["plugin_layers"], record["warnings"]) == (0, [])
    assert [(row["plugin"], row["precision"]) for row in record["norms"]] == [(False, "float16")] * 5


def test_every_norm_of_a_standard_file_can_go_to_the_plugin(llama: Path, tmp_path: Path) -> None:
    choices: dict[str, Any] = {"norm": "plugin", "plugin": "python", "architectures": (89,)}
    record = build_engine(llama / "standard", tmp_path / "m.engine", **choices).record
    assert (record["plugin_layers"], record["warnings"]) == (5, [])
    assert [(row["plugin"], row["precision"]) for row in record["norms"]] == [(True, "float16")] * 5
    assert {row["path"] for row in record["norms"]} == {site.path for site in find_norms(build("llama")).sites}


def test_a_file_with_some_norms_in_the_plugin_gets_the_others_there_too(llama: Path, tmp_path: Path) -> None:
    """The last norm of the plugin's file is put back into the standard form."""
    model = ir.external_data.load_to_model(ir.load(llama / "plugin" / "model.onnx"))
    node = next(node for node in model.graph if node.name == "model.norm/AddRMSNorm")
    spelled = ir.load(llama / "standard" / "model.onnx")
    norm = next(node for node in spelled.graph if node.name == "model.norm/RMSNormalization")
    add = ir.node("Add", node.inputs[:2], name="an_add")
    own = ir.node("RMSNormalization", [add.outputs[0], node.inputs[2]], {"epsilon": 1e-6}, name="by_hand")
    assert norm.attributes["epsilon"].as_float() == pytest.approx(1e-6)
    own.metadata_props.update(norm.metadata_props)
    for old, new in zip(node.outputs, (own.outputs[0], add.outputs[0]), strict=True):
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new)
    model.graph.insert_after(node, [add, own])
    model.graph.remove(node, safe=True)
    model.graph.opset_imports[""] = 23
    mixed = tmp_path / "mixed" / "model.onnx"
    mixed.parent.mkdir()
    ir.save(model, mixed)
    choices: dict[str, Any] = {"plugin": "python", "architectures": (89,)}
    record = build_engine(mixed, tmp_path / "auto.engine", **choices).record
    assert record["plugin_layers"] == 4
    record = build_engine(mixed, tmp_path / "all.engine", norm="plugin", **choices).record
    assert (record["plugin_layers"], len(record["norms"])) == (5, 5)
    assert all(row["plugin"] for row in record["norms"])


def test_a_t5_whose_wo_stays_float32(tmp_path: Path) -> None:
    """`from_pretrained(dtype=float16)` keeps `wo` in float32, so that the residual stream becomes float32.

    T5's norm gives its weight's dtype, float16, for an x of float32. No spec says that, so those norms are found in the
    graph: float32 up to a cast, with the weight after it.
    """
    model, inputs = t5_encoder()
    cast(Any, model).save_pretrained(tmp_path / "t5")
    kept = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5", dtype=torch.float16)
    wide = [name for name, parameter in kept.named_parameters() if parameter.dtype == torch.float32]
    assert wide == [f"encoder.block.{index}.layer.1.DenseReluDense.wo.weight" for index in range(2)]
    for result in export_model(kept, tmp_path / "out", inputs=inputs, target=TARGETS):
        assert [site.get("found", "module") for site in result.manifest["sites"]] == ["module"] * 2 + ["graph"] * 3
        assert validate(result.folder, kept, shapes=[(2, 5)]).verdict == "pass", result.target
