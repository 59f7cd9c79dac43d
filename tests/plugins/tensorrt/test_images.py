"""Packed kernels: compiled for real by NVRTC, packed and read again, chosen; and bytes that are damaged."""

from __future__ import annotations

import itertools
import struct

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.plugins.kernel.launch_config import layouts
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from rmsnorm_deploy.plugins.tensorrt.images import (
    MAGIC,
    KernelImage,
    KernelImages,
    compile_images,
    kernel_of,
    known_architectures,
    unpack,
)

HEADER, ENTRY = 24, 32


def image(kind: str, architecture: int, few: bool = False, content: bytes = b"12345") -> KernelImage:
    return KernelImage(kind, architecture, few, 128, 4, 1, content)  # type: ignore[arg-type]


SAMPLE = KernelImages(64, "bfloat16", (
    image("cubin", 80, 1, b"few on 80"), image("cubin", 80, content=b"8 bytes."), image("ptx", 89, content=b"p\0"),
))  # fmt: skip


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_what_is_packed_is_read(dtype: str) -> None:
    images = KernelImages(64, dtype, SAMPLE.images)
    content = images.pack()
    assert unpack(content) == images
    assert len(content) == HEADER + 3 * ENTRY + 16 + 8 + 8
    assert content.startswith(MAGIC + struct.pack("<4I", 64, contract.ONNX_TYPES[dtype], 3, 0))
    assert content[HEADER : HEADER + ENTRY] == struct.pack("<8I", 0, 80, 1, 128, 4, 1, 9, 0)
    assert images.architectures == [80]


def test_no_images_are_packed_too() -> None:
    assert unpack(KernelImages(3, "float32", ()).pack()) == KernelImages(3, "float32", ())


@pytest.mark.parametrize("length", range(len(SAMPLE.pack())))
def test_every_cut_is_noticed(length: int) -> None:
    content = SAMPLE.pack()[:length]
    if len(SAMPLE.pack()) - length < 8 - 2 + 1:  # only zeros at the end are missing
        assert unpack(content) == SAMPLE
        return
    with pytest.raises(UsageError, match="packed kernels: "):
        unpack(content)


@pytest.mark.parametrize(("position", "value", "message"), [
    (0, b"RMSNORM2", "expected b'RMSNORM1' at the beginning, got b'RMSNORM2'"),
    (12, struct.pack("<I", 11), "truncated or damaged"),  # float64
    (16, struct.pack("<I", 4), "truncated or damaged"),  # one image more
    (24, struct.pack("<I", 2), "truncated or damaged"),  # neither cubin nor PTX
    (48, struct.pack("<I", 1 << 20), r"expected an image of 1048576 bytes, got \d+"),
])  # fmt: skip
def test_damaged_bytes_are_refused(position: int, value: bytes, message: str) -> None:
    content = SAMPLE.pack()
    with pytest.raises(UsageError, match=message):
        unpack(content[:position] + value + content[position + len(value) :])


@pytest.mark.parametrize(("architecture", "chosen"), [
    (75, None), (80, ("cubin", 80)), (86, ("cubin", 86)), (87, ("cubin", 86)), (89, ("cubin", 89)),
    (90, ("ptx", 89)), (100, ("ptx", 89)), (120, ("cubin", 120)), (121, ("cubin", 120)),
])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 432, 433, 100_000])
def test_the_nearest_image_is_chosen(architecture: int, chosen: tuple[str, int] | None, rows: int) -> None:
    kinds = [("cubin", 80), ("cubin", 86), ("cubin", 89), ("cubin", 120), ("ptx", 80), ("ptx", 89)]
    made = [image(kind, number, few) for (kind, number), few in itertools.product(kinds, (True, False))]
    for images in (made, made[::-1]):
        found = KernelImages(64, "float16", tuple(images)).choose(architecture, rows, 108)
        if chosen is None:
            assert found is None
        else:
            assert found is not None
            assert (found.kind, found.architecture, found.few) == (*chosen, rows <= 432)


def test_a_grid_has_a_block_for_every_few_rows() -> None:
    assert [image("cubin", 80).grid(rows) for rows in (1, 4, 5, 400)] == [1, 1, 2, 100]
    assert KernelImage("cubin", 90, False, 512, 1, 4, b"").grid(3) == 12


def test_images_are_compiled_for_every_architecture_in_each_layout() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install 'rmsnorm-deploy[kernel]'")
    kernel = kernel_of("AddRMSNorm", "float16", 4096, 1e-6, 1.0, 10)
    images = compile_images(kernel, (89, 80))
    assert [(i.kind, i.architecture, i.few) for i in images.images] == [
        ("cubin", 80, True), ("cubin", 80, False), ("cubin", 89, True), ("cubin", 89, False),
        ("ptx", 89, True), ("ptx", 89, False),
    ]  # fmt: skip
    assert (images.width, images.dtype, images.architectures) == (4096, "float16", [80, 89])
    assert not any(found.waits for found in images.images)
    for found, config in zip(images.images, layouts(kernel, 80) * 3, strict=True):
        assert (found.block, found.rows, found.cluster) == (config.block, config.rows, config.cluster)
        assert found.few == config.few
        if found.kind == "cubin":
            assert found.image[:4] == b"\x7fELF"
            assert b"add_rms_norm" in found.image
        else:
            assert found.image.endswith(b"}\n\0") or found.image.endswith(b"\0")
            text = found.image.rstrip(b"\0").decode("ascii")
            assert ".target sm_89" in text
            assert ".visible .entry add_rms_norm(" in text
            assert found.image.count(b"\0") == 1
    assert images.images[0].block != images.images[1].block
    assert unpack(images.pack()) == images
    assert compile_images(kernel, (89, 80)) is images


def test_kernels_wait_from_the_architecture_on_that_can() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install 'rmsnorm-deploy[kernel]'")
    images = compile_images(kernel_of("AddRMSNorm", "float16", 16384, 1e-6, 0.0, 10), (89, 90))
    assert [(i.kind, i.architecture, i.few, i.cluster, i.waits) for i in images.images] == [
        ("cubin", 89, 1, 1, False), ("cubin", 89, 0, 1, False),
        *[(kind, 90, *layout, True) for kind in ("cubin", "ptx") for layout in ((1, 4), (1, 1), (0, 1))],
    ]  # fmt: skip
    assert unpack(images.pack()) == images
    for found in images.images:
        if found.kind == "ptx":
            first = found.image.index(b"griddepcontrol.wait")
            assert first < found.image.index(b"ld.global")
    chosen = [images.choose(90, rows, 132) for rows in (1, 33, 34, 132, 133)]
    assert [image and (image.few, image.cluster) for image in chosen] == [
        (1, 4), (1, 4), (1, 1), (1, 1), (0, 1)
    ]  # fmt: skip


def test_architectures_that_nvrtc_does_not_know() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install 'rmsnorm-deploy[kernel]'")
    kernel = kernel_of("RMSNorm", "float32", 64, 1e-6, 0.0, 1)
    with pytest.raises(UsageError, match="expected sm_75 or later, got sm_70"):
        compile_images(kernel, (70,))
    with pytest.raises(UsageError, match=r"NVRTC supports sm_75.*, not sm_99"):
        compile_images(kernel, (80, 99))


@pytest.mark.parametrize(("dtype", "scale_type", "cast_first"), [
    ("float32", 1, False), ("float16", 1, False), ("float16", 10, True), ("bfloat16", 1, False), ("bfloat16", 16, True),
])  # fmt: skip
@pytest.mark.parametrize(("offset", "scale"), [(0.0, "weight"), (1.0, "one_plus_weight")])
@pytest.mark.parametrize(("op_type", "op"), [("RMSNorm", "rms_norm"), ("AddRMSNorm", "add_rms_norm")])
def test_a_node_says_which_kernel_it_is(
    dtype: str, scale_type: int, cast_first: bool, offset: float, scale: str, op_type: str, op: str
) -> None:
    expected = NormKernel(80, 1e-5, op, dtype, scale=scale, cast_first=cast_first)  # type: ignore[arg-type]
    assert kernel_of(op_type, dtype, 80, 1e-5, offset, scale_type) == expected


@pytest.mark.parametrize(("values", "message"), [
    (("float32", 64, -1.0, 0.0, 1), "RMSNorm: epsilon: expected a finite number of at least 0, got -1.0"),
    (("float32", 64, float("inf"), 0.0, 1), "epsilon: expected a finite number"),
    (("float32", 64, 1e-6, 0.5, 1), "scale_offset: expected 0 or 1, got 0.5"),
    (("float32", 64, 1e-6, 0.0, 11), "scale_type: expected one of 1"),
    (("float32", 64, 1e-6, 0.0, 10), "scale_type: expected 1 for X of float32, got 10"),
    (("bfloat16", 64, 1e-6, 0.0, 10), "scale_type: expected 1 or 16 for X of bfloat16, got 10"),
    (("float16", 0, 1e-6, 0.0, 1), "width is 0"),
    (("float16", 65537, 1e-6, 0.0, 1), "width is 65537"),
])  # fmt: skip
def test_nodes_that_the_kernel_cannot_do(values: tuple[str, int, float, float, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kernel_of("RMSNorm", *values)


@pytest.mark.parametrize(("texts", "numbers"), [
    ([], ()), (["sm_86"], (86,)), (["86,8.9", "SM120"], (86, 89, 120)), (["sm_86", "86", "8.6"], (86,)),
    (["sm_80, sm_75"], (80, 75)),
])  # fmt: skip
def test_architectures_as_users_write_them(texts: list[str], numbers: tuple[int, ...]) -> None:
    assert known_architectures(texts) == numbers


@pytest.mark.parametrize("text", ["", "8", "sm_", "compute_86", "8600", "86,", "-86", "sm86a"])
def test_architectures_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="architecture: expected a text such as sm_86, got "):
        known_architectures([text])
