from __future__ import annotations

from typing import Any

import numpy as np

from rmsnorm_deploy.export.graph.sizes import SizeLimits
from rmsnorm_deploy.runtime.inputs.cases import Case
from rmsnorm_deploy.runtime.inputs.derived import FACTORY_CASE, derived_cases, factory_case
from rmsnorm_deploy.runtime.runners.base import TensorInfo

INFOS = [
    TensorInfo("x", "float32", ("rows", "length", 4)),
    TensorInfo("labels", "int64", ("rows",)),
    TensorInfo("positions", "int64", ("length",)),
    TensorInfo("flags", "bool", ("rows",)),
    TensorInfo("mask", "float32", ("length",)),
    TensorInfo("fixed", "float32", (3,)),
]
RNG = np.random.default_rng(0)
GIVEN: dict[str, Any] = {
    "x": RNG.uniform(5, 7, (3, 6, 4)).astype(np.float32),
    "labels": np.array([9, 2, 5]),
    "positions": np.arange(6),
    "flags": np.array([True, False, True]),
    "mask": np.array([0, 0, 0, -np.inf, 0, 0], np.float32),
    "fixed": np.array([1, 2, 4], np.float32),
}


def first() -> Case:
    found = factory_case(INFOS, {**GIVEN, "other": np.ones(1)})
    assert isinstance(found, Case)
    return found


def test_the_factorys_inputs_come_first_as_they_are() -> None:
    plan = derived_cases(INFOS, first(), 0)
    case = plan.cases[0]
    assert (case.name, case.optional) == (FACTORY_CASE, False)
    assert all(np.array_equal(case.feeds[name], value) for name, value in GIVEN.items())
    assert all(other.optional for other in plan.cases[1:])


def test_inputs_that_are_not_the_files_are_said() -> None:
    found = factory_case(INFOS, {name: value for name, value in GIVEN.items() if name != "x"})
    assert isinstance(found, str)
    assert "missing: x" in found


def test_values_stay_in_the_range_of_the_given_ones() -> None:
    drawn = derived_cases(INFOS, first(), 0).cases[1].feeds
    assert not np.array_equal(drawn["x"], GIVEN["x"])
    assert (drawn["x"].min() >= GIVEN["x"].min(), drawn["x"].max() <= GIVEN["x"].max()) == (True, True)
    assert drawn["x"].dtype == np.float32
    assert set(range(2, 10)) >= set(drawn["labels"].tolist())
    for name in ("positions", "flags", "mask"):
        assert np.array_equal(drawn[name], GIVEN[name])


def test_only_dynamic_dims_have_other_sizes() -> None:
    plan = derived_cases(INFOS, first(), 0)
    shapes = {case.name.partition(" (")[0]: case.feeds["x"].shape for case in plan.cases}
    assert shapes["batch 1"] == (1, 6, 4)
    assert shapes["larger"] == (4, 7, 4)
    assert all(case.feeds["fixed"].shape == (3,) for case in plan.cases)
    for case in plan.cases:
        assert case.feeds["labels"].shape == case.feeds["x"].shape[:1]
        assert case.feeds["mask"].shape == case.feeds["x"].shape[1:2]


def test_sizes_outside_of_the_limits_are_not_tried() -> None:
    plan = derived_cases(INFOS, first(), 0, SizeLimits({"length": (6, 6), "rows": (1, None)}))
    assert {case.feeds["x"].shape[1] for case in plan.cases} == {6}
    assert any("of sizes for which the file was not exported" in text for text in plan.untried)


def test_a_file_of_fixed_shape_and_several_seeds() -> None:
    infos = [TensorInfo("x", "float32", (3, 6, 4))]
    case = Case(FACTORY_CASE, {"x": GIVEN["x"]})
    plan = derived_cases(infos, case, 0)
    assert [len(plan.cases), plan.untried[0]] == [4, "other shapes: all dims of the file are fixed"]
    thorough = derived_cases(infos, case, 0, thorough=True)
    assert [c.name for c in thorough.cases if "seed" in c.name] == [
        f"the factory's shapes with other values, seed {seed}" for seed in range(3)
    ]
