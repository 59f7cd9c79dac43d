"""The memory of a simulated GPU: arrays in global memory, and the shared memory of each block."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class PtxError(AssertionError):
    """A kernel does what is undefined on a GPU."""


class GlobalMemory:
    """Arrays, each between bytes that nothing may touch.

    Args:
        alignment: what every array is aligned to, and to no more, in bytes.
    """

    _BASE: Final = 1 << 32
    _GAP: Final = 4096

    def __init__(self, alignment: int = 16) -> None:
        self._alignment = alignment
        self._arrays: list[tuple[Array, int]] = []
        self._bytes = np.zeros(0, np.uint8)
        self._readable = self._writable = np.zeros(0, np.bool_)

    def put(self, array: Array, writable: bool) -> int:
        """Copy an array to the memory; its address."""
        content = np.frombuffer(array.tobytes(), np.uint8)
        begin = -(-(self._bytes.size + self._GAP) // (2 * self._alignment)) * 2 * self._alignment + self._alignment
        after = begin + content.size + self._GAP
        self._bytes, self._readable, self._writable = (
            np.concatenate([old, np.zeros(after - old.size, old.dtype)])
            for old in (self._bytes, self._readable, self._writable)
        )
        inside = slice(begin, begin + content.size)
        self._bytes[inside], self._readable[inside], self._writable[inside] = content, True, writable
        return self._BASE + begin

    def get(self, address: int, like: Array) -> Array:
        """The array at an address."""
        begin = address - self._BASE
        return np.frombuffer(self._bytes[begin : begin + like.nbytes].tobytes(), like.dtype).reshape(like.shape)

    def check(self, address: Array, size: int, writable: bool = False) -> Array:
        """The index of every byte of accesses [accesses, size].

        Raises:
            PtxError: an access is outside of the arrays or not aligned.
        """
        if (address % size).any():
            raise PtxError(f"an access of {size} bytes is not aligned")
        index = address[:, None] - self._BASE + np.arange(size)
        if ((index < 0) | (index >= self._bytes.size)).any():
            raise PtxError("an access outside of all arrays")
        if not (self._writable if writable else self._readable)[index].all():
            raise PtxError("a store outside of the outputs" if writable else "a load outside of the arrays")
        return index

    def load(self, address: Array, size: int) -> Array:
        """Bytes [accesses, size]."""
        return self._bytes[self.check(address, size)]

    def store(self, address: Array, values: Array) -> None:
        """Write bytes [accesses, size]."""
        self._bytes[self.check(address, values.shape[1], writable=True)] = values


class SharedMemory:
    """The shared memory of all blocks; the blocks of a cluster can read each other's.

    Every byte remembers who wrote and read it last, and at which count of barriers.
    """

    BASE: Final = 1 << 16
    _WINDOW: Final = 1 << 20
    _NOBODY: Final = -1
    _SEVERAL: Final = -2

    def __init__(self, size: int, block: Array, cluster: int) -> None:
        blocks = int(block[-1]) + 1
        self._size, self._block, self._cluster = size, block, cluster
        self._bytes = np.zeros((blocks, size), np.uint8)
        self._writer, self._reader = (np.full((blocks, size), self._NOBODY) for _ in range(2))
        self._written_at, self._read_at, self._read_afar_at = (np.full((blocks, size), -1) for _ in range(3))
        # Barriers of the block, and how many there had been at the last one of the cluster.
        self._now, self._clusters_last = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)

    @classmethod
    def mapped(cls, address: Array, rank: Array) -> Array:
        """The address in the block of a rank."""
        return (address + rank.astype(np.uint32) * np.uint32(cls._WINDOW)).astype(np.uint32)

    def block_barrier(self, block: int) -> None:
        """All threads of a block have met."""
        self._now[block] += 1

    def cluster_barrier(self, cluster: int) -> None:
        """All threads of a cluster have met."""
        blocks = slice(cluster * self._cluster, (cluster + 1) * self._cluster)
        self._now[blocks] += 1
        self._clusters_last[blocks] = self._now[blocks]

    def check_exit(self) -> None:
        """At the end of all threads.

        Raises:
            PtxError: a block was read by another with no barrier after that.
        """
        if (self._read_afar_at >= self._clusters_last[:, None]).any():
            raise PtxError("a block exits while another one may read its shared memory")

    def load(self, address: Array, size: int, mask: Array, of_cluster: bool) -> Array:
        """Bytes [accesses, size]; of another block if the address says so.

        Raises:
            PtxError: outside, not aligned, not written yet, or written by another thread with no barrier since.
        """
        block, index = self._place(address, size, mask, of_cluster)
        own, thread = self._block[mask][:, None], np.flatnonzero(mask)[:, None]
        if (self._writer[block, index] == self._NOBODY).any():
            raise PtxError("shared memory is read before it is written")
        met = np.where(block == own, self._now[block], self._clusters_last[block])
        if ((self._written_at[block, index] >= met) & (self._writer[block, index] != thread)).any():
            raise PtxError("shared memory is read with no barrier after it was written")
        block, thread = np.broadcast_to(block, index.shape), np.broadcast_to(thread, index.shape)
        again = (self._read_at[block, index] == self._now[block]) & (self._reader[block, index] != thread)
        self._reader[block, index] = thread
        self._reader[block[again], index[again]] = self._SEVERAL
        self._read_at[block, index] = self._now[block]
        afar = block != own
        self._read_afar_at[block[afar], index[afar]] = self._now[block[afar]]
        return self._bytes[block, index]

    def store(self, address: Array, values: Array, mask: Array) -> None:
        """Write bytes [accesses, size] of each thread's own block.

        Raises:
            PtxError: outside, not aligned, or read or written by another thread with no barrier since.
        """
        block, index = self._place(address, values.shape[1], mask, False)
        block = np.broadcast_to(block, index.shape)
        thread = np.broadcast_to(np.flatnonzero(mask)[:, None], index.shape)
        for who, when in ((self._writer, self._written_at), (self._reader, self._read_at)):
            if ((when[block, index] >= self._now[block]) & (who[block, index] != thread)).any():
                raise PtxError("shared memory is written with no barrier after another thread used it")
        if (self._read_afar_at[block, index] >= self._clusters_last[block]).any():
            raise PtxError("shared memory is written while another block may read it")
        self._bytes[block, index], self._writer[block, index] = values, thread
        if (self._writer[block, index] != thread).any():
            raise PtxError("two threads write to the same shared memory")
        self._written_at[block, index] = self._now[block]

    def _place(self, address: Array, size: int, mask: Array, of_cluster: bool) -> tuple[Array, Array]:
        """The block [accesses, 1] and the index in it [accesses, size] of every byte."""
        own = self._block[mask]
        rank, index = np.zeros_like(own), address - self.BASE
        if of_cluster:
            rank, index = index // self._WINDOW, index % self._WINDOW
            own = own - own % self._cluster
        index = index[:, None] + np.arange(size)
        if (address % size).any() or ((index < 0) | (index >= self._size)).any() or (rank >= self._cluster).any():
            raise PtxError(f"an access of {size} bytes to shared memory is outside or not aligned")
        return (own + rank)[:, None], index
