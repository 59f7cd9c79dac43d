"""The test cases of the ONNX standard: its norms are found in every form, nothing else is, and the results stay."""

from __future__ import annotations

import re
import warnings
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from rmsnorm_deploy.export.from_onnx.rewrite import rewrite
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms

NORM = "test_rms_normalization_"
NORMALIZATIONS = re.compile("test_(rms|layer|group|l1|l2|lp)_?normalization|test_(batchnorm|instancenorm|lrn|mvn)(_|$)")


@cache
def cases() -> dict[str, Any]:
    """Every normalization case of the standard, by name."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # computing the cases of other operators divides by zero
        return {case.name: case for case in collect_testcases(None) if NORMALIZATIONS.match(case.name)}


def dims_normalized(name: str) -> int:
    """The number of trailing dims, from a case's name."""
    found = re.search(r"_(\d)d_axis(_negative_)?_?(\d)", name)
    if found is None:
        return 1
    return int(found[3]) if found[2] else int(found[1]) - int(found[3])


def outputs(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The results in ONNX Runtime; where it lacks an operator, in ONNX's reference implementation."""
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        return list(ReferenceEvaluator(model).run(None, feeds))
    return list(session.run(None, feeds))


def test_the_norms_of_the_standard_are_found_as_operators_and_as_functions_and_nothing_else_is() -> None:
    found = {name: find_graph_norms(ir.from_proto(case.model)) for name, case in cases().items()}
    norms = {name for name in found if name.startswith(NORM)}
    expanded = {name for name in norms if name.endswith("_expanded")}
    assert (len(norms - expanded), len(expanded), len(found) - len(norms)) == (19, 19, 78)
    assert {name: len(row.sites) for name, row in found.items() if len(row.sites) != (name in norms)} == {}
    for name in norms:
        spec = found[name].sites[0].spec
        wanted = (dims_normalized(name), "weight", 0.1 if "epsilon" in name else 1e-5)
        assert (spec.trailing_dims, spec.scale, spec.eps) == wanted, name


@pytest.mark.parametrize("target", TARGETS)
def test_the_rewritten_norms_of_the_standard_give_its_results(target: str) -> None:
    changed = 0
    for name, case in cases().items():
        if not name.startswith(NORM):
            continue
        rewritten = rewrite(ir.from_proto(case.model), target)
        assert rewritten.refusals == [], name
        changed += rewritten.changed
        # What only computed the axes goes with the norm.
        assert not {"Shape", "Size", "Range"} & {node.op_type for node in rewritten.model.graph}, name
        model = ir.to_proto(rewritten.model)
        for given, wanted in case.data_sets:
            feeds = {value.name: array for value, array in zip(model.graph.input, given, strict=True)}
            for result, right in zip(outputs(model, feeds), wanted, strict=True):
                np.testing.assert_allclose(result, right, rtol=case.rtol, atol=case.atol, err_msg=name)
    # In the standard's own form, only 9 operators change, whose axis counts from the front.
    assert changed == (19 + 9 if target == "standard" else 38)
