"""Small files for TensorRT, made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rmsnorm_deploy.plugins import contract

WIDTH = 64


def rms_norm_model(path: Path, epsilon: float = 1e-6, **attributes: object) -> Path:
    """One RMSNorm node of the contract, float16, `x` [rows, 64] to `y`, without a local function."""
    values = {"epsilon": epsilon, "scale_offset": 0.0, "scale_type": 1, **contract.PARSER_ATTRIBUTES, **attributes}
    node = helper.make_node(
        contract.RMS_NORM, ["x", "scale"], ["y"], "a_norm", domain=contract.DOMAIN,
        **{name: value for name, value in values.items() if value is not None},
    )  # fmt: skip
    scale = numpy_helper.from_array(np.linspace(0.5, 1.5, WIDTH).astype(np.float16), "scale")
    rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["rows", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph([node], "graph", rows[:1], rows[1:], [scale])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(contract.DOMAIN, contract.DOMAIN_VERSION)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path
