"""The mutation suite on small models: `validate` catches every planted fault and lets every honest export pass.

`python -m benchmarks.mutations` does the same on more models and dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.mutations import (
    catalog,
    faults,
    honest,
    judging,
    norm_faults,
    plants,
    run,
    segment_faults,
    subjects,
    writers,
)
from rmsnorm_deploy.runtime.norms.graph_norms import GraphNorms

EVERY = [fault for faults in catalog.FAMILIES.values() for fault in faults]
FAST = [fault for fault in EVERY if fault.model in ("addition", "assorted") and fault.dtype == "float32"]
HONEST = [
    *(honest.HonestRun(subjects.Subject(model), target, 0) for model in ("addition", "assorted")
      for target in subjects.TARGETS),
    *(honest.HonestRun(subjects.Subject(model), target, 1, respelled=True) for model in ("addition", "assorted")
      for target in ("primitives", "plugin")),
]  # fmt: skip


def _id(item: Any) -> str:
    what = item.name if hasattr(item, "name") else "respelled" if item.respelled else "honest"
    return f"{what}-{item.subject.label}-{item.target}-{item.subject.dtype}"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models are slower on more
    yield subjects.Exports(tmp_path_factory.mktemp("mutations"))
    torch.set_num_threads(threads)


def test_the_suite_has_faults_of_every_target_and_dtype() -> None:
    assert len(EVERY) >= 200
    assert len(catalog.FAMILIES) >= 20
    assert min(len(faults) for faults in catalog.FAMILIES.values()) >= 6
    assert len({_id(fault) for fault in EVERY}) == len(EVERY)
    assert all(fault.family == family for family, faults in catalog.FAMILIES.items() for fault in faults)
    assert {fault.target for fault in EVERY} == set(subjects.TARGETS)
    assert {fault.dtype for fault in EVERY} == {"float32", "float16"}
    for kind in (norm_faults.NORM_FAULTS, segment_faults.SEGMENT_FAULTS):
        assert all(bool(fault.norms) != bool(fault.before) for faults in kind.values() for fault in faults)


@pytest.mark.parametrize("writer", ["ORT extended", "values renamed", "nodes unsorted"])
def test_a_file_that_another_tool_wrote_anew_passes(writer: str, exports: Any) -> None:
    result = honest.run_honest(honest.HonestRun(subjects.Subject("addition"), "standard", 0, writer=writer), exports)
    assert result.passed, (result.summary, *result.reasons)


@pytest.mark.parametrize("fault", FAST, ids=_id)
def test_a_fault_is_alive_caught_and_found(fault: Any, exports: Any) -> None:
    result = judging.judge_fault(fault, exports)
    assert result.alive != "dead"
    assert result.verdict in ("fail", "error"), result.summary
    assert result.named, f"wanted {result.wanted}, named {result.culprits}"
    assert len(result.innocents) <= judging.INNOCENTS_ALLOWED, result.innocents


@pytest.mark.parametrize("honest_run", HONEST, ids=_id)
def test_an_honest_export_passes(honest_run: Any, exports: Any) -> None:
    result = honest.run_honest(honest_run, exports)
    assert result.passed, (result.summary, *result.reasons)


def test_the_types_that_a_float16_file_does_not_state_are_inferred(exports: Any, tmp_path: Path) -> None:
    """Else its norms would run alone in float32, and fail."""
    folder = exports.folder(subjects.Subject("llama", "float16"), "plugin")
    writers.WRITERS["values renamed"](folder / "model.onnx", tmp_path / "model.onnx")
    graph = GraphNorms(tmp_path / "model.onnx")
    assert len(graph.norms) == 5
    assert {graph.dtype(name) for norm in graph.norms.values() for name in (norm.x, norm.y)} == {"float16"}


def test_an_edit_that_changes_nothing_is_dead(exports: Any) -> None:
    nothing = faults.Fault("nothing", "addition", "ort", lambda edit: None, norms=("norm",))
    result = judging.judge_fault(nothing, exports)
    assert (result.alive, result.verdict, result.caught, result.good) == ("dead", "pass", False, False)


def test_a_fault_of_tiny_rows_only_is_alive_in_its_norm(exports: Any, tmp_path: Path) -> None:
    """The addition model's last norm gets no row that an epsilon of 1.0001e-6 changes by a bit of float32."""
    fault = faults.Fault(
        "eps a little larger", "addition", "ort", plants.eps("norm", lambda e: 1.0001 * e), norms=("norm",)
    )
    folder = fault.write(exports.folder(fault.subject, "ort"), tmp_path / "faulty")
    assert judging.aliveness(fault, exports, folder) == "norm"


def test_honest_runs_have_the_requested_number_and_differ() -> None:
    runs = honest.honest_runs(400)
    assert len(set(runs)) == 400
    assert {r.writer for r in runs} == {"", *writers.WRITERS}
    assert {r.subject.variant for r in runs} == {"plain", "past", "outliers", "redrawn"}
    assert {(r.subject.dtype, r.target) for r in runs} == {(d, t) for d in honest.DTYPES for t in subjects.TARGETS}


def test_the_last_lines_count_what_was_missed() -> None:
    common = {"model": "m", "target": "ort", "dtype": "float32", "summary": "s", "culprits": (), "seconds": 0.0}
    caught = judging.FaultResult("a", alive="outputs", verdict="fail", wanted=("n",), kind="norm", named=True,
                                 innocents=(), **common)  # fmt: skip
    missed = judging.FaultResult("b", alive="norm", verdict="pass", wanted=("n",), kind="norm", named=False,
                                 innocents=(), **common)  # fmt: skip
    alarm = honest.HonestResult("m", "float32", "ort", 0, False, "s")
    passed = honest.HonestResult("m", "float32", "ort", 1, True, "s")
    assert run.totals([caught, missed], [alarm, passed, passed]) == [
        "caught 1 of 2 faults; bisect named the norm or attention in 1 of 2",
        "false alarms: 1 of 3 honest runs",
    ]
    assert [caught.good, missed.good] == [True, False]
