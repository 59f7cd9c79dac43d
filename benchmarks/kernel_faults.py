"""Faults planted in the kernel's source, one at a time, which the interpreter of its PTX must find, without a GPU.

    python -m benchmarks.kernel_faults                         # a minute
    python -m benchmarks.kernel_faults --only 'e4m3|int8'      # faults whose description matches
    python -m benchmarks.kernel_faults --markdown FILE

Most faults are in lines that only a device compiles, which tests on the host cannot see: conversions, roots, shuffles,
barriers, clusters. For each, the source is copied, one text in it is replaced, which must be there exactly once, and a
few kernels are compiled to PTX and compared with the float64 reference as `tests/plugins/kernel/test_ptx.py` does. The
table says what found the fault: a result beyond the limit, or what would be undefined on a GPU. The exit code is 1 if a
fault is missed, or if a kernel without a fault fails. Requires NVRTC: pip install 'rmsnorm-deploy[kernel]'.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rmsnorm_deploy.plugins.kernel.launch_config import layouts
from rmsnorm_deploy.plugins.kernel.norm_kernel import SOURCE_FOLDER, NormKernel, Op
from tests.helpers.plugins.kernel_cases import (
    EPSILON,
    SPECIAL,
    check_against_reference,
    check_quantized,
    check_quantized_nan_and_infinity,
    with_unquantized,
)
from tests.helpers.plugins.kernels import PtxKernels
from tests.helpers.plugins.ptx_memory import PtxError

Check = Callable[[Path], None]
NUMBERS, NORM, KERNEL = "numbers.cuh", "rms_norm.cuh", "kernel.cu"
ARCHITECTURE: Final = 90


@dataclass(frozen=True)
class Fault:
    """A text of the source, what replaces it, and the names of the checks of which one must fail."""

    what: str
    file: str
    old: str
    new: str
    checks: tuple[str, ...]
    device_only: bool = True


def _norm(width: int, dtype: str, op: Op = "rms_norm", few: bool = True, **changes: object) -> Check:
    def check(sources: Path) -> None:
        kernel = NormKernel(width, EPSILON, op, dtype, **changes)  # type: ignore[arg-type]
        config = layouts(kernel, ARCHITECTURE)[0 if few else -1]
        cases = [(kernel, config)]
        if kernel.quantized == "none":
            check_against_reference([("", kernel, config)], PtxKernels(sources, cases, sources=sources))
        else:
            cases = with_unquantized(cases)
            check_quantized(cases, PtxKernels(sources, cases, sources=sources))

    return check


def _special(sources: Path) -> None:
    cases = [(kernel, layouts(kernel, ARCHITECTURE)[-1]) for kernel in SPECIAL]
    check_quantized_nan_and_infinity(SPECIAL, PtxKernels(sources, cases, sources=sources))


def _quantized(width: int, dtype: str, quantized: str, quantization: str, op: Op = "rms_norm") -> Check:
    return _norm(width, dtype, op, quantized=quantized, quantization=quantization)


CHECKS: Final[dict[str, Check]] = {
    "float32": _norm(128, "float32", "add_rms_norm"),
    "float16": _norm(1000, "float16", "add_rms_norm"),
    "bfloat16": _norm(1000, "bfloat16", "add_rms_norm"),
    "odd float16": _norm(7, "float16"),
    "odd bfloat16": _norm(7, "bfloat16", "add_rms_norm"),
    "several rows": _norm(64, "float16", few=False),
    "block": _norm(4096, "bfloat16"),
    "cluster": _norm(16384, "bfloat16", "add_rms_norm"),
    "gate": _norm(128, "float16", gate="after", activation="silu"),
    "int8": _quantized(128, "float16", "int8", "static"),
    "e4m3": _quantized(128, "bfloat16", "float8_e4m3", "static"),
    "odd int8": _quantized(7, "float16", "int8", "static"),
    "odd e4m3": _quantized(7, "float16", "float8_e4m3", "static"),
    "row scale, float16": _quantized(1000, "float16", "int8", "per_row"),
    "row scale, bfloat16": _quantized(1000, "bfloat16", "float8_e4m3", "per_row"),
    "row scale, cluster": _quantized(16384, "bfloat16", "float8_e4m3", "per_row", "add_rms_norm"),
    "nan and infinity": _special,
}


def _packed(kind: str) -> Iterator[Fault]:
    """Faults of the conversion of two values to one word."""
    end = '"f"(high), "f"(low));\n    return pair;\n  }\n'
    end += "  if constexpr (same<T, BFloat16>)" if kind == "f16" else "#endif\n  return T::narrow(low)"
    line, checks = f'asm("cvt.rn.{kind}x2.f32 %0, %1, %2;"', ("float16" if kind == "f16" else "bfloat16",)
    whole = f'{line} : "=r"(pair) : {end}'
    for what, pair in (("exchanged", "low high"), ("both the first", "low low"), ("both the second", "high high")):
        high, low = pair.split()
        new = whole.replace('"f"(high), "f"(low)', f'"f"({high}), "f"({low})')
        yield Fault(f"halves of {kind}x2: {what}", NUMBERS, whole, new, checks)
    yield Fault(f"{kind}x2 rounds to zero", NUMBERS, line, line.replace(".rn.", ".rz."), checks)
    yield Fault(f"{kind}x2 drops negative values", NUMBERS, line, line.replace(".rn.", ".rn.relu."), checks)
    other = "bf16" if kind == "f16" else "f16"
    yield Fault(f"{kind}x2 is {other}x2", NUMBERS, line, line.replace(f"{kind}x2", f"{other}x2"), checks)


def _largest(kind: str, dtype: str) -> Iterator[Fault]:
    """Faults of the largest absolute value of packed halves."""
    checks, absolute, most = (f"row scale, {dtype}",), f'asm("abs.{kind}x2 %0, %1;"', f'asm("max.{kind}x2 %0, %1, %2;"'
    yield Fault(f"no absolute values of {kind}x2", NUMBERS, absolute, 'asm("mov.b32 %0, %1;"', checks)
    yield Fault(f"smallest of {kind}x2", NUMBERS, most, most.replace("max", "min"), checks)
    rest = ' : "=r"(most) : "r"(most), "r"(size));'
    yield Fault(f"last of {kind}x2", NUMBERS, most + rest, (most + rest).replace('"r"(most), ', '"r"(size), '), checks)


def _conversions() -> Iterator[Fault]:
    """Faults of the other conversions."""

    def fault(what: str, old: str, new: str, *checks: str) -> Fault:
        return Fault(what, NUMBERS, old, new, checks)

    half = '"h"(static_cast<u16>(bits))'
    yield fault("float16 is read one bit off", half, '"h"(static_cast<u16>(bits >> 1))', "float16")
    yield fault("float16 rounds to zero", "cvt.rn.f16.f32", "cvt.rz.f16.f32", "odd float16")
    yield fault("bfloat16 rounds to zero", "cvt.rn.bf16.f32", "cvt.rz.bf16.f32", "odd bfloat16")
    yield fault("float16 is bfloat16", "cvt.rn.f16.f32", "cvt.rn.bf16.f32", "odd float16")
    yield fault(
        "last bit of float32 bits", "return __uint_as_float(bits)", "return __uint_as_float(bits & ~0xffu)", "float32"
    )
    yield fault(
        "last bits of stored float32",
        "return __float_as_uint(value)",
        "return __float_as_uint(value) & ~0xffu",
        "float32",
    )
    for mode in ("rzi", "rmi"):
        yield fault(f"int8 rounds by {mode}", "cvt.rni.sat.s8.f32", f"cvt.{mode}.sat.s8.f32", "odd int8")
    yield fault("int8 saturates as u8", "cvt.rni.sat.s8.f32", "cvt.rni.sat.u8.f32", "odd int8")
    yield fault("int8 does not saturate", "cvt.rni.sat.s8.f32", "cvt.rni.s32.f32", "odd int8")
    yield fault(
        "sign of int8 lost", "static_cast<u32>(rounded) & 0xffu", "static_cast<u32>(rounded) & 0x7fu", "odd int8"
    )
    yield fault("e4m3: the other half", '"f"(0.0f), "f"(value)', '"f"(value), "f"(0.0f)', "odd e4m3")
    yield fault("sign of e4m3 lost", "return pair & 0xffu;", "return pair & 0x7fu;", "odd e4m3")
    first, second = '"=h"(low) : "f"(b), "f"(a)', '"=h"(high) : "f"(d), "f"(c)'
    yield fault("four e4m3: first pair exchanged", first, '"=h"(low) : "f"(a), "f"(b)', "e4m3")
    yield fault("four e4m3: second pair exchanged", second, '"=h"(high) : "f"(c), "f"(d)', "e4m3")
    yield fault("four e4m3: third value twice", second, '"=h"(high) : "f"(c), "f"(c)', "e4m3")
    pairs = "static_cast<u32>(low) | static_cast<u32>(high) << 16"
    yield fault("four e4m3: pairs exchanged", pairs, "static_cast<u32>(high) | static_cast<u32>(low) << 16", "e4m3")
    yield fault("four e4m3: second pair one byte low", pairs, pairs.replace("16", "8"), "e4m3")
    for i, name in enumerate("abcd"):
        line = f'asm("cvt.rni.s32.f32 %0, %1;" : "=r"(of_{name}) : "f"({name}));'
        mode = ("rzi", "rmi", "rpi", "rzi")[i]
        yield fault(f"four int8: value {i} rounds by {mode}", line, line.replace("rni", mode), "int8")
    yield fault("four int8: last value is the third", '"=r"(of_d) : "f"(d)', '"=r"(of_d) : "f"(c)', "int8")
    yield fault("four int8: second pair exchanged", '"r"(of_d), "r"(of_c)', '"r"(of_c), "r"(of_d)', "int8")
    yield fault("four int8: first pair exchanged", '"r"(of_b), "r"(of_a)', '"r"(of_a), "r"(of_b)', "int8")
    yield fault("four int8: second pair lost", '"r"(of_a), "r"(high)', '"r"(of_a), "r"(0)', "int8")
    saturated = 'asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all)'
    yield fault("four int8: first pair saturates as u8", saturated, saturated.replace(".s8.", ".u8."), "int8")
    checks = ("row scale, float16", "row scale, bfloat16")
    halves = "fmaxf(T::widen(most & 0xffffu), T::widen(most >> 16))"
    yield fault("largest of low halves only", halves, "T::widen(most & 0xffffu)", *checks)
    yield fault("largest of high halves only", halves, "T::widen(most >> 16)", *checks)
    yield fault(
        "largest: first word left out",
        "i = 0; i < words; ++i) {\n        u32 size",
        "i = 1; i < words; ++i) {\n        u32 size",
        *checks,
    )
    words = "i < words; ++i) {\n        u32 size"
    yield fault("largest: last word left out", words, words.replace("words;", "words - 1;"), *checks)
    yield fault(
        "largest is not below 16",
        "u32 most = 0;",
        "u32 most = same<T, Float16> ? 0x4c004c00u : 0x41804180u;",
        *checks,
        "row scale, cluster",
    )


def _threads() -> Iterator[Fault]:
    """Faults between threads, and of the root."""

    def fault(what: str, old: str, new: str, *checks: str, file: str = NORM) -> Fault:
        return Fault(what, file, old, new, checks)

    shuffle = "__shfl_xor_sync(0xffffffffu, value, distance)"
    for what, new in (
        ("mask of half a warp", "__shfl_xor_sync(0xffffu, value, distance)"),
        ("halves of a warp apart", "__shfl_xor_sync(0xffffffffu, value, distance, 16)"),
        ("lane below instead of across", "__shfl_down_sync(0xffffffffu, value, distance)"),
        ("lane above instead of across", "__shfl_up_sync(0xffffffffu, value, distance)"),
        ("half the distance", "__shfl_xor_sync(0xffffffffu, value, distance / 2)"),
        ("first lane", "__shfl_sync(0xffffffffu, value, 0)"),
    ):
        yield fault(f"shuffle: {what}", shuffle, new, "block", "several rows")
    yield fault(
        "shuffle: by lanes of a part of a warp",
        shuffle,
        "(threadIdx.x % 2 ? value : __shfl_xor_sync(0x55555555u, value, distance))",
        "block",
    )
    root = "return __frsqrt_rn(value);"
    for what, new in (
        ("is not inverse", "return __fsqrt_rn(value);"),
        ("is only inverse", "return __frcp_rn(value);"),
        ("is off by 1%", "return __frsqrt_rn(value) * 1.01f;"),
        ("is off by 2^-11", "return __frsqrt_rn(value) * 1.00048828125f;"),
        ("adds epsilon again", "return __frsqrt_rn(value + 1e-6f);"),
        ("of 0 is not infinite but 0", "return __frsqrt_rn(fmaxf(value, 1.0f));"),
    ):
        yield fault(f"root {what}", root, new, "float16", "float32")
    newton = "float y = float_of(0x5f3759dfu - (bits_of(value) >> 1)); "
    step = "y = y * (1.5f - 0.5f * value * y * y); "
    yield fault("root without a Newton step", root, newton + "return y;", "float16")
    yield fault("root with one Newton step of three", root, newton + step + "return y;", "float16")
    yield fault("root with two Newton steps of three", root, newton + step + step + "return y;", "float16", "float32")
    yield fault("exponential to base 2", "return expf(value);", "return exp2f(value);", "gate")
    yield fault("exponential off by 0.1%", "return expf(value);", "return expf(value) * 1.001f;", "gate")
    yield fault("rank in the cluster is the block's", "%%cluster_ctarank", "%%ctaid.x", "cluster")
    yield fault("rank in the cluster is its size", "%%cluster_ctarank", "%%cluster_nctarank", "cluster")
    barrier = r'"barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;"'
    yield fault("barrier of a cluster: missing", barrier, '""', "cluster")
    yield fault("barrier of a cluster: no wait", barrier, '"barrier.cluster.arrive.release.aligned;"', "cluster")
    yield fault("barrier of a cluster: no arrival", barrier, '"barrier.cluster.wait.acquire.aligned;"', "cluster")
    yield fault("barrier of a cluster: of a block only", barrier, '"bar.sync 0;"', "cluster")
    yield fault("barrier of a cluster: relaxed order", "cluster.arrive.release", "cluster.arrive.relaxed", "cluster")
    wait = 'asm volatile("griddepcontrol.wait;" ::: "memory");'
    yield fault("wait for the previous kernel: missing", wait, "", "block")
    yield fault("wait for the previous kernel: one warp only", wait, f"if (threadIdx.x < 32) {wait}", "block")
    yield fault(
        "prefetch is a load", "prefetch.global.L2 [%0];", "{.reg .b32 word; ld.global.b32 word, [%0];}", "block"
    )
    yield fault("shared memory: rank 0 of all", '"r"(address), "r"(rank)', '"r"(address), "r"(0u)', "cluster")
    yield fault("shared memory: the next rank", '"r"(address), "r"(rank)', '"r"(address), "r"(rank + 1)', "cluster")
    yield fault("shared memory: the next word", '"r"(address), "r"(rank)', '"r"(address + 4), "r"(rank)', "cluster")
    yield fault("shared memory: of this block only", '"r"(theirs)', '"r"(address)', "cluster")
    yield fault(
        "shared memory: too little",
        "__shared__ float name[count]",
        "__shared__ float name[(count) / 2]",
        "row scale, cluster",
        "block",
    )
    yield fault("no clusters", "__cluster_dims__(RMSNORM_CLUSTER)", "__cluster_dims__(1)", "cluster", file=KERNEL)
    yield fault(
        "clusters twice the size",
        "__cluster_dims__(RMSNORM_CLUSTER)",
        "__cluster_dims__(2 * RMSNORM_CLUSTER)",
        "cluster",
        file=KERNEL,
    )
    bounds = "__launch_bounds__(RMSNORM_THREADS * RMSNORM_ROWS)"
    yield fault(
        "bounds of a launch without its rows", bounds, "__launch_bounds__(RMSNORM_THREADS)", "several rows", file=KERNEL
    )


def _everywhere() -> Iterator[Fault]:
    """Faults in lines that the host compiles too."""

    def fault(what: str, old: str, new: str, *checks: str, file: str = NORM) -> Fault:
        return Fault(what, file, old, new, checks, device_only=False)

    yield fault("no barrier between warps", "    __syncthreads();\n", "", "block")
    yield fault(
        "no barrier before a block of a cluster exits",
        "if constexpr (C::cluster > 1) cluster_barrier();\n}",
        "}",
        "cluster",
    )
    yield fault("last warp left out", "for (int i = 1; i < warps; ++i)", "for (int i = 1; i < warps - 1; ++i)", "block")
    yield fault(
        "tail dropped", "return whole || column < C::width;", "return whole || column + count < C::width;", "float16"
    )
    yield fault("tail not checked", "return whole || column < C::width;", "return true;", "float16")
    weight = "to.load(at<typename C::Weight>(a.weight, weight_begin(row) + column(tile, vector)))"
    yield fault("weight one vector late", weight, weight.replace("vector)", "vector) + count"), "block")
    yield fault("sum written over y", "held[v].store(at<Held>(a.sum,", "held[v].store(at<Held>(a.y,", "float32")
    yield fault(
        "store to the other half",
        "make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3])",
        "make_uint4(word[i + 2], word[i + 3], word[i], word[i + 1])",
        "block",
        file=NUMBERS,
    )
    yield fault("dead rows are written", "  if (live) {\n", "  {\n", "several rows")


def faults() -> list[Fault]:
    """All faults."""
    return [
        *_packed("f16"), *_packed("bf16"), *_largest("f16", "float16"), *_largest("bf16", "bfloat16"), *_conversions(),
        *_threads(), *_everywhere(),
    ]  # fmt: skip


def line_of(fault: Fault) -> int:
    """The line of the source that a fault is in.

    Raises:
        ValueError: the text to replace is not there exactly once.
    """
    text = (SOURCE_FOLDER / fault.file).read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.what}: expected {fault.old!r} once in {fault.file}, got {text.count(fault.old)} times"
        )
    return text[: text.index(fault.old)].count("\n") + 1


def found(fault: Fault) -> str | None:
    """What found a fault; None if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "cuda"
        shutil.copytree(SOURCE_FOLDER, sources)
        source = sources / fault.file
        source.write_text(source.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        return next((reason for name in fault.checks if (reason := failure(name, sources))), None)


def failure(check: str, sources: Path) -> str | None:
    """Why a check fails, in a few words; None if it passes."""
    try:
        CHECKS[check](sources)
    except PtxError as error:
        return f"{check}: {str(error).rpartition('): ')[2]}"
    except AssertionError as error:
        return f"{check}: {_brief(str(error))}"
    return None


def _brief(message: str) -> str:
    """The measure in an assertion's message."""
    for pattern in (r"[\d.naif]+ ULP", r"Mismatched elements: .*", r"written beyond the end"):
        if measure := re.search(pattern, message):
            return measure[0].replace("Mismatched", "wrong")
    return "wrong result"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.kernel_faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression of descriptions")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    given = parser.parse_args(arguments)
    for name in CHECKS:
        if reason := failure(name, SOURCE_FOLDER):
            print(f"without a fault: {reason}", file=sys.stderr)
            return 1
    chosen = [fault for fault in faults() if re.search(given.only, fault.what)]
    places = [f"{fault.file}:{line_of(fault)}" for fault in chosen]
    lines = ["| fault | line | device only | found by |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    missed = 0
    for fault, place in zip(chosen, places, strict=True):
        reason = found(fault)
        missed += reason is None
        lines.append(f"| {fault.what} | {place} | {'yes' if fault.device_only else 'no'} | {reason or '**missed**'} |")
        print(lines[-1], flush=True)
    lines += ["", f"{len(chosen) - missed} of {len(chosen)} caught"]
    print("\n".join(lines[-2:]))
    if given.markdown:
        command = "python -m benchmarks.kernel_faults --markdown FILE"
        head = [
            "# Faults planted in the kernel",
            "",
            f"`{command}`, PTX for sm_{ARCHITECTURE}, interpreted without a GPU.",
            "",
        ]
        given.markdown.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
