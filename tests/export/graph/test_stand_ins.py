"""The dtypes and shapes of the results of ONNX Runtime's operators, in files that do not state them."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph.infer_types import fill_types
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from tests.helpers.graphs.onnx_text import parsed, values

MS = "com.microsoft"
INPUTS = """float16[n, s, 64] h, float[n, s, 64] f, int8[n, s, 64] q, uint8[n, 1, 64] u, float16[n, s, 128] p,
    int8[64, 24] w, uint8[24, 2, 16] b, uint8[100, 32] t, int64[n, s] ids, bool[n, s, 1] yes, int8[8, 64] rows, int8 z8,
    uint8 zu, float16[24, 2] sh, float16 one16, float one, int32[n] k, float[64, 24] m"""


@pytest.mark.parametrize(
    ("node", "dtype", "shape"),
    [
        ("MatMulNBits <K = 64, N = 24, bits = 4, block_size = 32> (h, b, sh)", "FLOAT16", ["n", "s", 24]),
        ("MatMulBnb4 <K = 64, N = 24, block_size = 32, quant_type = 1> (f, b, one)", "FLOAT", ["n", "s", 24]),
        ("DynamicQuantizeMatMul (f, w, one, z8)", "FLOAT", ["n", "s", 24]),
        ("MatMulIntegerToFloat (q, w, one16, one16)", "FLOAT16", ["n", "s", 24]),
        ("QLinearAdd (q, one, z8, u, one, zu, one, z8)", "INT8", ["n", "s", 64]),
        ("QLinearMul (q, one, z8, u, one, zu, one, z8)", "INT8", ["n", "s", 64]),
        ("QLinearSigmoid (q, one, z8, one, z8)", "INT8", ["n", "s", 64]),
        ("QLinearLeakyRelu (u, one, zu, one, zu)", "UINT8", ["n", 1, 64]),
        ("QLinearConcat <axis = 2> (one, z8, q, one, z8, q, one, z8)", "INT8", ["n", "s", 128]),
        ("QLinearWhere (yes, q, one, z8, q, one, z8, one, z8)", "INT8", ["n", "s", 64]),
        ("QGemm (rows, one, z8, w, one, z8)", "FLOAT", [8, 24]),
        ('QGemm (rows, one, z8, w, one, z8, "", one, zu)', "UINT8", [8, 24]),
        ("QGemm <transB = 1> (rows, one, z8, rows, one, z8)", "FLOAT", [8, 8]),
        ("QuantizeLinear (f, one, z8)", "INT8", ["n", "s", 64]),
        ("QuantizeLinear (f, one)", "UINT8", ["n", "s", 64]),
        ("DequantizeLinear (q, one16, z8)", "FLOAT16", ["n", "s", 64]),
        ("FusedMatMul <alpha = 2.0> (f, m)", "FLOAT", ["n", "s", 24]),
        ("FusedMatMul <transB = 1> (f, m)", None, None),
        ("GatherBlockQuantized <bits = 4, block_size = 32> (t, ids, one16)", "FLOAT16", ["n", "s", 64]),
        ("GatherBlockQuantized <bits = 8, block_size = 32> (t, ids, one)", "FLOAT", ["n", "s", 32]),
        ("GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (p, , , , , k, k)", "FLOAT16", ["n", "s", 64]),
        ("GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (h, p, p, , , k, k)", "FLOAT16", ["n", "s", 64]),
        ("MatMulFpQ4 (f, u, k)", None, None),
    ],
)
def test_results_are_typed_as_onnx_runtime_types_them(
    node: str, dtype: str | None, shape: list[int | str] | None
) -> None:
    node = node.replace('""', "")
    operator, _, rest = node.partition(" ")
    model = parsed(f"g ({INPUTS}) => (float[1] o) {{ y = {MS}.{operator} {rest}  o = Neg (y) }}", 17, MS)
    fill_types(model)
    y = values(model)["y"]
    found = None if y.shape is None else [dim if isinstance(dim, int) else dim.value for dim in y.shape]
    assert (None if y.dtype is None else y.dtype.name, found) == (dtype, shape)


@pytest.mark.parametrize(
    "before",
    [
        f"x = {MS}.MatMulNBits <K = 64, N = 8, bits = 4, block_size = 32> (f, b, s)",
        f"x = {MS}.DynamicQuantizeMatMul (f, w, one)",
        f"a = {MS}.QuantizeLinear (f, one, z8)  c = {MS}.QLinearAdd (a, one, z8, a, one, z8, one, z8)"
        "  d = DequantizeLinear (c, one, z8)  x = MatMul (d, m)",
        "a = QuantizeLinear (f, one, z8)  c = QLinearMatMul (a, one, z8, w, one, z8, one, z8)"
        "  x = DequantizeLinear (c, one, z8)",
    ],
)
def test_a_norm_behind_quantized_operators_is_found_in_a_file_without_types(before: str) -> None:
    model = parsed(
        f"""g (float[n, s, 64] f, uint8[8, 2, 16] b, float[8, 2] s, int8[64, 8] w, float one, int8 z8, float[64, 8] m,
        float[8] g1) => (float[n, s, 8] y) <float eps = {{0.125}}, float two = {{2.0}}> {{ {before}
        sq = Pow (x, two)  ms = ReduceMean <axes = [2], keepdims = 1> (sq)  e = Add (ms, eps)  r = Sqrt (e)
        d1 = Div (x, r)  y = Mul (d1, g1) }}""", 17, MS,
    )  # fmt: skip
    (site,) = find_graph_norms(model).sites
    assert (site.spec.scale, site.shape, site.dtype) == ("weight", (None, None, 8), ir.DataType.FLOAT)
