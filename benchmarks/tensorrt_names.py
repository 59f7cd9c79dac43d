"""Every name of TensorRT's Python API that our code uses, in the bindings of many versions. Needs no GPU.

    python -m benchmarks.tensorrt_names                          # two minutes; 0.5 GB on disk meanwhile
    python -m benchmarks.tensorrt_names --versions 10.7.0 11.4.0.106
    python -m benchmarks.tensorrt_names --markdown FILE

The bindings of each version come from PyPI into a temporary folder, with the newest lean runtime of their major
version, and are asked in a process of their own: `tests/runtime/tensorrt/test_api_names.py` does that in CI for one
version. A use is a name, with the arguments of its call, or that it is assigned. TensorRT-RTX is asked as it is
installed. The exit code is 1 if a version lacks a name that is used there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rmsnorm_deploy.runtime.engines.api import FLAVORS, is_installed
from tests.helpers.tensorrt.lean_tensorrt import BINDINGS, LIBRARIES, make_libraries, run_with
from tests.runtime.tensorrt.test_api_names import NEWER, all_uses, is_by_design, problem

VERSIONS: Final = (
    "10.7.0",
    "10.9.0.34",
    "10.12.0.36",
    "10.15.1.29",
    "10.16.1.11",
    "11.0.0.114",
    "11.2.1.2",
    "11.4.0.106",
)
# The lean runtime of each major version; older ones of a major version are not wheels.
_LEAN: Final = {"10": "10.16.1.11", "11": "11.4.0.106"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tensorrt_names", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="VERSION", help="of TensorRT")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    given = parser.parse_args(arguments)
    lines = ["| product | version | uses | missing | newer, and not asked there |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    failed = False
    with tempfile.TemporaryDirectory(prefix="rmsnorm-bindings-") as scratch:
        for product, version in [*(("TensorRT", version) for version in given.versions), ("TensorRT-RTX", "")]:
            if product == "TensorRT":
                names = run_with(BINDINGS, "describe", _rig(Path(scratch), version))
            elif is_installed("rtx"):
                names = run_with(FLAVORS["rtx"].module, "describe")
            else:
                continue
            line, wrong = _row(product, names)
            failed |= wrong
            lines.append(line)
            print(line, flush=True)
    if given.markdown is not None:
        given.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if failed else 0


def _row(product: str, described: dict[str, Any]) -> tuple[str, bool]:
    """One row of the table, and whether a name is missing."""
    runtime = "rtx" if product == "TensorRT-RTX" else "tensorrt"
    uses = [use for use in all_uses() if not is_by_design(use, runtime)]
    found = {(use.owner, use.member): problem(use, described["names"]) for use in uses}
    newer = sorted(f"{owner}.{member}" for (owner, member), text in found.items() if text and (owner, member) in NEWER)
    missing = sorted({text for key, text in found.items() if text and key not in NEWER})
    cells = [product, described["version"], str(len(uses)), "; ".join(missing) or "none", ", ".join(newer) or "none"]
    return "| " + " | ".join(cells) + " |", bool(missing)


def _rig(scratch: Path, version: str) -> Path:
    """A folder from which a process can import the bindings of this version."""
    major = version.partition(".")[0]
    lean = scratch / f"lean-{major}"
    if not lean.exists():
        _install(lean, f"tensorrt-lean-cu12-libs=={_LEAN[major]}")
    folder = scratch / version
    _install(folder, f"tensorrt-cu12-bindings=={version}")
    os.symlink(lean / LIBRARIES, folder / LIBRARIES)
    make_libraries(folder, major)
    return folder


def _install(folder: Path, requirement: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
            *("--only-binary", ":all:", "--target", str(folder), requirement),
        ],
        check=True,
        timeout=600,
    )


if __name__ == "__main__":
    sys.exit(main())
