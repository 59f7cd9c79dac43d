"""How a kernel is laid out over threads: a pure choice by width, rows, dtypes and architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ...models.dtypes import BYTES
from ...models.errors import UsageError
from .norm_kernel import NormKernel

# Multiprocessors of the GPU that is chosen for where none is named (H200); fewer rows than this leave some idle.
MULTIPROCESSORS: Final = 132
MOST_THREADS: Final = 1024
WIDEST_ACCESS: Final = 16
# Registers that a thread may fill with what it loads, in bytes: with more, 1024 threads do not fit, or values spill.
_HELD: Final = {1024: 96, 512: 192, 256: 320}
# One warp reads a row of up to this many bytes by itself.
_WARP_BYTES: Final = 1024
_BLOCK_OF_WARPS: Final = 128
CLUSTER_ARCHITECTURE: Final = 90
_CLUSTERED_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """The layout of one kernel.

    Attributes:
        threads: of one block that read one row together: 1 to 16 a power of two, or a multiple of 32.
        vectors: that one thread holds at a time.
        elements: of one vector, a power of two up to 16; accesses are of up to 16 bytes.
        rows: that one block reads.
        cluster: blocks that read one row together; above 1 from sm_90 on.
        prefetch: the weight is loaded before the statistics are known.
    """

    threads: int
    vectors: int
    elements: int
    rows: int = 1
    cluster: int = 1
    prefetch: bool = False

    @property
    def block(self) -> int:
        """Threads of a block."""
        return self.threads * self.rows

    def tiles(self, width: int) -> int:
        """How often a row is read in parts; above 1 it is read again for the second half of the formula."""
        return -(-width // (self.cluster * self.threads * self.vectors * self.elements))

    def is_whole(self, width: int) -> bool:
        """Whether every thread always has something to read."""
        return width % (self.cluster * self.threads * self.vectors * self.elements) == 0

    def grid(self, rows: int) -> int:
        """Blocks for this many rows."""
        return -(-rows // self.rows) * self.cluster

    def check(self, kernel: NormKernel, architecture: int) -> None:
        """Hold the layout to what hardware and source can do.

        Raises:
            UsageError: it cannot be run; the message says why.
        """
        threads, width = self.threads, kernel.width
        if threads < 1 or (threads % 32 if threads > 32 else threads & (threads - 1)):
            raise UsageError(f"{threads} threads for a row: give a power of two up to 32, or a multiple of 32.")
        if self.block % 32 or not 32 <= self.block <= MOST_THREADS or self.rows < 1:
            raise UsageError(f"{self.rows} rows of {threads} threads: a block has a multiple of 32, at most 1024.")
        if self.elements not in (1, 2, 4, 8, 16) or width % self.elements or self.vectors < 1:
            raise UsageError(f"vectors of {self.elements} elements do not cut a width of {width} into whole ones.")
        if self.cluster not in (1, 2, 4, 8) or (self.cluster > 1 and (self.rows > 1 or architecture < 90)):
            raise UsageError(f"a cluster of {self.cluster} blocks needs sm_90 and one row a block, and is 2, 4 or 8.")


def choose(kernel: NormKernel, rows: int | None, architecture: int, alignment: int = WIDEST_ACCESS) -> LaunchConfig:
    """The layout for a kernel.

    Few rows get one vector a thread, so that a row is spread over as much of a multiprocessor as it fills; many get
    two. Of thread counts that cover a width, one that covers it exactly is preferred. Narrow rows are read by a warp
    or a part of one, several to a block. Where a row does not fit in the registers of a block it is spread over a
    cluster, where the architecture has them, or read twice.

    Args:
        kernel: what is computed.
        rows: how many rows; None where they are not known.
        architecture: compute capability without its point, such as 90.
        alignment: in bytes, of every pointer and row stride: a power of two, at least the widest dtype's.

    Raises:
        UsageError: the alignment does not allow whole values.
    """
    elements = _elements(kernel, alignment)
    vectors = kernel.width // elements
    widest = max(BYTES[dtype] for dtype in kernel.dtypes)
    few = rows is not None and rows <= MULTIPROCESSORS
    if vectors <= 32 and kernel.width * widest <= _WARP_BYTES:
        return _narrow(elements, vectors, few)
    spread = 1
    if architecture >= CLUSTER_ARCHITECTURE and kernel.width * _held(kernel) > _CLUSTERED_BYTES:
        spread = next((n for n in (2, 4) if kernel.width * _held(kernel) <= n * _CLUSTERED_BYTES), 4)
    per_block = -(-vectors // spread)
    threads, held = min(_layouts(kernel, elements, per_block), key=lambda layout: _cost(layout, per_block, few))
    config = LaunchConfig(threads, held, elements, 1, spread, few and held * elements <= 16)
    config.check(kernel, architecture)
    return config


def _elements(kernel: NormKernel, alignment: int) -> int:
    """Values of one vector: 16 bytes of the narrowest input, as far as width and alignment allow."""
    widest = max(BYTES[dtype] for dtype in kernel.dtypes)
    if alignment < widest or alignment & (alignment - 1):
        raise UsageError(f"an alignment of {alignment} bytes; it must be a power of two and at least {widest}.")
    narrowest = min(BYTES[dtype] for dtype in (kernel.dtype, kernel.residual_dtype or kernel.dtype))
    elements = WIDEST_ACCESS // (1 if narrowest == 2 and kernel.quantized != "none" else narrowest)
    while elements > 1 and (kernel.width % elements or not _aligned(kernel, elements, alignment)):
        elements //= 2
    return elements


def _aligned(kernel: NormKernel, elements: int, alignment: int) -> bool:
    return all(min(elements * BYTES[dtype], WIDEST_ACCESS) <= alignment for dtype in kernel.dtypes)


def _held(kernel: NormKernel) -> int:
    """Bytes that a thread holds for each value: x, and the residual while it is added; float32 where nothing packs."""
    gate = BYTES[kernel.dtype] if kernel.has_gate else 0
    residual = BYTES[kernel.residual_dtype or kernel.dtype] if kernel.adds else 0
    wide = 4 if kernel.gates_first or (kernel.adds and kernel.exact_sum) else 0
    return max(BYTES[kernel.dtype] + residual + gate, wide + gate)


def _narrow(elements: int, vectors: int, few: bool) -> LaunchConfig:
    """A warp or a part of one for each row; with few rows one warp a block, so that they spread."""
    threads = 1
    while threads < vectors:
        threads *= 2
    return LaunchConfig(threads, 1, elements, (32 if few else _BLOCK_OF_WARPS) // threads)


def _layouts(kernel: NormKernel, elements: int, vectors: int) -> Iterator[tuple[int, int]]:
    """Thread counts, and the vectors that each thread holds, within the registers that there are."""
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
    """Less is better: idle threads first, then the distance from the thread count that suits the number of rows."""
    threads, held = layout
    tiles = -(-vectors // (threads * held))
    idle = tiles * threads * held / vectors - 1
    wanted = min(max(vectors if few else vectors / 2, 128 if few else 64), MOST_THREADS if few else 512)
    uneven = 0.0 if threads & (threads - 1) == 0 else 0.02
    return (tiles, idle + abs(threads - wanted) / wanted * 0.25 + uneven)
