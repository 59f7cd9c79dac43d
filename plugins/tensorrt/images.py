"""The compiled kernels of one norm, and the bytes in which an engine stores them (the plugin's field `kernels`).

A kernel is specialized by width, dtypes and layout. It is compiled when the engine is built, in several layouts (for
few rows and for many) and for each requested architecture, and is read when the engine is loaded. The C++ library
writes and reads the same format (`cpp/images.h`). All numbers are little-endian and unsigned:

    8 bytes  "RMSNORM1"
    u32      width
    u32      ONNX data type of x
    u32      number of images
    u32      ONNX data type of a quantized y, or 0 if y has that of x
    for each image:
        u32  kind: 0 cubin, 1 PTX
        u32  architecture: compute capability without the point, such as 89
        u32  1: for at most as many blocks as the GPU has multiprocessors; 0: for any number
        u32  threads of a block
        u32  rows that one block reads
        u32  blocks of a cluster
        u32  bytes of the image
        u32  1: the kernel waits for the one before it, so that it may be launched before that one has ended; 0: not
        the image, padded with zeros to a multiple of 8 bytes
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, get_args

from ...models.errors import UsageError
from ...models.spec import Scale
from ...plugins import contract
from ..kernel.compiler import Kind, compile_kernel
from ..kernel.launch_config import LaunchConfig, layouts
from ..kernel.norm_kernel import NormKernel, Quantized

MAGIC: Final = b"RMSNORM1"
_HEADER: Final = struct.Struct("<8s4I")
_ENTRY: Final = struct.Struct("<8I")
_KINDS: Final[tuple[Kind, ...]] = ("cubin", "ptx")
# From here on kernels wait for the one before them: see wait_for_previous in the kernel's source.
WAITING_ARCHITECTURE: Final = 90
_QUANTIZED: Final[dict[int, Quantized]] = {
    number: name for name in get_args(Quantized) if (number := contract.QUANT_TYPES.get(name))
}
_SCALES: Final[dict[float, Scale]] = {0.0: "weight", 1.0: "one_plus_weight"}  # by `contract.SCALE_OFFSETS`


@dataclass(frozen=True, slots=True)
class KernelImage:
    """One compiled kernel and its launch parameters.

    Attributes:
        kind: `cubin` runs on its own major architecture, `ptx` on it and all later ones.
        architecture: compute capability without the point, such as 89.
        few: whether the layout is for at most one block for each multiprocessor, or else for any number of rows.
        block: threads of a block.
        rows: rows that one block reads.
        cluster: blocks that read one row together.
        image: the cubin, or the PTX text with a terminating zero.
        waits: whether the kernel waits for the one before it (programmatic dependent launch).
    """

    kind: Kind
    architecture: int
    few: bool
    block: int
    rows: int
    cluster: int
    image: bytes
    waits: bool = False

    def grid(self, rows: int) -> int:
        """Number of blocks for this many rows."""
        return -(-rows // self.rows) * self.cluster

    def runs_on(self, architecture: int) -> bool:
        """Whether a GPU of this architecture can load it."""
        if self.kind == "ptx":
            return self.architecture <= architecture
        return self.architecture // 10 == architecture // 10 and self.architecture <= architecture


@dataclass(frozen=True, slots=True)
class KernelImages:
    """All images of one norm, with the width and dtype of x that they were compiled for.

    `quant_type` is the ONNX data type of a quantized y, or 0. The other parameters of the kernels (operator, epsilon,
    and how the scale multiplies) are in the plugin's name and its other fields.
    """

    width: int
    dtype: str
    images: tuple[KernelImage, ...]
    quant_type: int = 0

    @property
    def architectures(self) -> list[int]:
        """Architectures with a cubin, in ascending order."""
        return sorted({image.architecture for image in self.images if image.kind == "cubin"})

    def choose(self, architecture: int, rows: int, multiprocessors: int) -> KernelImage | None:
        """The image to launch: cubin before PTX, nearest architecture, the layout for the fewest rows, or None."""

        def rank(image: KernelImage) -> tuple[bool, int, bool, bool, int]:
            suits = not image.few or image.grid(rows) <= multiprocessors
            return image.kind == "cubin", image.architecture, suits, image.few, image.cluster

        return max((image for image in self.images if image.runs_on(architecture)), key=rank, default=None)

    def pack(self) -> bytes:
        """The bytes of the field."""
        dtype = contract.ONNX_TYPES[self.dtype]
        parts = [_HEADER.pack(MAGIC, self.width, dtype, len(self.images), self.quant_type)]
        for image in self.images:
            kind, few, size = _KINDS.index(image.kind), int(image.few), len(image.image)
            parts += [
                _ENTRY.pack(
                    kind, image.architecture, few, image.block, image.rows, image.cluster, size, int(image.waits)
                ),
                image.image,
                b"\0" * (-size % 8),
            ]
        return b"".join(parts)


def unpack(content: bytes) -> KernelImages:
    """Read the bytes of the field.

    Raises:
        UsageError: the bytes are truncated, damaged, or of another format.
    """
    try:
        magic, width, dtype, count, quant_type = _HEADER.unpack_from(content)
        if magic != MAGIC:
            raise UsageError(f"packed kernels: expected {MAGIC!r} at the beginning, got {magic!r}")
        if quant_type not in (0, *contract.QUANT_TYPES.values()):
            raise UsageError(f"packed kernels: unknown quantized data type {quant_type}")
        names = {number: name for name, number in contract.ONNX_TYPES.items()}
        position, images = _HEADER.size, []
        for _ in range(count):
            kind, architecture, few, block, rows, cluster, size, waits = _ENTRY.unpack_from(content, position)
            position += _ENTRY.size
            image = content[position : position + size]
            if len(image) != size:
                raise UsageError(f"packed kernels: expected an image of {size} bytes, got {len(image)}")
            images.append(KernelImage(_KINDS[kind], architecture, bool(few), block, rows, cluster, image, bool(waits)))
            position += size + -size % 8
        return KernelImages(width, names[dtype], tuple(images), quant_type)
    except (struct.error, IndexError, KeyError) as error:
        raise UsageError(f"packed kernels: the {len(content)} bytes are truncated or damaged: {error}") from error


def kernel_of(
    op_type: str,
    dtype: str,
    width: int,
    epsilon: float,
    scale_offset: float,
    scale_type: int,
    quant_type: int | None = None,
) -> NormKernel:
    """The kernel of one custom operator.

    Args:
        op_type: the operator.
        dtype: dtype of x.
        width: elements in a row of x.
        epsilon: the attribute of this name, like the following arguments.
        scale_offset: 0 or 1.
        scale_type: ONNX data type in which the scale is multiplied.
        quant_type: ONNX data type of a quantized y, for the operators that have one.

    Raises:
        UsageError: the kernel does not support a value.
    """
    attributes = {"epsilon": epsilon, "scale_offset": scale_offset, "scale_type": scale_type}
    if quant_type is not None:
        attributes["quant_type"] = quant_type
    problems = contract.attribute_problems(attributes, op_type)
    if not problems:
        problems = [problem for problem in [contract.scale_type_problem(scale_type, dtype)] if problem]
    if problems:
        raise UsageError(f"{op_type}: {'; '.join(problems)}.")
    quantized = op_type in contract.UNQUANTIZED
    return NormKernel(
        width,
        epsilon,
        contract.KERNEL_OPS[op_type],  # type: ignore[arg-type]
        dtype,  # type: ignore[arg-type]
        scale=_SCALES[scale_offset],
        cast_first=dtype != "float32" and scale_type == contract.ONNX_TYPES[dtype],
        quantized=_QUANTIZED[quant_type] if quantized and quant_type is not None else "none",
        quantization="static" if quantized else "none",
    )


@functools.lru_cache(maxsize=256)
def compile_images(kernel: NormKernel, architectures: tuple[int, ...]) -> KernelImages:
    """Compile a kernel in each of its layouts: a cubin for each architecture, and PTX of the newest for later GPUs.

    Equal norms share one result.

    Args:
        kernel: what the kernel computes.
        architectures: compute capabilities without the point, at least one.

    Raises:
        UsageError: NVRTC does not support an architecture.
        EnvironmentMissingError: cuda-bindings or NVRTC is not installed.
    """
    targets: list[tuple[int, Kind]] = [(architecture, "cubin") for architecture in sorted(architectures)]
    images = [
        _compiled(kernel, config, architecture, kind)
        for architecture, kind in [*targets, (max(architectures), "ptx")]
        for config in layouts(kernel, architecture)
    ]
    return KernelImages(kernel.width, kernel.dtype, tuple(images), contract.QUANT_TYPES.get(kernel.quantized, 0))


def _compiled(kernel: NormKernel, config: LaunchConfig, architecture: int, kind: Kind) -> KernelImage:
    image = compile_kernel(kernel, config, architecture, kind).image
    return image_of(config, architecture, image + b"\0" if kind == "ptx" else image, kind)


def image_of(config: LaunchConfig, architecture: int, image: bytes, kind: Kind = "cubin") -> KernelImage:
    """A compiled kernel with the launch parameters of its layout."""
    waits = architecture >= WAITING_ARCHITECTURE
    return KernelImage(kind, architecture, config.few, config.block, config.rows, config.cluster, image, waits)


def known_architectures(texts: Sequence[str]) -> tuple[int, ...]:
    """Architectures in the form that users write: `sm_86`, `86` or `8.6`, several separated by commas.

    Raises:
        UsageError: a text is not an architecture.
    """
    found = []
    for text in (part.strip() for joined in texts for part in joined.split(",")):
        digits = text.lower().removeprefix("sm_").removeprefix("sm").replace(".", "")
        if not digits.isdecimal() or not 2 <= len(digits) <= 3:
            raise UsageError(f"architecture: expected a text such as sm_86, got {text!r}.")
        found.append(int(digits))
    return tuple(dict.fromkeys(found))


assert set(get_args(Kind)) == set(_KINDS)
