"""A GPU for one PTX kernel, in NumPy: every thread of the grid at once, the threads at the lowest instruction first.

What would be undefined on a GPU is an error here (`PtxError`): an access outside of an array or not aligned, shared
memory read before it is written, or used by two threads with no barrier in between, a shuffle that lanes miss, threads
that wait for each other in vain, a block that exits while another reads its shared memory, and global memory touched
before `griddepcontrol.wait`, which from sm_90 on every thread must call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .ptx_arithmetic import TYPES, Approximation, Array, operation
from .ptx_memory import GlobalMemory, PtxError, SharedMemory

_REGISTERS = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "f32": np.uint32, "b64": np.uint64}
_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*([^;]*);")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"\[([%\w$]+)(?:\+(-?\d+))?\]")
RUNNING, AT_BLOCK_BARRIER, AT_CLUSTER_BARRIER, DONE = range(4)


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name, operands, and the predicate that guards it (`negated`: must be false)."""

    name: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    text: str

    @property
    def parts(self) -> list[str]:
        """The name at its points; `shared::cluster` is one part."""
        return self.name.split(".")


class Program:
    """The one kernel of a PTX text.

    Attributes:
        architecture: the target, such as 90.
        parameters: names of the parameters, in order.
        shared: bytes of shared memory, and the offset of each of its variables.
        directives: such as `maxntid`.
        registers: dtype of each kind of register, by the beginning of its name.
        instructions: in order.
        labels: index of the instruction behind each label.
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        entries = list(re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{", text))
        target = re.search(r"\.target sm_(\d+)", text)
        if len(entries) != 1 or target is None:
            raise PtxError(f"expected PTX with one .entry and a .target, got {len(entries)} entries")
        body = text[entries[0].end() : text.rindex("}")]
        self.architecture = int(target[1])
        self.parameters = [parameter.split()[-1] for parameter in entries[0][2].split(",")]
        self.directives = {name: int(value) for name, value in re.findall(r"\.(\w+) (\d+)", entries[0][3])}
        declared = re.findall(r"\.reg \.(\w+)\s+([%\w]+)[<;]", body)  # `%r<9>;`, or in a scope `name;`
        self.registers = {name: _REGISTERS[kind] for kind, name in declared}
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        for name, count in re.findall(r"\.shared [^;]*?\.b8 (\w+)\[(\d+)\]", text):
            self.shared[name] = self.shared_bytes
            self.shared_bytes += -(-int(count) // 16) * 16
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in body.split("\n"):
            self._read(line.strip())

    def check_launch(self, threads: int, cluster: int) -> None:
        """Check a launch against the kernel's own directives.

        Raises:
            PtxError: too many threads, or other clusters.
        """
        if threads > self.directives.get("maxntid", 1024):
            raise PtxError(f"expected at most {self.directives['maxntid']} threads in a block, got {threads}")
        if cluster != self.directives.get("reqnctapercluster", 1):
            raise PtxError(f"expected clusters of {self.directives.get('reqnctapercluster', 1)}, got {cluster}")

    def _read(self, line: str) -> None:
        while line:
            if label := re.match(r"(\$?[\w$]+):\s*", line):
                self.labels[label[1]] = len(self.instructions)
                line = line[label.end() :]
            elif line[0] in "{}":
                line = line[1:].strip()
            elif line[0] == ".":
                line = line.partition(";")[2].strip()
            elif found := _INSTRUCTION.match(line):
                negated, guard, name, operands = found.groups()
                self.instructions.append(
                    Instruction(name, tuple(_OPERAND.findall(operands)), guard, bool(negated), found[0])
                )
                line = line[found.end() :].strip()
            else:
                raise PtxError(f"expected an instruction, got {line!r}")


class Machine:
    """One launch of a kernel."""

    def __init__(
        self, program: Program, memory: GlobalMemory, arguments: Sequence[int], grid: int, threads: int, cluster: int,
        approximation: Approximation,
    ) -> None:  # fmt: skip
        program.check_launch(threads, cluster)
        self.program, self.memory, self._approximation = program, memory, approximation
        self.count, self._threads, self._cluster = grid * threads, threads, cluster
        number = np.arange(self.count)
        self.thread, self.block = number % threads, number // threads
        self.shared = SharedMemory(program.shared_bytes, self.block, cluster)
        self._special = {
            "%tid.x": self.thread, "%ctaid.x": self.block, "%ntid.x": np.full(1, threads),
            "%cluster_ctarank": self.block % cluster, "%laneid": number % 32,
            "%cluster_nctarank": np.full(1, cluster),
        }  # fmt: skip
        self._parameters = dict(zip(program.parameters, arguments, strict=True))
        self._registers: dict[str, Array] = {}
        self._next = np.zeros(self.count, np.int64)
        self._state = np.full(self.count, RUNNING)
        self._arrived = np.zeros(self.count, np.int64)  # 0, or 1 with relaxed order, or 2
        self._may_touch = np.zeros(self.count, np.bool_)
        self._steps: list[Callable[[Array], None]] = [self._step(each) for each in program.instructions]

    def run(self) -> None:
        """Run all threads to their ends.

        Raises:
            PtxError: see the module.
        """
        with np.errstate(all="ignore"):
            while True:
                running = self._state == RUNNING
                if running.any():
                    self._run_lowest(running)
                elif (self._state == DONE).all():
                    break
                else:
                    self._release()
        self.shared.check_exit()
        if self.program.architecture >= 90 and not self._may_touch.all():
            raise PtxError("threads end without griddepcontrol.wait")

    def _run_lowest(self, running: Array) -> None:
        """The threads at the lowest instruction, up to a jump or a wait or to where other threads are."""
        first = int(self._next[running].min())
        active = running & (self._next == first)
        others = self._next[running & ~active]
        end = int(others.min()) if others.size else len(self._steps)
        for index in range(first, end):
            instruction = self.program.instructions[index]
            self._next[active] = index + 1
            mask = active
            if instruction.guard is not None:
                mask = active & (self.read(instruction.guard, "pred") ^ instruction.negated)
            if mask.any():
                try:
                    self._steps[index](mask)
                except PtxError as error:
                    raise PtxError(f"{instruction.text} (instruction {index}): {error}") from None
            if instruction.parts[0] in ("bra", "bar", "barrier", "ret", "exit"):
                return

    def _release(self) -> None:
        """Let threads go on that wait for others that have all come."""
        waiting, any_released = self._state.reshape(-1, self._threads), False
        for block in np.flatnonzero((waiting == AT_BLOCK_BARRIER).all(axis=1)):
            waiting[block], any_released = RUNNING, True
            self.shared.block_barrier(block)
        clusters = self._state.reshape(-1, self._threads * self._cluster)
        arrived = self._arrived.reshape(clusters.shape)
        for cluster in np.flatnonzero((arrived > 0).all(axis=1) & (clusters == AT_CLUSTER_BARRIER).all(axis=1)):
            if (arrived[cluster] == 2).all():
                self.shared.cluster_barrier(cluster)
            clusters[cluster], arrived[cluster], any_released = RUNNING, 0, True
        if not any_released:
            raise PtxError("threads wait for each other in vain")

    # Operands ------------------------------------------------------------------------------------------------------

    def read(self, operand: str, kind: str) -> Array:
        """An operand as values of a type: of every thread, or one for all."""
        dtype = np.dtype(TYPES[kind])
        if operand in self._special:
            bits = self._special[operand].astype(np.uint32)
        elif operand in self._registers:
            bits = self._registers[operand]
        elif operand.startswith("%"):
            raise PtxError(f"{operand} is read before it is written")
        elif operand in self.program.shared:
            bits = np.full(1, SharedMemory.BASE + self.program.shared[operand], np.uint64)
        elif operand.startswith("0f"):
            bits = np.full(1, int(operand[2:], 16), np.uint32)
        else:
            bits = np.full(1, int(operand, 0) & (1 << 64) - 1, np.uint64)
        if dtype == np.bool_:
            return bits.astype(np.bool_)
        return bits.astype(f"u{dtype.itemsize}", copy=False).view(dtype)

    def write(self, register: str, values: Array, mask: Array) -> None:
        """Values to a register, where the mask is set; a narrower integer is extended by its sign or by zeros."""
        if register == "_":
            return
        kind = np.dtype(self.program.registers[re.sub(r"\d+$", "", register)])
        if values.dtype.itemsize < kind.itemsize and values.dtype.kind in "iu":
            values = values.astype(f"{values.dtype.kind}{kind.itemsize}")
        bits = values if kind == np.bool_ else values.view(kind)
        before = self._registers.get(register)
        whole = mask.all()
        self._registers[register] = (
            np.array(np.broadcast_to(bits, self.count)) if whole
            else np.where(mask, bits, np.zeros(self.count, kind) if before is None else before)
        )  # fmt: skip

    def _address(self, operand: str) -> Array:
        found = _ADDRESS.fullmatch(operand)
        if found is None:
            raise PtxError(f"expected an address, got {operand}")
        name, offset = found[1], int(found[2] or 0)
        kind = (
            "u32" if name.startswith("%") and self._registers.get(name, np.zeros(1, np.uint64)).itemsize == 4 else "u64"
        )
        return np.broadcast_to(self.read(name, kind).astype(np.int64) + offset, self.count)

    # Instructions --------------------------------------------------------------------------------------------------

    def _step(self, instruction: Instruction) -> Callable[[Array], None]:
        """What an instruction does to the threads of a mask.

        Raises:
            NotImplementedError: it is unknown.
        """
        parts, operands = instruction.parts, instruction.operands
        if parts[0] == "mov" and any(operand.startswith("{") for operand in operands):
            return lambda mask: self._move_halves(operands, mask)
        known = operation(instruction.name, self._approximation)
        if known is not None:
            if len(operands) != 1 + len(known.operands):
                raise PtxError(f"expected {1 + len(known.operands)} operands: {instruction.text}")

            def compute(mask: Array) -> None:
                given = [self.read(operand, kind) for operand, kind in zip(operands[1:], known.operands, strict=True)]
                self.write(operands[0], known.function(*given).astype(TYPES[known.result], copy=False), mask)

            return compute
        for pattern, handler in _HANDLERS.items():
            if re.fullmatch(pattern, instruction.name):
                return lambda mask: handler(self, parts, operands, mask)
        raise NotImplementedError(f"unknown instruction {instruction.name}: {instruction.text}")

    def _move_halves(self, operands: tuple[str, ...], mask: Array) -> None:
        to, of = operands
        if of.startswith("{"):
            low, high = (self.read(half, "u16").astype(np.uint32) for half in _names(of))
            self.write(to, low | high << np.uint32(16), mask)
        else:
            word = self.read(of, "u32")
            for half, shift in zip(_names(to), (0, 16), strict=True):
                self.write(half, (word >> np.uint32(shift)).astype(np.uint16), mask)

    def _branch(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        self._next[mask] = self.program.labels[operands[0]]

    def _end(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        self._state[mask] = DONE

    def _block_barrier(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        self._state[mask] = AT_BLOCK_BARRIER

    def _cluster_barrier(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        if parts[2] == "wait":
            self._state[mask] = AT_CLUSTER_BARRIER
        elif (self._arrived[mask] > 0).any():
            raise PtxError("threads arrive twice at the barrier of a cluster")
        else:
            self._arrived[mask] = 1 if "relaxed" in parts else 2

    def _same_address(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        """cvta: here generic addresses are those of global and shared memory."""
        self.write(operands[0], self.read(operands[1], parts[-1]), mask)

    def _wait_for_previous(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        self._may_touch[mask] = True

    def _nothing(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        pass

    def _prefetch(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        self.memory.check(self._address(operands[0])[mask], 1)

    def _load_parameter(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        dtype = np.dtype(TYPES[parts[-1]])
        value = self._parameters[operands[1].strip("[]")] & (1 << 8 * dtype.itemsize) - 1
        self.write(operands[0], np.full(1, value, f"u{dtype.itemsize}").view(dtype), mask)

    def _load(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        dtype, registers, address = np.dtype(TYPES[parts[-1]]), _names(operands[0]), self._address(operands[1])
        size = dtype.itemsize * len(registers)
        if "global" in parts:
            self._check_wait(mask)
            found = self.memory.load(address[mask], size)
        else:
            found = self.shared.load(address[mask], size, mask, "shared::cluster" in parts)
        values = np.zeros((self.count, size), np.uint8)
        values[mask] = found
        for register, column in zip(registers, values.view(dtype).T, strict=True):
            self.write(register, np.ascontiguousarray(column), mask)

    def _store(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        address = self._address(operands[0])[mask]
        columns = [np.broadcast_to(self.read(name, parts[-1]), self.count)[mask] for name in _names(operands[1])]
        values = np.stack(columns, axis=1).view(np.uint8)
        if "global" in parts:
            self._check_wait(mask)
            self.memory.store(address, values)
        else:
            self.shared.store(address, values, mask)

    def _check_wait(self, mask: Array) -> None:
        if self.program.architecture >= 90 and not self._may_touch[mask].all():
            raise PtxError("global memory is touched before griddepcontrol.wait")

    def _map_address(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        address, rank = self.read(operands[1], "u32"), np.broadcast_to(self.read(operands[2], "u32"), self.count)
        if (rank[mask] >= self._cluster).any():
            raise PtxError(f"expected a rank below {self._cluster}, got {rank[mask].max()}")
        self.write(operands[0], SharedMemory.mapped(address, rank), mask)

    def _shuffle(self, parts: list[str], operands: tuple[str, ...], mask: Array) -> None:
        to, *predicate = operands[0].split("|")
        value, by, clamp, members = (
            np.broadcast_to(self.read(o, "u32"), self.count).astype(np.int64) for o in operands[1:]
        )
        lanes = np.arange(self.count) % 32
        wanted = (members >> lanes & 1).astype(np.bool_).reshape(-1, 32)
        warps = mask.reshape(-1, 32)
        if (warps != wanted)[warps.any(axis=1)].any():
            raise PtxError("the lanes of a shuffle are not those of its mask")
        segment, limit = clamp >> 8 & 31, clamp & 31
        last = (lanes & segment) | (limit & ~segment)
        first = lanes & segment
        source = {"bfly": lanes ^ by, "up": lanes - by, "down": lanes + by, "idx": first | (by & ~segment & 31)}[
            parts[2]
        ]
        valid = source >= last if parts[2] == "up" else source <= last
        taken = value[np.arange(self.count) - lanes + np.where(valid, source & 31, lanes)]
        self.write(to, taken.astype(np.uint32), mask)
        for name in predicate:
            self.write(name, valid, mask)


def _names(operand: str) -> list[str]:
    """The registers of `{%r1, %r2}`, or the one that stands alone."""
    return [name.strip() for name in operand.strip("{}").split(",")]


_HANDLERS: Final[dict[str, Callable[[Machine, list[str], tuple[str, ...], Array], None]]] = {
    r"bra(\.uni)?": Machine._branch,
    r"ret|exit": Machine._end,
    r"bar\.sync": Machine._block_barrier,
    r"barrier\.cluster\.(arrive(\.(release|relaxed))?|wait(\.acquire)?)(\.aligned)?": Machine._cluster_barrier,
    r"cvta(\.to)?\.(global|shared)\.u64": Machine._same_address,
    r"griddepcontrol\.wait": Machine._wait_for_previous,
    r"griddepcontrol\.launch_dependents": Machine._nothing,
    r"prefetch\.global\.L[12]": Machine._prefetch,
    r"ld\.param\.[bus](16|32|64)": Machine._load_parameter,
    r"ld\.(global|shared|shared::cluster)(\.nc)?(\.v[24])?\.([bus](8|16|32|64)|f32)": Machine._load,
    r"st\.(global|shared)(\.v[24])?\.([bus](8|16|32|64)|f32)": Machine._store,
    r"mapa\.shared::cluster\.u32": Machine._map_address,
    r"shfl\.sync\.(bfly|up|down|idx)\.b32": Machine._shuffle,
}
