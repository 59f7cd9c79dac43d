"""The choice of a layout: legal for every request, exact where it can be, and never beyond the limits."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmsnorm_deploy.models.dtypes import BYTES
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.spec import Gate
from rmsnorm_deploy.plugins.kernel.launch_config import MULTIPROCESSORS, LaunchConfig, choose, layouts
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel

DTYPES = ("float32", "float16", "bfloat16")


@st.composite
def requests(draw: st.DrawFn) -> tuple[NormKernel, int | None, int, int]:
    adds, quantized = draw(st.booleans()), draw(st.sampled_from(("none", "int8", "float8_e4m3")))
    dtype, gate = draw(st.sampled_from(DTYPES)), "none" if adds else draw(st.sampled_from(get_args(Gate)))
    kernel = NormKernel(
        draw(st.one_of(st.integers(1, 65536), st.sampled_from((64, 128, 3072, 4096, 5120, 7168, 8192, 16384, 65536)))),
        1e-6, "add_rms_norm" if adds else "rms_norm", dtype,
        draw(st.sampled_from(DTYPES)) if adds else None,
        gate=gate, activation="none" if gate == "none" else "silu", quantized=quantized,
        quantization="none" if quantized == "none" else draw(st.sampled_from(("static", "per_row"))),
    )  # fmt: skip
    rows = draw(st.one_of(st.none(), st.integers(0, 2**31 // kernel.width)))
    return kernel, rows, draw(st.sampled_from((75, 80, 86, 89, 90, 100, 120))), draw(st.sampled_from((4, 8, 16, 256)))


@given(requests())
def test_every_request_has_a_legal_layout(request: tuple[NormKernel, int | None, int, int]) -> None:
    kernel, rows, architecture, alignment = request
    config = choose(kernel, rows, architecture, alignment)
    config.check(kernel, architecture)
    assert 32 <= config.block <= 1024
    assert (
        config.tiles(kernel.width) * config.cluster * config.threads * config.vectors * config.elements >= kernel.width
    )
    assert config.cluster == 1 or architecture >= 90
    for dtype in kernel.dtypes:
        assert min(config.elements * BYTES[dtype], 16) <= alignment
    assert kernel.width % config.elements == 0
    if rows is not None:
        assert config.grid(rows) <= 2**31 - 1
        assert config.grid(rows) // config.cluster * config.rows >= rows


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("width", [64, 128, 256, 512, 1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192, 12288, 16384])
@pytest.mark.parametrize("rows", [1, 128, 2048, None])
def test_common_widths_are_covered_exactly(op: Any, width: int, rows: int | None) -> None:
    config = choose(NormKernel(width, 1e-6, op, "bfloat16"), rows, 90)
    assert config.is_whole(width)
    assert config.elements == 8
    assert config.tiles(width) == 1


def test_few_rows_are_spread_over_more_threads() -> None:
    kernel = NormKernel(4096, 1e-6)
    assert choose(kernel, 1, 90) == LaunchConfig(512, 1, 8, prefetch=True, few=True)
    assert choose(kernel, 4096, 90) == LaunchConfig(256, 2, 8)
    assert choose(kernel, None, 90) == LaunchConfig(256, 2, 8)


@pytest.mark.parametrize("multiprocessors", [20, MULTIPROCESSORS])
def test_few_rows_are_at_most_one_block_for_each_multiprocessor(multiprocessors: int) -> None:
    kernel = NormKernel(4096, 1e-6)
    for rows, threads in ((1, 512), (multiprocessors, 512), (multiprocessors + 1, 256)):
        assert choose(kernel, rows, 90, multiprocessors=multiprocessors).threads == threads


@pytest.mark.parametrize(("op", "width", "cluster"), [
    ("rms_norm", 16384, 1), ("rms_norm", 32768, 4), ("add_rms_norm", 8192, 1), ("add_rms_norm", 16384, 4),
])  # fmt: skip
def test_a_few_wide_rows_are_each_read_by_a_cluster(op: Any, width: int, cluster: int) -> None:
    kernel = NormKernel(width, 1e-6, op)
    most = MULTIPROCESSORS // cluster
    if cluster > 1:
        assert [choose(kernel, rows, 90).cluster for rows in (1, most, most + 1)] == [cluster, cluster, 1]
    else:
        assert choose(kernel, 1, 90).cluster == 1
    assert choose(kernel, 1, 89).cluster == 1
    assert all(config.is_whole(width) for config in layouts(kernel, 90))


@given(requests())
def test_layouts_go_from_the_fewest_rows_to_any_number(request: tuple[NormKernel, int | None, int, int]) -> None:
    kernel, _, architecture, alignment = request
    found = layouts(kernel, architecture, alignment)
    assert [config.few for config in found] == [True] * (len(found) - 1) + [False]
    most = [max(r for r in range(2000) if config.suits(r, 4)) for config in found]
    assert most == sorted(most)


def test_what_is_not_aligned_is_read_in_smaller_pieces() -> None:
    assert [choose(NormKernel(4096, 1e-6), 1, 90, alignment).elements for alignment in (2, 4, 8, 16)] == [1, 2, 4, 8]
    with pytest.raises(UsageError, match=r"alignment in bytes: .* at least 4, got 2"):
        choose(NormKernel(4096, 1e-6, dtype="float32"), 1, 90, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LaunchConfig(48, 1, 8), "threads for a row: .* got 48"),
        (LaunchConfig(12, 1, 8, rows=8), "threads for a row: .* got 12"),
        (LaunchConfig(16, 1, 8), "threads of a block: .* got 1x16"),
        (LaunchConfig(512, 1, 8, rows=4), "threads of a block: .* got 4x512"),
        (LaunchConfig(32, 1, 3), "vectors of 3 elements"),
        (LaunchConfig(32, 1, 16), "do not divide a width of 1000"),
        (LaunchConfig(32, 1, 8, cluster=3), "cluster of 3"),
        (LaunchConfig(32, 1, 8, rows=2, cluster=2), "one row a block"),
    ],
)
def test_layouts_that_cannot_run_are_refused(config: LaunchConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.check(NormKernel(1000, 1e-6), 90)
    with pytest.raises(UsageError, match="requires sm_90"):
        LaunchConfig(32, 1, 8, cluster=2).check(NormKernel(1000, 1e-6), 89)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 65537}, "width is 65537"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"epsilon": -1.0}, "epsilon is -1"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"quantized": "int8"}, "both be given"),
        ({"inner": 4, "weight_rows": 2}, "expected 1 or inner \\(4, at least 1\\), got 2"),
        ({"residual_dtype": "float32"}, "requires op add_rms_norm"),
        ({"gate": "after"}, "gate and activation must both be given"),
        ({"op": "add_rms_norm", "gate": "after", "activation": "silu"}, "gate requires op rms_norm"),
    ],
)
def test_kernels_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NormKernel(**{"width": 64, "epsilon": 1e-6, **changes})


def test_sums_in_float16_have_few_vectors_on_sm_100() -> None:
    """NVRTC 13.0 spills registers of four there; `test_chosen_layouts_compile_without_spills` compiles them."""
    for width in (16384, 32768, 65536):
        kernel = NormKernel(width, 1e-6, "add_rms_norm", "float16")
        assert max(config.vectors for config in layouts(kernel, 100)) == 2
        assert layouts(kernel.replace(dtype="bfloat16", residual_dtype=None, weight_dtype=None), 100)[-1].vectors == 4
        assert layouts(kernel, 90)[-1].vectors == 4
    odd = NormKernel(30001, 1e-6, "add_rms_norm", "float16")  # no layout has so few
    assert layouts(odd, 100) == layouts(odd, 103)
    assert layouts(odd, 100)[-1].vectors > 2
