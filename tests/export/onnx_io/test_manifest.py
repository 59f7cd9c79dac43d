"""The manifest: rows for norms of modules and of graphs, deviations, tensors, and what is written and read back."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.from_onnx.rewrite import rewrite, rewritten_rows
from rmsnorm_deploy.export.from_torch.lower import site_rows
from rmsnorm_deploy.export.lowering.norm_writer import LoweredSite
from rmsnorm_deploy.export.lowering.table import Deviation
from rmsnorm_deploy.export.onnx_io import manifest as module
from rmsnorm_deploy.export.onnx_io.manifest import (
    SCHEMA,
    deviation_rows,
    read_manifest,
    tensor_rows,
    versions,
    write_manifest,
)
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.recognition.site import Recognition, Site
from rmsnorm_deploy.models.spec import NormSpec
from tests.helpers.graphs.onnx_text import parsed, values

SPEC = NormSpec(1e-6)
HALF, ORT = (
    Deviation("any", ("float16",), "any", 1.5, "why"),
    Deviation("any", ("float16",), "onnxruntime", None, "other"),
)
WEIGHT = "float[8] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}"


# Versions -------------------------------------------------------------------------------------------------------------


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    for name in ("torch", "onnx", "onnx-ir", "numpy"):
        assert found[name] == metadata.version(name)
    assert next(iter(found)) == "python"


def test_what_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VERSIONS", ("numpy", "no-such-distribution-anywhere"))
    assert sorted(versions()) == ["numpy", "python"]


# Rows of norms --------------------------------------------------------------------------------------------------------


def test_each_norm_of_a_model_has_its_calls() -> None:
    site = Site("layers.0.norm", "package.Norm", SPEC, (8,), "float16", "weight")
    unused = Site("head.norm", "package.Norm", SPEC, None, "float16")
    calls = [
        LoweredSite("layers.0.norm", SPEC, "plain", "a/Mul", "float16", [HALF]),
        LoweredSite("layers.0.norm", SPEC, "residual_add", "b/Mul", "float16"),
    ]
    first, second = site_rows(Recognition([site, unused]), calls)
    assert first == {
        **site.to_dict(),
        "calls": [
            {
                "node": "a/Mul", "form": "plain", "spec": SPEC.to_dict(),
                "deviations": [{"runtime": "any", "at_most_ulp": 1.5, "reason": "why"}],
            },
            {"node": "b/Mul", "form": "residual_add", "spec": SPEC.to_dict(), "deviations": []},
        ],
    }  # fmt: skip
    assert second == {**unused.to_dict(), "calls": []}


def norm_graph(shape: str = "float[2, 8]", attributes: str = "epsilon = 0.125") -> ir.Model:
    return parsed(f"g ({shape} x) => ({shape} y) <{WEIGHT}> {{ y = RMSNormalization <{attributes}> (x, w) }}", 23)


def test_a_norm_of_a_graph_has_the_row_of_a_module_without_a_class() -> None:
    (site,) = find_graph_norms(norm_graph()).sites
    row = site.to_dict()
    assert row == {
        "path": "node_y", "class": None, "spec": site.spec.to_dict(), "width": 8, "dtype": "float32",
        "parameters": ["w"],
    }  # fmt: skip
    keys = set(Site("p", "c", SPEC, None, "float32").to_dict())
    assert set(row) == keys


def test_the_width_of_a_norm_over_several_dims_is_a_list() -> None:
    text = "g (float[2, 2, 4] x) => (float[2, 2, 4] y) <float[2, 4] w = {1., 2., 3., 4., 5., 6., 7., 8.}> "
    (site,) = find_graph_norms(parsed(text + "{ y = RMSNormalization <axis = -2> (x, w) }", 23)).sites
    assert site.to_dict()["width"] == [2, 4]


def test_a_width_that_the_file_does_not_tell_is_null() -> None:
    text = "s = Mul (x, x)  m = ReduceMean (s, a)  p = Add (m, e)  r = Sqrt (p)  y = Div (x, r)"
    model = parsed(f"g (float[n, m] x) => (float[n, m] y) <float e = {{0.125}}, int64[1] a = {{-1}}> {{ {text} }}")
    (site,) = find_graph_norms(model).sites
    assert site.to_dict()["width"] is None
    assert site.to_dict()["parameters"] == []


def test_norms_of_a_rewritten_file_stand_together_by_path() -> None:
    body = "k = RMSNormalization <epsilon = 0.125> (x, w)  y = RMSNormalization <epsilon = 0.25> (k, w)"
    model = parsed(f"g (float[2, 8] x) => (float[2, 8] y) <{WEIGHT}> {{ {body} }}", 23)
    values(model)["w"].name = "norm.weight"
    for node in model.graph:
        node.name = f"/layer/{node.name}"
    (row,) = rewritten_rows(rewrite(model, "ort"))
    assert (row["path"], [call["changed"] for call in row["calls"]]) == ("layer", [True, True])
    assert [call["spec"]["eps"] for call in row["calls"]] == [0.125, 0.25]
    (row,) = rewritten_rows(rewrite(model, "standard"))
    assert [call["changed"] for call in row["calls"]] == [False, False]


def test_a_norm_that_was_left_as_it_is_has_no_calls() -> None:
    rows = rewritten_rows(rewrite(norm_graph(), "ort", skip={0}))
    assert [(row["path"], row["calls"]) for row in rows] == [("node_y", [])]


# Deviations -----------------------------------------------------------------------------------------------------------


def site_row(path: str, *deviations: Deviation) -> dict[str, Any]:
    (row,) = site_rows(
        Recognition([Site(path, "c", SPEC, None, "float16")]),
        [LoweredSite(path, SPEC, "plain", "n", "float16", list(deviations))] * 2,
    )
    return row


def test_each_deviation_stands_once_with_the_paths_of_its_norms() -> None:
    manifest = {"sites": [site_row("a", HALF, ORT), site_row("b", HALF)]}
    assert deviation_rows(manifest) == [
        {"runtime": "any", "at_most_ulp": 1.5, "reason": "why", "sites": ["a", "b"]},
        {"runtime": "onnxruntime", "at_most_ulp": None, "reason": "other", "sites": ["a"]},
    ]
    assert [row["reason"] for row in deviation_rows(manifest, "onnxruntime")] == ["why", "other"]
    assert [row["reason"] for row in deviation_rows(manifest, "tensorrt")] == ["why"]
    assert deviation_rows({}) == []


# Tensors --------------------------------------------------------------------------------------------------------------


def test_tensors() -> None:
    typed = ir.Value(name="x", shape=ir.Shape(["batch", 8, None]), type=ir.TensorType(ir.DataType.BFLOAT16))
    assert tensor_rows([typed, ir.Value(name="y")]) == [
        {"name": "x", "dtype": "bfloat16", "shape": ["batch", 8, None]},
        {"name": "y", "dtype": None, "shape": []},
    ]


# Files ----------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_with_every_files_hash(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"abc")
    (tmp_path / "sub" / "weights").write_bytes(b"12345")
    content = {"target": "ort", "notes_of": [{"a": 1}, {"b": "ü"}], "none": [], "deep": {"c": [1, 2]}}
    written = write_manifest(tmp_path, content, {"sub/weights": None})
    assert written == {
        "schema": SCHEMA,
        "versions": versions(),
        **content,
        "files": {
            "model.onnx": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
            "sub/weights": {"bytes": 5, "sha256": None},
        },
    }
    assert read_manifest(tmp_path) == written


def test_each_entry_and_each_item_of_a_list_has_a_line(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"sites": [{"a": 1}, {"b": 2}], "none": []})
    lines = (tmp_path / "manifest.json").read_text().splitlines()
    start = lines.index('  "sites": [')
    assert lines[start + 1 : start + 5] == ['    {"a": 1},', '    {"b": 2}', "  ],", '  "none": [],']
    assert (lines[0], lines[-1]) == ("{", "}")


def test_a_folder_of_exported_folders_names_them(tmp_path: Path) -> None:
    for name in ("standard", "ort"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError) as error:
        read_manifest(tmp_path)
    assert str(error.value).endswith(
        f"not an exported folder. Name one of those inside: {tmp_path / 'ort'}, {tmp_path / 'standard'}"
    )


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no manifest\.json.*rmsnorm export"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", r"manifest\.json cannot be read"),
        ("\xff", r"manifest\.json cannot be read"),
        ("[]", r"expected schema 'rmsnorm_deploy\.manifest/2', got 'list'"),
        ("{}", r"expected schema .*, got None"),
        (
            json.dumps({"schema": "rmsnorm_deploy.manifest/1"}),
            r"expected schema .*, got 'rmsnorm_deploy\.manifest/1'.*Export again",
        ),
    ],
)
def test_manifests_that_are_not_ours(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=message):
        read_manifest(tmp_path)


def test_a_manifest_without_calls_or_deviations_has_no_deviations() -> None:
    assert deviation_rows({"sites": [{"path": "a"}, {"path": "b", "calls": [{}]}]}) == []
