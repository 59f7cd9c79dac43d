"""The kernel as NVRTC compiles it: no spills, few registers, wide accesses; and what is refused."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.plugins.kernel.compiler import compile_kernel
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, choose, layouts
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from tests.helpers.plugins.machine_code import before_the_first_barrier, disassembled, disassembler, instructions

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC: pip install 'rmsnorm-deploy[kernel]'")

ARCHITECTURES = (75, 80, 90, 100, 120)
WIDTHS = (64, 80, 128, 1000, 3072, 4096, 5120, 7168, 8192, 16384, 65536)
EVERY = os.environ.get("RMSNORM_EVERY_KERNEL") == "1"
REGISTERS = 65536  # of a multiprocessor


def configurations(architecture: int) -> list[tuple[NormKernel, LaunchConfig]]:
    kernels = [
        NormKernel(width, 1e-6, op, dtype)  # type: ignore[arg-type]
        for width in WIDTHS
        for op in ("rms_norm", "add_rms_norm")
        for dtype in ("float32", "float16", "bfloat16")
    ]
    kernels += [
        NormKernel(4096, 1e-6, dtype="float16", quantized="int8", quantization="static"),
        NormKernel(7168, 1e-6, "add_rms_norm", "bfloat16", quantized="float8_e4m3", quantization="per_row"),
        NormKernel(5120, 1e-6, "add_rms_norm", "float16", "float32"),
        NormKernel(128, 1e-6, inner=32, strided=True),
        NormKernel(2048, 1e-6, dtype="bfloat16", gate="before", activation="silu"),
        NormKernel(2048, 1e-6, dtype="bfloat16", gate="after", activation="silu", inner=4, weight_rows=4),
    ]
    every = [(kernel, config) for kernel in kernels for config in layouts(kernel, architecture)]
    # A sample, another one for each architecture; `make test-kernel` compiles all.
    return every if EVERY else every[ARCHITECTURES.index(architecture) :: len(ARCHITECTURES)]


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


@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_rows_times_width_is_computed_in_64_bits(op: Any, rows: int | None) -> None:
    kernel = NormKernel(5120, 1e-6, op)
    ptx = compile_kernel(kernel, choose(kernel, rows, 90), 90, "ptx").image.decode()
    products = re.findall(r"\b(mul|mad)\.(\w+)\.(\w+)\s[^;]*\b(?:5120|10240)\b", ptx)
    assert products
    assert all(how == "wide" or width in ("s64", "u64") for _, how, width in products), products


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm: pip install nvidia-cuda-nvdisasm")
@pytest.mark.parametrize("kernel", [
    NormKernel(4096, 1e-6), NormKernel(128, 1e-6, "add_rms_norm", "bfloat16"),
    NormKernel(50000, 1e-6, gate="after", activation="silu"),
    NormKernel(4096, 1e-6, quantized="int8", quantization="static"),
    NormKernel(4096, 1e-6, "add_rms_norm", quantized="float8_e4m3", quantization="static"),
    NormKernel(4096, 1e-6, quantized="int8", quantization="per_row"),
])  # fmt: skip
def test_nothing_is_read_or_written_before_the_kernel_before_has_ended(kernel: NormKernel) -> None:
    """Every input may be what the kernel before this one writes: a scale too, if the network computes it."""
    for config in layouts(kernel, 90):
        text = disassembled(compile_kernel(kernel, config, 90).image)
        before, *after = re.split(r"\bACQBULK\b", text)
        assert after
        assert not re.search(r"\b(LDG|STG|LD\.E|ST\.E|RED|ATOM)", before), config
        assert re.search(r"\bLDG", after[-1]) or re.search(r"\bLDG", after[0]), config


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm: pip install nvidia-cuda-nvdisasm")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("width", [4096, 8192])
def test_the_weight_is_on_its_way_before_x(width: int, op: Any, architecture: int) -> None:
    """In the machine's own instructions: what NVRTC hands to its assembler says nothing of the order."""
    kernel = NormKernel(width, 1e-6, op, "bfloat16")
    for config in layouts(kernel, architecture):
        if not config.prefetch:
            continue
        text = disassembled(compile_kernel(kernel, config, architecture).image)
        before, *rest = re.split(r"\bBAR\.SYNC", text)
        assert rest
        found = re.findall(r"\b(ACQBULK|CCTL\.E\.PF[12]|LDG\.E\.128)\b", before)
        fetches, weights = [f"CCTL.E.PF{2 if architecture >= 90 else 1}"] * config.vectors, config.vectors
        if architecture >= 90:
            loads = ["LDG.E.128"] * weights, ["LDG.E.128"] * (config.vectors * (2 if kernel.adds else 1))
            assert found == [*fetches, "ACQBULK", *loads[0], "ACQBULK", *loads[1]], config
        else:
            assert found[: len(fetches)] == fetches, config


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm: pip install nvidia-cuda-nvdisasm")
@pytest.mark.parametrize("quantized", ["int8", "float8_e4m3"])
@pytest.mark.parametrize("architecture", [90, 100])
def test_a_quantized_element_takes_at_most_twenty_instructions(architecture: int, quantized: Any) -> None:
    """With more, the multiprocessors of an H200 are slower than its memory."""
    kernel = NormKernel(4096, 1e-6, "rms_norm", "bfloat16", quantized=quantized, quantization="static")
    for config in layouts(kernel, architecture):
        names = instructions(disassembled(compile_kernel(kernel, config, architecture).image))
        assert 0 < len(names) / (config.vectors * config.elements) <= 20, config
        assert 0 < len(before_the_first_barrier(names)) < len(names)


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
