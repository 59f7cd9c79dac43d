"""A data set in parts: each row once, killed and continued, refused where it does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy import export_model, run_dataset
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.loading import load_model
from rmsnorm_deploy.runtime.dataset import run_dataset as module
from rmsnorm_deploy.runtime.dataset import run_part
from tests.helpers.models.factory_file import small_model

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
LENGTHS = [3, 5, 3, 1, 5, 3, 3, 5, 1, 3, 2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    export_model(small_model(folder, "models"), folder / "exported", target="ort")
    return folder / "exported"


def _rows() -> list[list[int]]:
    values = np.random.default_rng(0)
    return [values.integers(0, 12, length).tolist() for length in LENGTHS]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two files, the first in row groups of 2."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows, names = _rows(), [f"row {index}" for index in range(len(LENGTHS))]
    pq.write_table(pa.table({"name": names[:7], "input_ids": rows[:7]}), folder / "a.parquet", row_group_size=2)
    pq.write_table(pa.table({"name": names[7:], "input_ids": rows[7:]}), folder / "b.parquet")
    return folder


def _read(output: Path) -> Any:
    return pq.read_table(output)


def test_every_row_has_the_outputs_of_pytorch(exported: Path, data: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    done = run_dataset(exported, data, tmp_path / "out", rows=3, batch=2)
    assert (done.rows, done.parts, done.ran) == (11, 5, 5)  # 3 + 3 + 1 of the first file, 3 + 1 of the second
    table = _read(tmp_path / "out")
    assert table["name"].to_pylist() == [f"row {index}" for index in range(11)]
    model = load_model(f"{exported.parent / 'models.py'}:net").model
    (name,) = [column for column in table.column_names if column != "name"]
    for found, row in zip(table[name].to_pylist(), _rows(), strict=True):
        expected = model(torch.tensor([row])).detach().numpy()[0]
        np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=2e-6)
    record = json.loads((tmp_path / "out" / "_dataset.json").read_text())
    assert (record["rows"], record["parts"]) == (11, 5)


def test_a_run_that_was_killed_goes_on(
    exported: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, runs = tmp_path / "out", 0
    results = run_part.PartRunner._results

    def killed(self: Any, *arguments: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise KeyboardInterrupt
        return results(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_part.PartRunner, "_results", killed)
        with pytest.raises(KeyboardInterrupt):
            run_dataset(exported, data, out, rows=3)
    assert sorted(path.name for path in out.iterdir()) == ["part-000000.parquet", "part-000001.parquet"]
    before = (out / "part-000000.parquet").stat().st_mtime_ns
    told: list[str] = []
    done = run_dataset(exported, data, out, rows=3, progress=told.append)
    assert (done.rows, done.parts, done.ran) == (11, 5, 3)
    assert told[0] == "2 of 5 parts are there"
    assert (out / "part-000000.parquet").stat().st_mtime_ns == before
    assert _read(out)["name"].to_pylist() == [f"row {index}" for index in range(11)]
    assert run_dataset(exported, data, out, rows=3).ran == 0


def test_results_of_other_weights_stay(exported: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "exported")
    run_dataset(tmp_path / "exported", data, tmp_path / "out", rows=3)
    weights = tmp_path / "exported" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UsageError, match="those of another run"):
        run_dataset(tmp_path / "exported", data, tmp_path / "out", rows=3)


def test_the_model_is_not_opened_where_its_manifest_says_what_it_reads(
    exported: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that starts a run may lack the GPU of the workers."""
    started: list[str] = []

    def there(parts: Any, options: Any, address: str, *others: Any) -> Any:
        started.append(address)
        return iter(())

    monkeypatch.setattr(module, "_there", there)
    monkeypatch.setattr(module, "open_model", lambda *arguments: pytest.fail("opened"))
    with pytest.raises(UsageError, match=r"part-000000\.parquet is missing"):
        run_dataset(exported, data, tmp_path / "out", provider="cuda", ray="HOST:6379")
    assert started == ["HOST:6379"]


@pytest.mark.parametrize("change", ["rows", "data", "outputs", "foreign"])
def test_results_of_another_run_stay(change: str, exported: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_dataset(exported, data, out, rows=3)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    options: dict[str, Any] = {"rows": 3}
    if change == "rows":
        options = {"rows": 4}
    elif change == "data":
        pq.write_table(pa.table({"name": ["new"], "input_ids": [[1]]}), data / "b.parquet")
    elif change == "outputs":
        options["outputs"] = [json.loads((exported / "manifest.json").read_text())["outputs"][0]["name"]]
    else:
        (out / "_dataset.json").unlink()
        pq.write_table(pa.table({"x": [1]}), out / "part-000001.parquet")
        before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UsageError, match=r"another (run|file)"):
        run_dataset(exported, data, out, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"tokens": [[1, 2]]}, {}, r"expected the columns input_ids, got tokens.*--column INPUT=COLUMN"),
        ({"input_ids": [["a"]]}, {}, r"column input_ids: expected numbers, or lists of numbers, got string"),
        ({"input_ids": [[1], None]}, {}, r"column input_ids: expected a value everywhere, got none in row 1"),
        ({"input_ids": [[1], [2, None]]}, {}, r"column input_ids: expected a value everywhere, got none in row 1"),
        ({"input_ids": [[[1], []], []]}, {}, r"expected the lists of a row to have one length, got \[0\] and \[1\]"),
        ({"input_ids": [[[1]], []]}, {}, r"expected lists of lists with elements, got an empty one"),
        ({"input_ids": [[[1], [2, 3]]]}, {}, r"expected the lists of a row to have one length, got \[1\] and \[2\]"),
        ({"input_ids": [[[1], [2]]]}, {}, r"data\.parquet: row 0: .*rank 2"),
        ({"input_ids": [[1], [99]]}, {}, r"data\.parquet: row 0 and 1 more: .*"),
        ({"input_ids": [[1]]}, {"columns": {"ids": "input_ids"}}, r"columns: expected inputs of input_ids, got ids"),
        ({"input_ids": [[1]]}, {"outputs": ["logit"]}, r"outputs: expected some of .*, got logit"),
        ({"input_ids": [[1]]}, {"batch": 0}, r"batch: expected at least 1, got 0"),
        ({"input_ids": [[1]]}, {"rows": 0}, r"rows: expected at least 1, got 0"),
    ],
)
def test_what_does_not_fit(
    columns: dict[str, Any], options: dict[str, Any], message: str, exported: Path, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    with pytest.raises(UsageError, match=message):
        run_dataset(exported, tmp_path / "data.parquet", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_files_that_are_no_data_set(exported: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"expected files \.parquet in the folder, got none"):
        run_dataset(exported, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UsageError, match="expected a Parquet file, or a folder of them"):
        run_dataset(exported, tmp_path / "gone.parquet", tmp_path / "out")
    (data / "b.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(UsageError, match=r"b\.parquet: expected a Parquet file"):
        run_dataset(exported, data, tmp_path / "out")
    pq.write_table(pa.table({"input_ids": [[1]]}), data / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet: expected the columns of .*a\.parquet, got input_ids"):
        run_dataset(exported, data, tmp_path / "out")


def test_a_decoder_with_a_cache_is_refused(tmp_path: Path) -> None:
    from rmsnorm_deploy.runtime.dataset.run_part import problem_of_model, rows_at_once
    from rmsnorm_deploy.runtime.runners.base import TensorInfo

    ids = TensorInfo("input_ids", "int64", ("batch", "sequence"))
    cache = TensorInfo("past_key_values.0.key", "float32", ("batch", 2, "past_sequence", 8))
    assert problem_of_model([ids]) is None
    assert "without a cache" in str(problem_of_model([ids, cache]))
    fixed = TensorInfo("x", "float32", (4, 8))
    assert "x (always 4)" in str(problem_of_model([fixed]))
    assert rows_at_once([ids], 32) == 32
    assert rows_at_once([TensorInfo("x", "float32", (1, 8))], 32) == 1
