"""ONNX nodes whose results have the dtypes and shapes of ONNX Runtime's operators, for ONNX's shape inference.

The stand-ins compute other numbers; only their types count. An operator that is absent, or is used in a way that its
stand-in does not cover, has results of unknown types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

_MICROSOFT = "com.microsoft"


class StandIns:
    """The nodes and inputs that stand in for one operator; `nodes` is empty where there are none.

    Attributes:
        node: the operator.
        nodes: what stands in for it.
        inputs: graph inputs that the nodes read besides the operator's inputs.
    """

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        rule = _RULES.get(node.op_type) if node.domain == _MICROSOFT else None
        if rule is not None and node.outputs and node.outputs[0].name:
            rule(self)

    def name(self, index: int) -> str:
        """The name of an input, or an empty one."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return "" if value is None else str(value.name)

    def value(self, index: int) -> ir.Value | None:
        """An input, or None."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def number(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None or attribute.type != ir.AttributeType.INT else attribute.as_int()

    def add(self, op_type: str, inputs: list[str], result: str | None = None, **attributes: Any) -> str:
        """Add a node; its result is the operator's first output unless `result` is a suffix of that name."""
        output = str(self.node.outputs[0].name) + ("" if result is None else f".stand_in.{result}")
        made = helper.make_node(op_type, inputs, [output], **attributes)
        self.nodes.append(made)
        return output

    def integers(self, numbers: list[int], suffix: str) -> str:
        """A constant vector."""
        return self.add("Constant", [], suffix, value_ints=numbers)

    def typed(self, index: int) -> int | None:
        """The dtype of an input, or None."""
        value = self.value(index)
        return None if value is None or value.dtype is None else int(value.dtype)


def _like_first(made: StandIns) -> None:
    made.add("Identity", [made.name(0)])


def _broadcast(made: StandIns) -> None:
    """A, scale, zero point, B, scale, zero point."""
    made.add("Add", [made.name(0), made.name(3)])


def _last_dim(made: StandIns) -> None:
    """A weight of 4 or 8 bits: the result is like A, with N as its last dim."""
    width = made.number("N")
    if width > 0:
        ends = [made.integers([number], name) for name, number in (("start", 0), ("end", 1), ("axis", -1))]
        column = made.add("Slice", [made.name(0), *ends], "column")
        made.add("Expand", [column, made.integers([width], "width")])


def _product(dtype_of: int | None) -> Callable[[StandIns], None]:
    """A product of integers or mixed dtypes, of the dtype of one input, or float32."""

    def rule(made: StandIns) -> None:
        to = TensorProto.FLOAT if dtype_of is None else made.typed(dtype_of)
        if to is not None:
            made.add("MatMul", [made.add("Cast", [made.name(i)], f"cast{i}", to=to) for i in (0, 1)])

    return rule


def _fused_product(made: StandIns) -> None:
    if not any(made.number(name) for name in ("transA", "transB", "transBatchA", "transBatchB")):
        made.add("MatMul", [made.name(0), made.name(1)])


def _quantized_gemm(made: StandIns) -> None:
    """A, scale, zero point, B, scale, zero point, C, and the scale and zero point of a quantized result."""
    to = made.typed(8) if made.name(8) else TensorProto.FLOAT
    if to is not None:
        operands = [made.add("Cast", [made.name(i)], f"cast{i}", to=to) for i in (0, 3)]
        made.add("Gemm", operands, transA=made.number("transA"), transB=made.number("transB"))


def _to(index: int, default: int | None = None) -> Callable[[StandIns], None]:
    """The first input in the dtype of another one."""

    def rule(made: StandIns) -> None:
        to = made.typed(index) if made.name(index) else default
        if to is not None:
            made.add("Cast", [made.name(0)], to=to)

    return rule


def _joined(made: StandIns) -> None:
    """Scale and zero point of the result, then each part with its own."""
    made.add("Concat", [made.name(i) for i in range(2, len(made.node.inputs), 3)], axis=made.number("axis"))


def _chosen(made: StandIns) -> None:
    made.add("Where", [made.name(0), made.name(1), made.name(4)])


def _rows(made: StandIns) -> None:
    """Rows of a table whose elements are packed in bytes where its dtype is uint8."""
    table, indices, dtype = made.value(0), made.name(1), made.typed(2)
    if table is None or table.shape is None or table.dtype is None or dtype is None or table.shape.is_dynamic():
        return
    packed = 8 // made.number("bits", 4) if table.dtype == ir.DataType.UINT8 else 1
    shape = [int(dim) for dim in table.shape if isinstance(dim, int)]
    name = f"{made.node.outputs[0].name}.stand_in.table"
    made.inputs.append(helper.make_tensor_value_info(name, dtype, [*shape[:-1], shape[-1] * packed]))
    made.add("Gather", [name, indices], axis=made.number("gather_axis"))


def _grouped_attention(made: StandIns) -> None:
    """The query's type; where query, key and value are packed in one input, its part of the last dim."""
    if made.name(1):
        made.add("Identity", [made.name(0)])
        return
    queries, others = made.number("num_heads"), made.number("kv_num_heads")
    if queries > 0 and others > 0:
        heads = made.integers([0, 0, queries + 2 * others, -1], "heads")
        split = made.add("Reshape", [made.name(0), heads], "split")
        bounds = [made.integers([number], name) for name, number in (("start", 0), ("end", queries), ("axis", 2))]
        part = made.add("Slice", [split, *bounds], "part")
        made.add("Reshape", [part, made.integers([0, 0, -1], "joined")])


# How the first output of ONNX Runtime's operators is typed.
_RULES: dict[str, Callable[[StandIns], None]] = {
    "DequantizeLinear": _to(1),
    "DynamicQuantizeMatMul": _product(None),
    "FusedMatMul": _fused_product,
    "FusedMatMulActivation": _fused_product,
    "GatherBlockQuantized": _rows,
    "GroupQueryAttention": _grouped_attention,
    "MatMulBnb4": _last_dim,
    "MatMulIntegerToFloat": _product(2),
    "MatMulNBits": _last_dim,
    "QGemm": _quantized_gemm,
    "QLinearAdd": _broadcast,
    "QLinearConcat": _joined,
    "QLinearLeakyRelu": _like_first,
    "QLinearMul": _broadcast,
    "QLinearSigmoid": _like_first,
    "QLinearSoftmax": _like_first,
    "QLinearWhere": _chosen,
    "QuantizeLinear": _to(2, TensorProto.UINT8),
}
