"""The machine's instructions of a compiled kernel, read with nvdisasm."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

# An instruction: its address, the predicate that it may have, its name with modifiers.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)")
_BARRIER = re.compile(r"^(BAR|UCGABAR|BARRIER)\b")


def disassembler() -> str | None:
    """nvdisasm of the CUDA toolkit or of the package nvidia-cuda-nvdisasm; None if neither is installed."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return next((str(file.locate()) for file in files if file.stem == "nvdisasm"), shutil.which("nvdisasm"))


def disassembled(cubin: bytes) -> str:
    """The text that nvdisasm prints for a cubin."""
    program = disassembler()
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cubin"
        file.write_bytes(cubin)
        return subprocess.run([program, "-c", str(file)], capture_output=True, text=True, check=True).stdout


def instructions(text: str) -> list[str]:
    """Names of the instructions from a kernel's entry to its last unconditional EXIT.

    What follows, subroutines for rare operands of a reciprocal or a root, is left out, and so is padding.
    """
    found = [(match["predicate"], match["name"]) for match in _INSTRUCTION.finditer(text)]
    last = max(place for place, (predicate, name) in enumerate(found) if name == "EXIT" and predicate is None)
    return [name for _, name in found[: last + 1]]


def before_the_first_barrier(names: list[str]) -> list[str]:
    """The instructions before the first barrier, or all if there are none."""
    return names[: next((place for place, name in enumerate(names) if _BARRIER.match(name)), len(names))]
