"""Quantization in PyTorch: its values, and every bit of the kernel's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rmsnorm_deploy.models.dtypes import torch_dtype
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins.kernel.launch_config import layouts
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from rmsnorm_deploy.plugins.torch.call import Call, eager_result
from rmsnorm_deploy.plugins.torch.quantize import QUANTIZED, quantize
from tests.helpers.plugins.kernels import NUMPY, Array, HostKernels, compiler

INF, NAN = math.inf, math.nan
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(("dtype", "pairs"), [
    (torch.int8, {
        0.5: 0, 1.5: 2, 2.5: 2, -0.5: 0, -1.5: -2, 126.5: 126, 127.4: 127, 200.0: 127, -128.5: -128, -129.0: -128,
        INF: 127, -INF: -128, NAN: 0,
    }),
    (E4M3, {
        1.0625: 1.0, 1.1875: 1.25, -1.0625: -1.0, 2**-10: 0.0, 3 * 2**-10: 2 * 2**-9, 432.0: 448.0, 464.0: 448.0,
        1e30: 448.0, INF: 448.0, -INF: -448.0, NAN: NAN,
    }),
])  # fmt: skip
def test_values_are_rounded_to_even_and_saturate(dtype: torch.dtype, pairs: dict[float, float]) -> None:
    for scale in (torch.tensor(1.0), torch.tensor([[0.25]])):
        q, used = quantize(torch.tensor(list(pairs)) * scale.item(), dtype, scale)
        assert used is scale
        assert q.dtype == dtype
        assert torch.equal(q.float().nan_to_num(1e9), torch.tensor(list(pairs.values())).float().nan_to_num(1e9))


@pytest.mark.parametrize(("row", "scale", "int8"), [
    ([0.0, 0.0, 0.0], 1.0, [0, 0, 0]),
    ([254.0, -127.0, 1.0], 2.0, [127, -64, 0]),
    ([127.0, NAN, -3.0], 1.0, [127, 0, -3]),
    ([NAN, NAN, NAN], 1.0, [0, 0, 0]),
    ([INF, 5.0, NAN], INF, [0, 0, 0]),
    ([1e-45, 0.0, 0.0], 1.0, [0, 0, 0]),  # the quotient with 127 is 0
])  # fmt: skip
def test_the_scale_of_a_row(row: list[float], scale: float, int8: list[int]) -> None:
    q, used = quantize(torch.tensor([row, [127.0, 0.0, -1.0]]), torch.int8)
    assert used.tolist() == [[scale], [1.0]]
    assert q.tolist() == [int8, [127, 0, -1]]


def test_an_infinite_scale_of_e4m3_leaves_zeros_and_nan() -> None:
    q, used = quantize(torch.tensor([INF, 5.0, NAN, -INF]), E4M3)
    assert used.tolist() == [INF]
    assert [str(value) for value in q.float().tolist()] == ["nan", "0.0", "nan", "nan"]


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"dtype: expected torch\.int8 or torch\.float8_e4m3fn, got torch\.uint8"):
        quantize(torch.ones(1, 8), torch.uint8)


# The kernel -------------------------------------------------------------------------------------------------------

WIDTH, EPSILON = 64, 1e-12  # 1 + epsilon is 1: for rows of 1 and -1, y is the weight and its negative
KERNELS = [
    NormKernel(WIDTH, EPSILON, "rms_norm", dtype, quantized=quantized, quantization=quantization)  # type: ignore[arg-type]
    for dtype in ("float32", "float16", "bfloat16")
    for quantized in QUANTIZED.values()
    for quantization in ("static", "per_row")
]


def weights(quantized: str) -> list[Tensor]:
    """Weights whose quotients by 0.5 are ties, and weights with infinity and NaN; the former's scale is 0.5."""
    odd = 2.0 * torch.arange(WIDTH) + 1.0
    if quantized == "int8":
        ties = odd / 4
        ties[-1] = 63.5
    else:
        binades = torch.tensor([2.0 ** (n % 15 - 6) for n in range(WIDTH)])
        ties = (1 + odd % 16 / 16) * binades / 2
        ties[:8], ties[-1] = odd[:8] * 2**-11, 224.0
    special = torch.linspace(-3, 3, WIDTH)
    special[:4] = torch.tensor([INF, -INF, NAN, 0.0])
    return [ties, ties.where(torch.arange(WIDTH) % 3 > 0, -ties), special]


def bits(q: Array) -> Array:
    """The bytes; every NaN of e4m3 has the same, as only GPUs up to sm_88 and the host keep its sign."""
    found = q.view(np.uint8)
    return np.where(found == 0xFF, 0x7F, found) if q.dtype != np.int8 else found


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    if compiler() is None:
        pytest.skip("needs a C++ compiler on the host")
    folder: Path = tmp_path_factory.mktemp("kernels")
    return HostKernels(folder, [(kernel, layouts(kernel, 90)[-1]) for kernel in KERNELS])


@pytest.mark.parametrize("number", range(len(KERNELS)), ids=[
    f"{kernel.dtype}-{kernel.quantized}-{kernel.quantization}" for kernel in KERNELS
])  # fmt: skip
def test_pytorch_has_every_bit_of_the_kernel(host: HostKernels, number: int) -> None:
    """On ties, saturation, a row of zeros, infinity and NaN; and on y that no weight is next to."""
    kernel = KERNELS[number]
    dtype, quantized = getattr(torch, kernel.dtype), torch_dtype(kernel.quantized)
    x = torch.ones(4, WIDTH)
    x[1] = -1.0
    x[2] = 0.0
    x[3, ::2] = -1.0
    x = x.to(dtype)
    spec, scales = NormSpec(EPSILON), (0.5, 0.3, 1e-3, 1e30, 1e-40) if kernel.quantization == "static" else (None,)
    for weight in weights(kernel.quantized):
        for value in scales:
            scale = None if value is None else torch.tensor([value])
            wanted = eager_result(Call(x, weight.to(dtype), spec, quantized=quantized, scale=scale))
            given: dict[str, Any] = {} if scale is None else {"scale": scale.numpy()}
            found = host.run(number, numpy(x), weight=numpy(weight.to(dtype)), **given)
            np.testing.assert_array_equal(bits(found["y"]), bits(numpy(wanted[0])))
            if scale is None:
                np.testing.assert_array_equal(found["row_scale"], wanted[1][:, 0].numpy())


def numpy(tensor: Tensor) -> Array:
    if tensor.element_size() == 1:
        return tensor.view(torch.int8).numpy().view(NUMPY[QUANTIZED[tensor.dtype]])
    name = str(tensor.dtype).removeprefix("torch.")
    kind = np.int16 if tensor.element_size() == 2 else np.float32
    return tensor.contiguous().view(torch.int16 if kind is np.int16 else torch.float32).numpy().view(NUMPY[name])
