"""`rmsnorm run --dataset`."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmsnorm_deploy import export_model
from tests.helpers.interface.command_line import CommandLine
from tests.helpers.models.factory_file import small_model

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def test_the_command(rmsnorm: CommandLine, tmp_path: Path) -> None:
    exported, data = tmp_path / "exported", tmp_path / "data.parquet"
    export_model(small_model(tmp_path, "models"), exported, target="ort")
    pq.write_table(pa.table({"input_ids": [[1, 2]] * 11}), data)
    out = tmp_path / "out"
    done = rmsnorm("run", exported, "--dataset", data, "-o", out, "--rows", 4, "--json")
    assert done.code == 0
    assert {name: done.json[name] for name in ("schema", "rows", "parts", "ran")} == {
        "schema": "rmsnorm_deploy.dataset_run/1", "rows": 11, "parts": 3, "ran": 3,
    }  # fmt: skip
    again = rmsnorm("run", exported, "--dataset", data, "-o", out, "--rows", 4)
    assert "11 rows in 3 files; 0 run now, 3 were there" in again.out
    assert rmsnorm("run", exported, "-o", out).code == 2
    wrong = rmsnorm("run", exported, "--dataset", data, "-o", out, "--column", "ids", "--quiet")
    assert (wrong.code, "--column: expected INPUT=COLUMN, got 'ids'" in wrong.err) == (2, True)
    wrong = rmsnorm("run", exported, "--dataset", data, "-o", out, "--worker", "cores=3")
    assert (wrong.code, "--worker: expected some of cpus=N, gpus=N, memory=N" in wrong.err) == (2, True)
