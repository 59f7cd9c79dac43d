"""The rows of a recipe: names, values, and the key that decides whether a row has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
    assert {name: row[name] for name in ("source", "inputs", "target", "dtype", "validate", "package", "opset")} == {
        "source": f"{tmp_path}/models.py:net", "inputs": str(tmp_path / "x.npz"), "target": "primitives",
        "dtype": "float16", "validate": True, "package": [], "opset": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ("targets = ['primitives']", []),
        ("validate = true\nwith_past = false", []),
        ("targets = ['ort']", ["target"]),
        ("dtypes = ['fp16']\nopset = 23", ["dtype", "opset"]),
        ("lossy = 'int8'\nquantize = 'int8'", ["quantize", "lossy"]),
        ("inputs = 'x.npz'", ["inputs"]),
        ("package = ['triton']\nvalidate = false", ["validate", "package"]),
        ("trust_remote_code = true\nattention = 'decomposed'", ["attention", "trust_remote_code"]),
    ],
)
def test_the_key_is_of_the_values_and_not_of_how_they_are_written(
    more: str, changed: list[str], tmp_path: Path
) -> None:
    (before,), (after,) = _rows(tmp_path), _rows(tmp_path, more)
    assert [name for name in before["facts"] if before["facts"][name] != after["facts"][name]] == changed
    assert (before["key"] == after["key"]) == (not changed)


def test_the_key_is_of_the_source_and_the_inputs(tmp_path: Path) -> None:
    keys = [_rows(tmp_path, "inputs = 'x.npz'")[0]["key"]]
    (tmp_path / "models.py").write_text("def net(): pass")
    keys.append(_rows(tmp_path, "inputs = 'x.npz'")[0]["key"])
    (tmp_path / "x.npz").write_bytes(b"2")
    keys.append(_rows(tmp_path, "inputs = 'x.npz'")[0]["key"])
    assert len(set(keys)) == 3


def test_what_a_row_occupies_does_not_change_its_key(tmp_path: Path) -> None:
    (plain,) = _rows(tmp_path)
    (large,) = _rows(tmp_path, "cpus = 4\ngpus = 0.5\nmemory = 32\n")
    assert (plain["needs"], large["needs"]) == (
        {"cpus": 1, "gpus": 0, "memory": 0}, {"cpus": 4, "gpus": 0.5, "memory": 32},
    )  # fmt: skip
    assert plain["key"] == large["key"]
