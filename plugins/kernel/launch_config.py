"""The layout of a kernel over threads, chosen by width, rows, dtypes and architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ...models.dtypes import BYTES
from ...models.errors import UsageError
from .norm_kernel import NormKernel

# Multiprocessors of the default GPU (H200); with fewer blocks than this, some are idle.
MULTIPROCESSORS: Final = 132
MOST_THREADS: Final = 1024
WIDEST_ACCESS: Final = 16
# Bytes of registers that a thread may use for loaded values, by threads per block: with more, registers spill.
_HELD: Final = {1024: 96, 512: 192, 256: 320}
# A row of up to this many bytes is read by a single warp.
_WARP_BYTES: Final = 1024
_BLOCK_OF_WARPS: Final = 128
CLUSTER_ARCHITECTURE: Final = 90
_CLUSTERED_BYTES: Final = 64 * 1024
# With so few rows that most multiprocessors would be idle, a row of more than the first is read by several, each of
# which reads at most the second (in bytes of loaded values); `benchmarks/measured/kernel_layouts_h100.md` has both.
_SPREAD_BYTES: Final = 48 * 1024
_SPREAD_SHARE: Final = 16 * 1024
# Vectors of a row from which on a thread reads two if there are few rows, and four if there are many.
_FEWEST_OF_TWO: Final = 513
_FEWEST_OF_FOUR: Final = 1024
# Of a sum in float16 on sm_100, vectors of a row up to which a thread reads four.
_MOST_OF_FOUR: Final = 1024


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """The layout of one kernel.

    Attributes:
        threads: threads of a block that read one row together: a power of two up to 16, or a multiple of 32.
        vectors: vectors that one thread holds at a time.
        elements: elements of one vector, a power of two up to 16; one memory access has at most 16 bytes.
        rows: rows that one block reads.
        cluster: blocks that read one row together; more than 1 requires sm_90.
        prefetch: whether the weight is loaded before the statistics are computed.
        few: whether the layout is for at most one block for each multiprocessor, or else for any number of rows.
    """

    threads: int
    vectors: int
    elements: int
    rows: int = 1
    cluster: int = 1
    prefetch: bool = False
    few: bool = False

    @property
    def block(self) -> int:
        """Threads of a block."""
        return self.threads * self.rows

    def tiles(self, width: int) -> int:
        """Number of tiles of a row; with more than 1, it is read again for the second half of the formula."""
        return -(-width // (self.cluster * self.threads * self.vectors * self.elements))

    def is_whole(self, width: int) -> bool:
        """Whether every thread always reads a full set of vectors."""
        return width % (self.cluster * self.threads * self.vectors * self.elements) == 0

    def grid(self, rows: int) -> int:
        """Number of blocks for this many rows; 0 for no rows, which must not be launched."""
        return -(-rows // self.rows) * self.cluster

    def suits(self, rows: int | None, multiprocessors: int) -> bool:
        """Whether the layout is for this many rows; None if unknown."""
        return not self.few or (rows is not None and self.grid(rows) <= multiprocessors)

    def check(self, kernel: NormKernel, architecture: int) -> None:
        """Check that the hardware and the source support the layout.

        Raises:
            UsageError: the layout is not supported; the message says why.
        """
        threads, width = self.threads, kernel.width
        if threads < 1 or (threads % 32 if threads > 32 else threads & (threads - 1)):
            raise UsageError(f"threads for a row: expected a power of two or a multiple of 32, got {threads}.")
        if self.block % 32 or not 32 <= self.block <= MOST_THREADS or self.rows < 1:
            raise UsageError(f"threads of a block: expected a multiple of 32 up to 1024, got {self.rows}x{threads}.")
        if self.elements not in (1, 2, 4, 8, 16) or width % self.elements or self.vectors < 1:
            raise UsageError(f"vectors of {self.elements} elements do not divide a width of {width}.")
        if self.cluster not in (1, 2, 4, 8) or (self.cluster > 1 and (self.rows > 1 or architecture < 90)):
            raise UsageError(
                f"cluster of {self.cluster}: expected 1, or 2, 4 or 8, which requires sm_90 and one row a block."
            )


def choose(
    kernel: NormKernel,
    rows: int | None,
    architecture: int,
    alignment: int = WIDEST_ACCESS,
    multiprocessors: int = MULTIPROCESSORS,
) -> LaunchConfig:
    """The layout for a kernel: the first of `layouts` that suits the rows.

    Args:
        kernel: what the kernel computes.
        rows: number of rows; None if unknown.
        architecture: compute capability without the point, such as 90.
        alignment: see `layouts`.
        multiprocessors: of the GPU.

    Raises:
        UsageError: the alignment is smaller than an element or is not a power of two.
    """
    return next(config for config in layouts(kernel, architecture, alignment) if config.suits(rows, multiprocessors))


def layouts(kernel: NormKernel, architecture: int, alignment: int = WIDEST_ACCESS) -> list[LaunchConfig]:
    """The layouts of a kernel, from that for the fewest rows to that for any number.

    With few rows each thread reads one vector, or two of a wide row, so that a row uses as much of a multiprocessor as
    possible; with many rows it reads two, or four of a wide row. Of the thread counts that cover a width, one that
    covers it exactly is preferred. A narrow row is read by a warp or a part of one, several rows by one block. A row
    that does not fit in the registers of a block is read by a cluster if the architecture has clusters, else it is read
    twice. With very few rows a cluster reads each wide row, so that more multiprocessors take part.

    Args:
        kernel: what the kernel computes.
        architecture: compute capability without the point, such as 90.
        alignment: alignment of every pointer and row stride in bytes: a power of two, at least the widest dtype's size.

    Raises:
        UsageError: the alignment is smaller than an element or is not a power of two.
    """
    elements = _elements(kernel, alignment)
    vectors = kernel.width // elements
    widest = max(BYTES[dtype] for dtype in kernel.dtypes)
    if vectors <= 32 and kernel.width * widest <= _WARP_BYTES:
        return [_narrow(elements, vectors, few) for few in (True, False)]
    row_bytes, spread, found = kernel.width * _held(kernel), 1, []
    if architecture >= CLUSTER_ARCHITECTURE:
        if row_bytes > _CLUSTERED_BYTES:
            spread = 2 if row_bytes <= 2 * _CLUSTERED_BYTES else 4
        if row_bytes > _SPREAD_BYTES:
            wide = next((n for n in (2, 4) if row_bytes <= n * _SPREAD_SHARE), 8)
            found.append(_block(kernel, elements, vectors, wide, True, architecture))
    found += [_block(kernel, elements, vectors, spread, few, architecture) for few in (True, False)]
    for config in found:
        config.check(kernel, architecture)
    return found


def _block(kernel: NormKernel, elements: int, vectors: int, spread: int, few: bool, architecture: int) -> LaunchConfig:
    """A cluster of `spread` blocks for each row."""
    share = -(-vectors // spread)
    pairs = list(_pairs(kernel, elements, share))
    if architecture // 10 == 10 and kernel.adds and kernel.dtype == "float16" and share > _MOST_OF_FOUR:
        # NVRTC 13.0 spills registers of four vectors there (12 bytes at 512 threads, with 64 registers).
        pairs = [pair for pair in pairs if pair[1] <= 2] or pairs
    threads, held = min(pairs, key=lambda pair: _cost(pair, share, few))
    return LaunchConfig(threads, held, elements, 1, spread, few and held * elements <= 16, few)


def _elements(kernel: NormKernel, alignment: int) -> int:
    """Elements of one vector: 16 bytes of the narrowest input, if width and alignment allow it."""
    widest = max(BYTES[dtype] for dtype in kernel.dtypes)
    if alignment < widest or alignment & (alignment - 1):
        raise UsageError(f"alignment in bytes: expected a power of two of at least {widest}, got {alignment}.")
    narrowest = min(BYTES[dtype] for dtype in (kernel.dtype, kernel.residual_dtype or kernel.dtype))
    elements = WIDEST_ACCESS // (1 if narrowest == 2 and kernel.quantized != "none" else narrowest)
    while elements > 1 and (kernel.width % elements or not _aligned(kernel, elements, alignment)):
        elements //= 2
    return elements


def _aligned(kernel: NormKernel, elements: int, alignment: int) -> bool:
    return all(min(elements * BYTES[dtype], WIDEST_ACCESS) <= alignment for dtype in kernel.dtypes)


def _held(kernel: NormKernel) -> int:
    """Bytes of registers per element: x, the residual while it is added, and the gate; float32 if not packed."""
    gate = BYTES[kernel.dtype] if kernel.has_gate else 0
    residual = BYTES[kernel.residual_dtype or kernel.dtype] if kernel.adds else 0
    wide = 4 if kernel.gates_first else 0
    return max(BYTES[kernel.dtype] + residual + gate, wide + gate)


def _narrow(elements: int, vectors: int, few: bool) -> LaunchConfig:
    """A warp or a part of one for each row; with few rows one warp per block, to use more multiprocessors."""
    threads = 1
    while threads < vectors:
        threads *= 2
    return LaunchConfig(threads, 1, elements, (32 if few else _BLOCK_OF_WARPS) // threads, few=few)


def _pairs(kernel: NormKernel, elements: int, vectors: int) -> Iterator[tuple[int, int]]:
    """Thread counts, and vectors per thread, within the limit of registers."""
    bytes_held = _held(kernel) * elements
    for threads in range(32, MOST_THREADS + 1, 32):
        limit = next(held for most, held in sorted(_HELD.items()) if threads <= most)
        most = max(limit // bytes_held, 1)
        wanted = -(-vectors // threads)
        if wanted <= most:
            yield threads, wanted
        elif threads == MOST_THREADS:
            yield threads, most  # read in several tiles


def _cost(layout: tuple[int, int], vectors: int, few: bool) -> tuple[float, ...]:
    """Lower is better: tiles, then idle threads and the distance from the best thread count for the number of rows."""
    threads, held = layout
    tiles = -(-vectors // (threads * held))
    idle = tiles * threads * held / vectors - 1
    each = (1 if few else 2) * (1 if vectors < (_FEWEST_OF_TWO if few else _FEWEST_OF_FOUR) else 2)
    wanted = min(max(vectors / each, 128 if few else 64), MOST_THREADS if few else 512)
    uneven = 0.0 if threads & (threads - 1) == 0 else 0.02
    return (tiles, idle + abs(threads - wanted) / wanted * 0.25 + uneven)
