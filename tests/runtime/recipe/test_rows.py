"""The rows of a recipe: names, values, and the facts that decide which steps are done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rmsnorm_deploy.runtime.recipe import steps
from rmsnorm_deploy.runtime.recipe.recipe_file import parse_recipe
from rmsnorm_deploy.runtime.recipe.rows import rows_of

_MODEL = '[[model]]\nname = "a"\nsource = "models.py:net"\n'


def _rows(folder: Path, more: str = "") -> list[dict[str, Any]]:
    if not (folder / "models.py").exists():
        (folder / "models.py").write_text("def net(): ...")
        (folder / "x.npz").write_bytes(b"1")
    return rows_of(parse_recipe(_MODEL + more, folder / "rmsnorm.toml"))


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ("", ["a"]),
        ("targets = ['ort']\ndtypes = ['fp16']", ["a"]),
        ("dtypes = ['fp32', 'half']", ["a-float32", "a-float16"]),
        ("targets = ['ort', 'Standard']", ["a-ort", "a-standard"]),
        (
            "targets = ['ort', 'standard']\ndtypes = ['fp32', 'fp16']",
            ["a-ort-float32", "a-ort-float16", "a-standard-float32", "a-standard-float16"],
        ),
    ],
)
def test_names_have_what_differs(more: str, names: list[str], tmp_path: Path) -> None:
    rows = _rows(tmp_path, more)
    assert [row["row"] for row in rows] == names
    assert [row["folder"] for row in rows] == [str(tmp_path / "dist" / name) for name in names]


def test_a_row_is_plain_data_with_every_value(tmp_path: Path) -> None:
    (row,) = _rows(tmp_path, "inputs = 'x.npz'\ndtypes = ['half']\n")
    assert json.loads(json.dumps(row)) == row
    fields = ("source", "inputs", "target", "dtype", "runners", "package", "opset", "with_past", "weights")
    assert {name: row[name] for name in fields} == {
        "source": f"{tmp_path}/models.py:net", "inputs": str(tmp_path / "x.npz"), "target": "primitives",
        "dtype": "float16", "runners": ["ort"], "package": [], "opset": None, "with_past": False, "weights": None,
    }  # fmt: skip
    assert [step["step"] for step in row["steps"]] == ["export", "validate"]


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[str]]:
    """The facts of each step that differ; those of a step that one row alone has are left out."""
    others = {step["step"]: step["facts"] for step in after["steps"]}
    return {
        step["step"]: found
        for step in before["steps"]
        if (found := [name for name, value in step["facts"].items() if others[step["step"]][name] != value])
    }


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ("targets = ['primitives']", {}),
        ("validate = true\nwith_past = false\nfunction = true\nattention = 'node'\nseed = 0", {}),
        ("targets = ['ort']", {"export": ["target"]}),
        ("dtypes = ['fp16']\nopset = 23", {"export": ["opset", "dtype"]}),
        (
            "targets = ['ort']\nquantize = 'int8'\nlossy = 'int8'",
            {"export": ["target", "quantize"], "validate": ["lossy"]},
        ),
        ("inputs = 'x.npz'\nstatic = true", {"export": ["inputs", "static"]}),
        ("package = ['triton']\nmax_batch = 2", {}),
        ("limits = {logits = {atol = 1}}\nshapes = ['2x3']\nprovider = 'CPU'", {
            "validate": ["limits", "shapes", "provider"],
        }),
        ("trust_remote_code = true\nallow_missing = ['*.bias']", {
            "export": ["trust_remote_code", "allow_missing"], "validate": ["trust_remote_code", "allow_missing"],
        }),
    ],
)  # fmt: skip
def test_facts_are_values_and_not_how_they_are_written(
    more: str, changed: dict[str, list[str]], tmp_path: Path
) -> None:
    (before,), (after,) = _rows(tmp_path), _rows(tmp_path, more)
    assert _changed(before, after) == changed


def test_facts_of_the_source_and_the_inputs(tmp_path: Path) -> None:
    more = "inputs = 'x.npz'\ntest_inputs = 'x.npz'"
    (first,) = _rows(tmp_path, more)
    (tmp_path / "models.py").write_text("def net(): pass")
    (second,) = _rows(tmp_path, more)
    assert _changed(first, second) == {"export": ["source"]}
    (tmp_path / "x.npz").write_bytes(b"2")
    (third,) = _rows(tmp_path, more)
    assert _changed(second, third) == {"export": ["inputs"], "validate": ["test_inputs"]}


def test_an_onnx_file_and_its_external_data_are_facts(tmp_path: Path) -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"])], "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
            [numpy_helper.from_array(np.ones(4, np.float32), "w")],
        )
    )  # fmt: skip
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    recipe = parse_recipe('[[model]]\nname = "a"\nsource = "net.onnx"\n', tmp_path / "rmsnorm.toml")
    (before,) = rows_of(recipe)
    assert (before["source"], before["attention"], before["runners"]) == (
        str(tmp_path / "net.onnx"), "decomposed", [],
    )  # fmt: skip
    assert [step["step"] for step in before["steps"]] == ["rewrite"]
    assert _changed(before, rows_of(recipe)[0]) == {}
    (tmp_path / "net.data").write_bytes(np.full(4, 2, np.float32).tobytes())
    assert _changed(before, rows_of(recipe)[0]) == {"rewrite": ["source"]}
    (tmp_path / "net.onnx").write_bytes(b"not a model")
    assert _changed(before, rows_of(recipe)[0]) == {"rewrite": ["source"]}


def test_what_a_row_occupies_is_not_a_fact(tmp_path: Path) -> None:
    (plain,) = _rows(tmp_path)
    (large,) = _rows(tmp_path, "cpus = 4\ngpus = 0.5\nmemory = 32\n")
    assert (plain["needs"], large["needs"]) == (
        {"cpus": 1, "gpus": 0, "memory": 0}, {"cpus": 4, "gpus": 0.5, "memory": 32},
    )  # fmt: skip
    assert plain["steps"] == large["steps"]


def test_the_version_of_a_library_is_a_fact_of_the_steps_that_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = _rows(tmp_path, "build = ['rtx']\npackage = ['triton']")
    monkeypatch.setattr(steps, "installed_version", lambda name: f"{name} 9" if name in new_ones else "1")
    new_ones: set[str] = set()
    (first,) = _rows(tmp_path, "build = ['rtx']\npackage = ['triton']")
    assert _changed(before, first).keys() == {"export", "validate", "build:rtx", "validate:rtx", "package:triton"}
    for library, found in {
        "onnxruntime": {"validate", "validate:rtx"}, "onnxscript": {"export"}, "tensorrt-rtx-cu13": {"build:rtx"},
    }.items():  # fmt: skip
        new_ones = {library}
        (after,) = _rows(tmp_path, "build = ['rtx']\npackage = ['triton']")
        assert _changed(first, after) == {step: [library] for step in found}
