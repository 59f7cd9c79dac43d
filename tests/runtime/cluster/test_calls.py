"""Calls on a real cluster of Ray with two cores: lost workers, errors, and work of the recipe and of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy import export_model, run_dataset, ship
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.runtime.cluster.calls import Call, Needs, run_calls
from tests.helpers.models.factory_file import small_model
from tests.helpers.runtime import remote_calls as remote

RECIPE = """
[defaults]
targets = ["ort"]
validate = false

[[model]]
name = "first"
source = "models.py:net"

[[model]]
name = "second"
source = "models.py:gone"

[[model]]
name = "third"
source = "models.py:net"
package = ["triton"]
"""


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    module = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # A short path: Ray's sockets stand in its folder.
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        module.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        yield module
        module.shutdown()


def test_a_lost_worker_is_replaced_and_an_error_is_not(ray: Any, tmp_path: Path) -> None:
    told: list[str] = []
    calls = [
        Call("sum", remote.add, (2, 3)),
        Call("once", remote.die_once, (str(tmp_path / "once"),)),
        Call("never", remote.die, ()),
        Call("wrong", remote.refuse, (str(tmp_path / "wrong"),)),
    ]
    found = {outcome.call.name: outcome for outcome in run_calls(ray, calls, attempts=2, progress=told.append)}
    assert (found["sum"].value, found["once"].value) == (5, 2)
    assert isinstance(found["never"].error, EnvironmentMissingError)
    assert "its worker was lost 2 times" in str(found["never"].error)
    assert type(found["wrong"].error) is UsageError
    assert str(found["wrong"].error) == "expected something else, got this."
    assert (tmp_path / "wrong").read_text() == "x"
    assert sorted(line.split(":")[0] for line in told) == ["never", "once"]
    assert all("attempt 2 of 2" in line for line in told)


def test_rows_are_shipped_side_by_side(ray: Any, tmp_path: Path) -> None:
    (tmp_path / "rmsnorm.toml").write_text(RECIPE)
    Path(small_model(tmp_path, "models").partition(":")[0]).stat()
    told: list[str] = []
    done = ship(tmp_path / "rmsnorm.toml", ray="local", progress=told.append)
    assert {row["row"]: row["status"] for row in done.rows} == {"first": "done", "second": "failed", "third": "done"}
    assert [row["row"] for row in done.rows] == ["first", "second", "third"]
    assert "gone" in done.rows[1]["steps"][0]["error"]["message"]
    assert done.exit_code == 2
    assert told[0].startswith("3 rows on 1 nodes with 2 CPUs")
    summary = json.loads((tmp_path / "dist" / "summary.json").read_text())
    assert [row["status"] for row in summary["rows"]] == ["done", "failed", "done"]
    again = ship(tmp_path / "rmsnorm.toml", ray="local", only=["first", "third"])
    assert [row["status"] for row in again.rows] == ["unchanged", "unchanged"]
    assert not list((tmp_path / "dist").glob(".rmsnorm-shared-*"))


def test_a_data_set_on_workers_has_the_rows_of_one_process(ray: Any, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    export_model(small_model(tmp_path, "models"), tmp_path / "exported", target="ort")
    rows = np.random.default_rng(0).integers(0, 12, (25, 6))
    pq.write_table(pa.table({"id": list(range(25)), "input_ids": rows.tolist()}), tmp_path / "data.parquet")
    told: list[str] = []
    there = run_dataset(
        tmp_path / "exported", tmp_path / "data.parquet", tmp_path / "there", rows=8, ray="local", progress=told.append
    )
    here = run_dataset(tmp_path / "exported", tmp_path / "data.parquet", tmp_path / "here", rows=8)
    assert (there.rows, there.parts, there.ran) == (here.rows, here.parts, here.ran) == (25, 4, 4)
    assert any("4 parts on 2 workers" in line for line in told)
    found, expected = pq.read_table(tmp_path / "there"), pq.read_table(tmp_path / "here")
    assert found.equals(expected)
    assert found["id"].to_pylist() == list(range(25))
    pq.write_table(pa.table({"input_ids": [[1, 2], [3, 99]]}), tmp_path / "data.parquet")
    with pytest.raises(UsageError, match=r"data\.parquet: row 0 and 1 more: "):
        run_dataset(tmp_path / "exported", tmp_path / "data.parquet", tmp_path / "wrong", ray="local")
    assert list((tmp_path / "wrong").iterdir()) == []


def test_what_no_node_can_do(ray: Any, tmp_path: Path) -> None:
    told: list[str] = []
    calls = [Call("sum", remote.add, (2, 3)), Call("large", remote.add, (2, 3), Needs(cpus=64, memory=1))]
    found = {outcome.call.name: outcome for outcome in run_calls(ray, calls, patience=0, progress=told.append)}
    assert found["sum"].value == 5
    expected = "expected a node with 64 CPUs, 1 GB, got none: the largest have 2 CPUs, "
    assert str(found["large"].error).startswith(expected)
    assert told[0].startswith(f"large: {expected}")
    assert Needs(cpus=2).copies({"CPU": 5.0}) == 2
    assert not Needs(gpus=1).fits({"CPU": 5.0})
    assert Needs(cpus=0.5, memory=1).copies({"CPU": 2.0, "memory": 3e9}) == 3
    assert str(Needs(cpus=2, gpus=0.5, memory=4)) == "2 CPUs, 0.5 GPUs, 4 GB"
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    export_model(small_model(tmp_path, "models"), tmp_path / "exported", target="ort")
    pq.write_table(pa.table({"input_ids": [[1, 2]]}), tmp_path / "data.parquet")
    with pytest.raises(UsageError, match=r"expected a node with 1 CPUs, 3 GPUs, got a cluster of local without"):
        run_dataset(tmp_path / "exported", tmp_path / "data.parquet", tmp_path / "o", ray="local", needs=Needs(gpus=3))
