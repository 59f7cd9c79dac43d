"""The table of dtypes against the libraries, and every place that must handle each of them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Collection
from typing import get_args

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from rmsnorm_deploy.export.graph import constants
from rmsnorm_deploy.export.lowering import steps
from rmsnorm_deploy.export.lowering.builder import Builder, promote
from rmsnorm_deploy.export.lowering.table import TABLE as CELLS
from rmsnorm_deploy.export.lowering.table import Environment, LoweringRefusal, resolve
from rmsnorm_deploy.models.dtypes import (
    BYTES,
    DTYPES,
    HALF_DTYPES,
    NORM_DTYPES,
    ONNX_NUMBERS,
    TABLE,
    Dtype,
    dtype_named,
    norm_dtype,
    numpy_dtype,
    onnx_dtype,
    onnx_name,
    torch_dtype,
    torch_name,
)
from rmsnorm_deploy.models.eager import statistics_dtype
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.plugins.kernel import macros, norm_kernel
from rmsnorm_deploy.runtime.accuracy.float_formats import FORMATS
from rmsnorm_deploy.runtime.accuracy.tolerances import TOLERANCES
from rmsnorm_deploy.runtime.inputs import arrays
from rmsnorm_deploy.runtime.norms import check_norm
from rmsnorm_deploy.runtime.report import printed
from rmsnorm_deploy.runtime.risk.observe import DTYPES as RISK_DTYPES
from rmsnorm_deploy.runtime.risk.rules import ERROR_LIMITS
from rmsnorm_deploy.runtime.runners import onnxruntime as ort_runner

FLOAT = NormSpec(eps=1e-6)
PROMOTED = FLOAT.replace(statistics="promoted")
IN_HALF = FLOAT.replace(statistics="input", order="no_upcast")
INVENTED = "float128"


def test_importing_the_table_imports_no_library() -> None:
    heavy = ("torch", "onnx", "onnx_ir", "numpy", "ml_dtypes")
    code = f"import sys, rmsnorm_deploy.models.dtypes; print([m for m in {heavy!r} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"


# The libraries --------------------------------------------------------------------------------------------------------


def test_each_name_number_and_library_name_stands_once() -> None:
    for values in zip(*((d.name, d.library_name, d.onnx_name, d.onnx_number) for d in TABLE), strict=True):
        assert len(set(values)) == len(TABLE), values


@pytest.mark.parametrize("name", DTYPES)
def test_the_libraries_agree_with_the_table(name: str) -> None:
    row = dtype_named(name)
    assert str(torch_dtype(name)) == f"torch.{row.library_name}"
    assert torch_dtype(name).itemsize == numpy_dtype(name).itemsize == onnx_dtype(name).itemsize == row.bytes
    assert torch_dtype(name).is_floating_point == (name != "int8")
    assert numpy_dtype(name).name == row.library_name
    assert onnx_dtype(name).name == row.onnx_name
    assert onnx_dtype(name).numpy() == numpy_dtype(name)
    assert onnx.TensorProto.DataType.Value(row.onnx_name) == int(onnx_dtype(name)) == row.onnx_number
    assert onnx.helper.np_dtype_to_tensor_dtype(numpy_dtype(name)) == row.onnx_number
    assert (BYTES[name], ONNX_NUMBERS[name]) == (row.bytes, row.onnx_number)


@pytest.mark.parametrize("name", DTYPES)
def test_names_come_back(name: str) -> None:
    assert torch_name(torch_dtype(name)) == onnx_name(onnx_dtype(name)) == name


def test_norms_and_halves() -> None:
    assert NORM_DTYPES == ("float32", "float16", "bfloat16", "float64")
    assert HALF_DTYPES == ("float16", "bfloat16")
    assert all(ml_dtypes.finfo(numpy_dtype(name)).bits == 16 for name in HALF_DTYPES)


def test_dtypes_beyond_the_table_have_the_names_of_their_libraries() -> None:
    assert (torch_name(torch.int64), torch_name(torch.bool)) == ("int64", "bool")
    assert (onnx_name(ir.DataType.INT64), onnx_name(ir.DataType.BOOL)) == ("int64", "bool")
    assert (numpy_dtype("int64"), numpy_dtype("bool")) == (np.dtype(np.int64), np.dtype(np.bool_))


@pytest.mark.parametrize("function", [dtype_named, torch_dtype, numpy_dtype, onnx_dtype])
@pytest.mark.parametrize("name", ["float8", "finfo", "torch.float32", ""])
def test_an_unknown_name_is_refused(function: object, name: str) -> None:
    assert callable(function)
    with pytest.raises(UsageError, match=r"dtype: expected one of float32, float16, .*, got "):
        function(name)


# Places ---------------------------------------------------------------------------------------------------------------

_NO_WIDE_KERNEL = {"float64": "the kernel's statistics are float32"}
_NOT_DEPLOYED = {"float64": "a norm is at risk only in what is narrower than the truth"}
# The names that each place has, and those that it leaves out, with the reason.
PLACES: dict[str, tuple[Collection[str], dict[str, str]]] = {
    **{
        f"export.lowering.table, {row.target} {row.form}": (
            row.dtypes,
            _NO_WIDE_KERNEL if row.target == "plugin" else {},
        )
        for row in CELLS
    },
    "export.graph.constants.is_floating": (
        [name for name in DTYPES if constants.is_floating(onnx_dtype(name))],
        {},
    ),
    "plugins.contract.DTYPES": (contract.DTYPES, _NO_WIDE_KERNEL),
    "plugins.contract.ONNX_TYPES": (contract.ONNX_TYPES, _NO_WIDE_KERNEL),
    "plugins.kernel.norm_kernel.Dtype": (get_args(norm_kernel.Dtype), _NO_WIDE_KERNEL),
    "plugins.kernel.macros.FORMATS": (macros.FORMATS, _NO_WIDE_KERNEL),
    "runtime.accuracy.float_formats.FORMATS": (FORMATS, {}),
    "runtime.accuracy.tolerances.TOLERANCES": (TOLERANCES, {}),
    "runtime.norms.check_norm._SOUND": (check_norm._SOUND, {}),
    "runtime.runners.onnxruntime._DTYPES": (ort_runner._DTYPES.values(), {}),
    "runtime.inputs.arrays._DTYPES": (arrays._DTYPES.values(), {}),
    "runtime.risk.observe.DTYPES": (RISK_DTYPES, _NOT_DEPLOYED),
    "runtime.risk.rules.ERROR_LIMITS": (ERROR_LIMITS, _NOT_DEPLOYED),
    "runtime.report.printed._DTYPES": (printed._DTYPES, _NOT_DEPLOYED),
}


def problems(place: str, wanted: Collection[str]) -> list[str]:
    """The dtypes that a place neither handles nor leaves out for a reason, or does both."""
    handled, left_out = PLACES[place]
    missing = [f"{place} does not handle {name}" for name in wanted if name not in handled and name not in left_out]
    return [*missing, *(f"{place} leaves out {name}, and handles it" for name in left_out if name in handled)]


@pytest.mark.parametrize("place", PLACES)
def test_every_place_handles_every_dtype(place: str) -> None:
    assert problems(place, NORM_DTYPES) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_new_dtype_would_be_missed_by_name(place: str) -> None:
    assert problems(place, (*NORM_DTYPES, INVENTED)) == [f"{place} does not handle {INVENTED}"]


def test_quantized_outputs_are_the_tables_other_dtypes() -> None:
    others = {name for name in DTYPES if name not in NORM_DTYPES}
    assert set(contract.QUANT_TYPES) == set(get_args(norm_kernel.Quantized)) - {"none"} == others
    assert others <= set(macros.FORMATS)
    assert {**contract.ONNX_TYPES, **contract.QUANT_TYPES}.items() <= ONNX_NUMBERS.items()


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_those_of_the_dtypes(name: str) -> None:
    finfo = ml_dtypes.finfo(numpy_dtype(name))
    assert (FORMATS[name].eps, FORMATS[name].largest) == (float(finfo.eps), float(finfo.max))


@pytest.mark.parametrize(("a", "b"), itertools.product(NORM_DTYPES, repeat=2))
def test_dtypes_are_promoted_in_the_graph_as_in_pytorch(a: str, b: str) -> None:
    wide = torch.promote_types(torch_dtype(a), torch_dtype(b))
    assert onnx_name(promote(onnx_dtype(a), onnx_dtype(b))) == torch_name(wide), (a, b)


@pytest.mark.parametrize("spec", [FLOAT, PROMOTED, IN_HALF], ids=lambda spec: spec.statistics)
@pytest.mark.parametrize("name", NORM_DTYPES)
def test_statistics_in_the_graph_are_the_modules_but_never_half(name: str, spec: NormSpec) -> None:
    own = torch_name(statistics_dtype(spec, torch_dtype(name)))
    expected = "float32" if own in HALF_DTYPES else own
    assert onnx_name(steps.statistics_type(spec, onnx_dtype(name))) == expected


@pytest.mark.parametrize("target", ["primitives", "standard", "ort", "plugin"])
@pytest.mark.parametrize("name", [name for name in DTYPES if name not in NORM_DTYPES])
def test_a_dtype_without_norms_is_refused_by_name(name: str, target: str) -> None:
    refusal = resolve(FLOAT, "plain", target, Environment(dtype=name))
    assert isinstance(refusal, LoweringRefusal)
    assert f"does not support {name}" in refusal.reasons[0]
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="main")
    x = ir.Value(name="x", shape=ir.Shape((2, 8)), type=ir.TensorType(onnx_dtype(name)))
    with pytest.raises(UnsupportedError, match=f"norm 'n': expected an input of float32, .*, got {name}. Cast it"):
        steps.emit(
            Builder(graph, graph, {}, {}, 23), FLOAT, steps.NormInputs(x, None, None, None), target, "n"
        )  # fmt: skip
    with pytest.raises(UsageError, match=f"a kernel's dtype is '{name}'"):
        norm_kernel.NormKernel(64, 1e-6, dtype=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", [row for row in TABLE if row.has_norms], ids=lambda row: row.name)
def test_every_alias_of_a_dtype_is_read(row: Dtype) -> None:
    for text in (row.name, *row.aliases, row.name.upper(), f"torch.{row.name}"):
        assert norm_dtype(text) == row.name
    assert norm_dtype(torch_dtype(row.name)) == row.name


@pytest.mark.parametrize("name", ["int8", "fp8", "", "float128"])
def test_a_dtype_without_norms_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^dtype: expected one of float32, float16, bfloat16, float64, got '"):
        norm_dtype(name)
