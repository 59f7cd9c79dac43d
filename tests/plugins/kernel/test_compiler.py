"""The kernel as NVRTC compiles it: no spills, few registers, wide accesses; and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.plugins.kernel.compiler import compile_kernel
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, choose
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC: pip install 'rmsnorm-deploy[kernel]'")

ARCHITECTURES = (75, 80, 90, 100, 120)
WIDTHS = (64, 80, 128, 1000, 3072, 4096, 5120, 7168, 8192, 16384, 65536)
REGISTERS = 65536  # of a multiprocessor


def configurations(architecture: int) -> list[tuple[NormKernel, LaunchConfig]]:
    kernels = [
        NormKernel(width, 1e-6, op, dtype)  # type: ignore[arg-type]
        for width in WIDTHS
        for op in ("rms_norm", "add_rms_norm")
        for dtype in ("float32", "bfloat16")
    ]
    kernels += [
        NormKernel(4096, 1e-6, dtype="float16", quantized="int8", quantization="static"),
        NormKernel(7168, 1e-6, "add_rms_norm", "bfloat16", quantized="float8_e4m3", quantization="per_row"),
        NormKernel(5120, 1e-6, "add_rms_norm", "float16", "float32", y_dtype="float16"),
        NormKernel(128, 1e-6, inner=32, strided=True),
        NormKernel(2048, 1e-6, dtype="bfloat16", gate="before"),
        NormKernel(2048, 1e-6, dtype="bfloat16", gate="after", inner=4, weight_rows=4),
    ]
    layouts = ((kernel, choose(kernel, rows, architecture)) for kernel in kernels for rows in (1, None))
    return list(dict.fromkeys(layouts))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chosen_layouts_compile_without_spills(architecture: int) -> None:
    for kernel, config in configurations(architecture):
        compiled = compile_kernel(kernel, config, architecture)
        where = f"{kernel}, {config}: {compiled.registers} registers"
        assert (compiled.spilled_bytes, compiled.stack_bytes) == (0, 0), where
        assert 0 < compiled.registers <= min(REGISTERS // config.block, 128), where
        assert compiled.image[:4] == b"\x7fELF"


@pytest.mark.parametrize("kernel", [
    NormKernel(4096, 1e-6), NormKernel(128, 1e-6), NormKernel(5120, 1e-6, "add_rms_norm", "bfloat16"),
    NormKernel(3072, 1e-6, "add_rms_norm", "float32"),
])  # fmt: skip
def test_every_access_has_sixteen_bytes(kernel: NormKernel) -> None:
    ptx = compile_kernel(kernel, choose(kernel, None, 90), 90, "ptx").image.decode()
    accesses = re.findall(r"\b(?:ld|st)\.global\S*", ptx)
    assert accesses
    assert all(re.search(r"\.v4\.(u|b|f)32$|\.v2\.(u|b|f)64$", access) for access in accesses), accesses
    config = choose(kernel, None, 90)
    held = 3 if kernel.adds else 2
    assert sum(access.startswith("ld") for access in accesses) == held * config.vectors


def test_ptx_names_its_entry_and_its_parameters_in_order() -> None:
    kernel = NormKernel(4096, 1e-6, "add_rms_norm", "bfloat16", quantized="float8_e4m3", quantization="per_row")
    ptx = compile_kernel(kernel, choose(kernel, None, 90), 90, "ptx").image.decode()
    entry = re.search(r"\.entry add_rms_norm\(([^)]*)\)", ptx)
    assert entry is not None
    kinds = re.findall(r"\.param \.(\w+)", entry[1])
    assert kinds == ["u64", "u64", "u64", "u32", "u64", "u64", "u64"]  # x, residual, weight; rows; y, sum, row scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": 70}, "expected sm_75 or later, got sm_70"),
        ({"architecture": 91}, "NVRTC supports sm_75"),
        ({"kind": "fatbin"}, "expected ptx or cubin, got 'fatbin'"),
        ({"config": LaunchConfig(512, 1, 8, cluster=2), "architecture": 80}, "requires sm_90"),
    ],
)
def test_what_cannot_be_compiled_is_refused(arguments: dict[str, Any], message: str) -> None:
    kernel = NormKernel(4096, 1e-6)
    given = {"config": choose(kernel, None, 90), "architecture": 90, **arguments}
    with pytest.raises(UsageError, match=message):
        compile_kernel(kernel, **given)
