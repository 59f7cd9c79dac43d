"""What NVRTC makes of the kernel: registers, instructions for each element, and the order of loads. Needs no GPU.

    python -m benchmarks.kernel_code                             # the table, half a minute
    python -m benchmarks.kernel_code --arch 120 --width 2048 8192
    python -m benchmarks.kernel_code --markdown FILE

Each row is a kernel (bfloat16) in its layout for few rows or for many, compiled for one architecture and disassembled.
Instructions are those of one thread from the entry to the exit, divided by the elements of the thread; subroutines for
rare operands are left out. `order` shows the prefetches, loads and waits before the first barrier as the machine
executes them: from sm_90 on a `wait` is for the kernel before, and a second one keeps the loads of the weight and of
the scale, between the two, before those of x and of the residual. The exit code is 1 if registers spill.
Requires NVRTC and nvdisasm: pip install 'rmsnorm-deploy[kernel]' nvidia-cuda-nvdisasm
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rmsnorm_deploy.plugins.kernel.compiler import compile_kernel
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, layouts
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from tests.helpers.plugins.machine_code import before_the_first_barrier, disassembled, disassembler, instructions

EPSILON: Final = 1e-6
_OUTPUTS: Final = (("none", "none"), ("float8_e4m3", "static"), ("int8", "static"), ("float8_e4m3", "per_row"))
_MEANINGS: Final = {"CCTL": "prefetch", "ACQBULK": "wait", "LDG": "load"}
_MEANING: Final = re.compile("|".join(_MEANINGS))


def order(names: Sequence[str]) -> str:
    """Prefetches, waits and loads before the first barrier, in order."""
    found = [_MEANINGS[match[0]] for name in before_the_first_barrier(list(names)) if (match := _MEANING.match(name))]
    runs = [(meaning, len(list(run))) for meaning, run in itertools.groupby(found)]
    return ", ".join(meaning if count == 1 else f"{count} {meaning}s" for meaning, count in runs)


def row(kernel: NormKernel, config: LaunchConfig, architecture: int) -> dict[str, Any]:
    """One row of the table."""
    compiled = compile_kernel(kernel, config, architecture)
    names = instructions(disassembled(compiled.image))
    quantized = "" if kernel.quantized == "none" else f" {kernel.quantized} {kernel.quantization}"
    return {
        "operator": f"{kernel.op}{quantized}",
        "width": kernel.width,
        "arch": f"sm_{architecture}",
        "rows": "few" if config.few else "many",
        "threads x vectors x elements": f"{config.threads}x{config.vectors}x{config.elements}",
        "registers": compiled.registers,
        "spilled bytes": compiled.spilled_bytes + compiled.stack_bytes,
        "instructions": len(names),
        "of an element": f"{len(names) / (config.vectors * config.elements):.1f}",
        "order": order(names),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(map(str, found.values())) + " |" for found in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.kernel_code", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=(80, 90, 100), help="such as 90 for sm_90")
    parser.add_argument("--width", type=int, nargs="+", default=(4096, 5120, 7168))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    given = parser.parse_args(arguments)
    if disassembler() is None:
        print("kernel_code requires nvdisasm: pip install nvidia-cuda-nvdisasm", file=sys.stderr)
        return 4
    kernels = [
        NormKernel(width, EPSILON, op, "bfloat16", quantized=quantized, quantization=quantization)  # type: ignore[arg-type]
        for op, width, (quantized, quantization) in itertools.product(
            ("rms_norm", "add_rms_norm"), given.width, _OUTPUTS
        )
        if op == "rms_norm" or quantized == "none"
    ]
    rows = [
        row(kernel, config, architecture)
        for kernel in kernels
        for architecture in given.arch
        for config in layouts(kernel, architecture)
    ]
    print(markdown(rows))
    if given.markdown is not None:
        given.markdown.write_text(markdown(rows) + "\n", encoding="utf-8")
    return 1 if any(found["spilled bytes"] for found in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
