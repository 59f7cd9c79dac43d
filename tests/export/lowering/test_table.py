"""The lowering table: what it says, what it allows, what it refuses, and that every refusal says what to do."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest

from rmsnorm_deploy.export.graph.metadata import Form
from rmsnorm_deploy.export.lowering.table import (
    DEFAULT_OPSET,
    FORMS,
    HIGHEST_OPSET,
    LOWEST_OPSET,
    TABLE,
    TARGETS,
    Cell,
    Environment,
    LoweringRefusal,
    cell,
    deviations,
    opset_for,
    parse_target,
    parse_targets,
    resolve,
)
from rmsnorm_deploy.models.dtypes import HALF_DTYPES, NORM_DTYPES
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.models.spec import NormSpec, Order
from rmsnorm_deploy.plugins import contract
from tests.helpers.norms.norm_zoo import BARE, CAST_FIRST, MAMBA, NO_UPCAST, ONE_PLUS, SCALE_FIRST, TORCH, ZOO

OPSETS = (6, 7, 17, 18, 20, 22, 23, 24)
RUNTIMES = ("onnxruntime", "tensorrt", "tensorrt-rtx")
FACTOR = BARE.replace(order="cast_factor")


def refusal(spec: NormSpec, form: Form, target: str, environment: Environment) -> LoweringRefusal:
    found = resolve(spec, form, target, environment)
    assert isinstance(found, LoweringRefusal)
    assert found.reasons
    assert all(found.reasons)
    assert found.target == target
    return found


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_has_one_cell_for_each_target_and_form() -> None:
    assert [(row.target, row.form) for row in TABLE] == list(itertools.product(TARGETS, FORMS))
    for target, form in itertools.product(TARGETS, FORMS):
        assert (cell(target, form).target, cell(target, form).form) == (target, form)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.target}-{row.form}")
def test_every_cell_is_filled_in(row: Cell) -> None:
    assert row.emits
    assert row.note
    assert row.opset <= HIGHEST_OPSET
    assert set(row.dtypes) <= set(NORM_DTYPES)
    assert row.runtimes
    assert {name for name, _ in row.runtimes} <= set(RUNTIMES)
    for deviation in row.deviations:
        assert deviation.reason
        if deviation.order == "any":  # no matter of casts: a float64 eps in a float32 attribute
            assert deviation.dtypes == ("float64",)
        else:
            assert deviation.order in get_args(Order)
            assert set(deviation.dtypes) <= set(HALF_DTYPES)  # in float32 and float64 no cast can be in the wrong place
        assert deviation.runtime in ("any", *RUNTIMES)
        assert deviation.ulp is None or 0.5 <= deviation.ulp <= 2
    orders = [deviation.order for deviation in row.deviations]
    assert len(set(orders)) == len(orders)
    assert "scale_then_cast" not in orders  # the order of F.rms_norm is the one that every target has


def test_both_forms_of_a_target_need_the_same() -> None:
    for target in TARGETS:
        plain, add = (cell(target, form) for form in FORMS)
        assert (plain.opset, plain.dtypes, plain.runtimes) == (add.opset, add.dtypes, add.runtimes)
        assert plain.deviations == add.deviations


def test_the_plugin_cells_name_the_operators_of_the_contract() -> None:
    assert cell("plugin", "plain").emits == f"{contract.DOMAIN}::{contract.RMS_NORM}"
    assert cell("plugin", "residual_add").emits == f"{contract.DOMAIN}::{contract.ADD_RMS_NORM}"
    assert cell("plugin", "plain").dtypes == contract.DTYPES


def test_opsets_and_dtypes_of_the_targets() -> None:
    assert {target: cell(target, "plain").opset for target in TARGETS} == {
        "primitives": 7, "standard": 23, "ort": 7, "plugin": 18,
    }  # fmt: skip
    for target in ("primitives", "standard", "ort"):
        assert set(cell(target, "plain").dtypes) == set(NORM_DTYPES)
    assert "float64" not in cell("plugin", "plain").dtypes


def test_only_ort_is_not_for_tensorrt() -> None:
    assert {target for target in TARGETS if "tensorrt" not in dict(cell(target, "plain").runtimes)} == {"ort"}
    assert all({"onnxruntime", "tensorrt-rtx"} <= set(dict(cell(target, "plain").runtimes)) for target in TARGETS)


# resolve --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_every_spec_resolves_or_is_refused_with_a_reason_and_the_nearest_choice(name: str) -> None:
    spec = ZOO[name].spec
    for target, form, dtype, opset in itertools.product(TARGETS, FORMS, NORM_DTYPES, (*OPSETS, None)):
        found = resolve(spec, form, target, Environment(opset=opset, dtype=dtype))
        too_low = opset is not None and opset < {"standard": 23, "plugin": 18}.get(target, 7)
        if too_low or (target == "plugin" and dtype == "float64"):
            assert isinstance(found, LoweringRefusal)
            assert len(found.reasons) >= too_low + (target == "plugin" and dtype == "float64")
            expected = None if opset is not None and opset < 7 else "primitives"
            assert found.nearest == expected
            if expected is not None:
                again = resolve(spec, form, expected, Environment(opset=opset, dtype=dtype))
                assert again is cell(expected, form)
        else:
            assert found is cell(target, form)


def test_refusals_say_which_dtype_which_opset_and_which_place() -> None:
    found = refusal(TORCH, "plain", "plugin", Environment(opset=17, dtype="float64", top_level=False))
    assert found.reasons == (
        "rmsnorm_deploy::RMSNorm does not support float64 (it supports float32, float16, bfloat16)",
        "rmsnorm_deploy::RMSNorm requires opset 18, and the file has opset 17",
        "TensorRT finds plugins in the main graph only, and this norm is in a control-flow subgraph",
        "the plugin's statistics are float32",
    )
    assert found.nearest == "primitives"
    assert refusal(TORCH, "residual_add", "standard", Environment(opset=22)).reasons == (
        "Add, RMSNormalization requires opset 23, and the file has opset 22",
    )


@pytest.mark.parametrize(("target", "form"), itertools.product(TARGETS, FORMS))
def test_only_the_plugin_must_stand_at_the_top_level(target: str, form: Form) -> None:
    found = resolve(CAST_FIRST, form, target, Environment(top_level=False))
    if target != "plugin":
        assert found is cell(target, form)
        return
    assert isinstance(found, LoweringRefusal)
    assert found.nearest == "primitives"
    assert "control-flow subgraph" in found.reasons[0]


@pytest.mark.parametrize(
    ("target", "runtime", "version", "allowed"),
    [
        ("primitives", "onnxruntime", "1.23", True),
        ("primitives", "onnxruntime", "1.22.9", False),
        ("primitives", "tensorrt", "10.7.0.23", True),
        ("primitives", "tensorrt", "10.6.0", False),
        ("standard", "onnxruntime", "1.32.0", True),
        ("standard", "onnxruntime", "1.9.0", False),
        ("standard", "tensorrt", "10.15.1.29", True),
        ("standard", "tensorrt", "10.14", False),
        ("standard", "tensorrt", "11.0", True),
        ("standard", "tensorrt", None, True),
        ("ort", "onnxruntime", "1.23.2", True),
        ("ort", "onnxruntime", "1.23.0rc1", True),
        ("ort", "onnxruntime", "1.100.0", True),
        ("ort", "tensorrt", "10.15", False),
        ("ort", "tensorrt", None, False),
        ("plugin", "tensorrt", "10.7", True),
        ("plugin", "tensorrt", "10", False),
        ("plugin", "onnxruntime", "2.0", True),
        ("ort", "tensorrt-rtx", "1.7.1.116", True),
        ("plugin", "tensorrt-rtx", "1.4", False),
        ("plugin", "openvino", "2026.1", False),
    ],
)
def test_the_runtime_and_its_version(target: str, runtime: str, version: str | None, allowed: bool) -> None:
    environment = Environment(runtime=runtime, runtime_version=version)
    if allowed:
        assert resolve(CAST_FIRST, "plain", target, environment) is cell(target, "plain")
        return
    (reason,) = refusal(CAST_FIRST, "plain", target, environment).reasons
    assert runtime in reason
    assert cell(target, "plain").emits in reason
    if version is not None and runtime in dict(cell(target, "plain").runtimes):
        assert reason.endswith(f"and this is {version}")


def test_a_runtime_that_no_target_is_for_has_no_nearest_choice() -> None:
    found = refusal(CAST_FIRST, "plain", "primitives", Environment(runtime="openvino"))
    assert found.nearest is None
    assert "Use --target" not in str(found.to_error())


def test_the_nearest_choice_for_tensorrt_is_one_that_it_runs() -> None:
    found = refusal(CAST_FIRST, "plain", "ort", Environment(runtime="tensorrt", runtime_version="10.7"))
    assert found.nearest == "primitives"


def test_a_refusal_as_an_error_names_target_reasons_and_choice() -> None:
    error = LoweringRefusal("plugin", ("one", "two"), "standard").to_error()
    assert isinstance(error, UnsupportedError)
    assert error.exit_code == 3
    assert str(error) == "target 'plugin' cannot be used: one; two. Use --target standard instead."
    assert str(LoweringRefusal("ort", ("one",), None).to_error()) == "target 'ort' cannot be used: one."


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", ""])
def test_a_dtype_that_no_target_has(dtype: str) -> None:
    for target in TARGETS:
        assert refusal(CAST_FIRST, "plain", target, Environment(dtype=dtype)).nearest is None


@pytest.mark.parametrize("target", ["tflite", "", "Plugin"])
def test_an_unknown_target_is_an_error_that_names_the_known(target: str) -> None:
    for call in (
        lambda: cell(target, "plain"),
        lambda: resolve(CAST_FIRST, "plain", target, Environment()),
        lambda: opset_for(target, None),
    ):
        with pytest.raises(UsageError, match="expected one of primitives, standard, ort, plugin, got") as raised:
            call()
        assert raised.value.exit_code == 2


# opset_for ------------------------------------------------------------------------------------------------------------


def test_opset_defaults() -> None:
    assert {target: opset_for(target, None) for target in TARGETS} == {
        "primitives": 20, "standard": 23, "ort": 20, "plugin": 20,
    }  # fmt: skip
    assert LOWEST_OPSET <= DEFAULT_OPSET <= HIGHEST_OPSET


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("opset", range(15, 27))
def test_every_opset_is_taken_or_refused(target: str, opset: int) -> None:
    if 18 <= opset <= 23 and (target != "standard" or opset == 23):
        assert opset_for(target, opset) == opset
        return
    with pytest.raises(UnsupportedError, match=rf"got (opset )?{opset}\b") as raised:
        opset_for(target, opset)
    assert raised.value.exit_code == 3
    if 18 <= opset <= 23:
        assert "requires opset 23" in str(raised.value)
        assert "--target primitives" in str(raised.value)
    else:
        assert "expected 18 to 23, got" in str(raised.value)


# deviations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_a_deviation_is_stated_exactly_where_the_roundings_differ(name: str) -> None:
    spec = ZOO[name].spec
    differs = spec.order in ("no_upcast", "cast_factor") or (spec.order == "cast_then_scale" and spec.has_weight)
    for target, dtype in itertools.product(TARGETS, NORM_DTYPES):
        found = [deviation.order for deviation in deviations(cell(target, "plain"), spec, dtype)]
        rounded = float(np.float32(spec.eps)) != spec.eps and spec.statistics != "float32"
        if dtype == "float64" and target in ("standard", "ort"):
            assert found == ["any"] * rounded
        else:
            assert found == [spec.order] * (differs and dtype in HALF_DTYPES)


@pytest.mark.parametrize(
    ("target", "spec", "runtime", "ulp"),
    [
        ("primitives", CAST_FIRST, None, [1.5]),
        ("primitives", CAST_FIRST, "onnxruntime", [1.5]),
        ("primitives", CAST_FIRST, "tensorrt", []),
        ("plugin", CAST_FIRST, "tensorrt", []),
        ("plugin", MAMBA, "onnxruntime", [1.5]),
        ("primitives", FACTOR, "tensorrt", []),
        ("primitives", FACTOR, "onnxruntime", [1.5]),
        ("standard", FACTOR, "tensorrt", [1.5]),
        ("plugin", NO_UPCAST, "tensorrt", [None]),
        # A second rounding hands the error of the first on, a bias may cancel all but the error.
        ("plugin", CAST_FIRST.replace(gate="after", activation="silu"), "onnxruntime", [3.0]),
        ("ort", FACTOR.replace(scale="weight"), None, [3.0]),
        ("ort", CAST_FIRST.replace(bias=True), None, [None]),
        ("ort", SCALE_FIRST, None, []),
        ("ort", ONE_PLUS, "onnxruntime", []),
        ("ort", CAST_FIRST.replace(scale="none"), None, []),
    ],
)
def test_deviations_show_in_the_runtimes_that_have_them(
    target: str, spec: NormSpec, runtime: str | None, ulp: list[float | None]
) -> None:
    for form in FORMS:
        assert [d.ulp for d in deviations(cell(target, form), spec, "float16", runtime)] == ulp
        assert deviations(cell(target, form), spec, "float32", runtime) == []


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ("ORT", ["ort"]),
        ("ort,standard", ["ort", "standard"]),
        (["ort, Plugin", "ort"], ["ort", "plugin"]),
        ([" primitives "], ["primitives"]),
    ],
)
def test_targets_are_read_in_any_case_and_as_lists(given: str | list[str], targets: list[str]) -> None:
    assert parse_targets(given) == targets


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("TensorRT", "standard (from 10.15, which fuses these norms by itself), plugin"),
        ("trt", "standard (from 10.15, which fuses these norms by itself), plugin"),
        ("onnxruntime", "For ONNX Runtime: ort"),
        ("onnx", "opset 23: standard"),
        ("cuda", "not a device. For ONNX Runtime on CUDA: ort"),
    ],
)
def test_the_name_of_a_runtime_is_answered_with_the_target_that_fits(name: str, fits: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_targets(f"ort,{name}")
    known = f"target: expected one of primitives, standard, ort, plugin, got {name!r}. "
    assert str(raised.value).startswith(known)
    assert fits in str(raised.value)


def test_one_target_is_one() -> None:
    assert parse_target("Ort") == "ort"
    with pytest.raises(UsageError, match=r"expected one of primitives, .*, got 2: ort, plugin\."):
        parse_target("ort,plugin")
    with pytest.raises(UsageError, match=r"target is empty; expected one or several of primitives"):
        parse_targets(" , ")
