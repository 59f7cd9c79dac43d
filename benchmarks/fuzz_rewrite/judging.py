"""Run the rewriter on one damaged file (`judged`): it must refuse it, or write a file with the same outputs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from rmsnorm_deploy.export.from_onnx.rewrite import rewrite
from rmsnorm_deploy.export.onnx_io.check_graph import check_graph
from rmsnorm_deploy.export.onnx_io.read_model import read_model, to_ir
from rmsnorm_deploy.export.onnx_io.write_model import write_model
from rmsnorm_deploy.models.errors import RmsnormDeployError

SLOW = 10.0  # seconds
# Allowed difference of outputs, relative to the largest value: a norm rounds a few times, and dims are small.
TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 2e-2}


class WrongError(Exception):
    """The rewriter violated one of its guarantees."""


def judged(data: bytes, target: str, folder: Path, seed: int) -> str:
    """Read, check, rewrite and write one file, and compare the numbers.

    Args:
        data: the damaged file.
        target: the target of the rewriter.
        folder: a temporary folder, reused by the next case.
        seed: seed of the inputs of both files.

    Returns:
        The outcome, one of the allowed ones.

    Raises:
        WrongError: any other outcome.
    """
    path, out = folder / "damaged.onnx", folder / "out"
    out.mkdir(exist_ok=True)
    path.write_bytes(data)
    (folder / "w.bin").write_bytes(bytes(32))
    start = time.perf_counter()
    try:
        file = read_model(path)
        check_graph(file.model, file.where)
        result = rewrite(to_ir(file), target)
        for old in out.iterdir():
            old.unlink()
        write_model(result.model, file, out, "new.onnx", "copy")
    except RmsnormDeployError as error:
        if not str(error).isprintable() or len(str(error)) > 2000:
            raise WrongError(f"the error message is not readable: {str(error)[:80]!r}") from error
        return f"refused ({type(error).__name__})"
    finally:
        if time.perf_counter() - start > SLOW:
            raise WrongError(f"took more than {SLOW:g} seconds")
        if path.read_bytes() != data:
            raise WrongError("the input changed")
    if not result.changed:
        return "written, no norm changed"
    return f"written, {_compared(path, out / 'new.onnx', seed)}"


def _compared(old: Path, new: Path, seed: int) -> str:
    """Run both files in a separate process, because damaged files may crash ONNX Runtime."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), os.fdopen(writer, "w", buffering=1) as stream:
            _run_both(old, new, seed, lambda line: print(line, file=stream))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        lines = stream.read().splitlines()
    os.waitpid(child, 0)
    if not lines:
        return "the original does not run"
    if lines[-1] != "same numbers":
        raise WrongError("the rewritten file crashes ONNX Runtime" if lines[-1] == "runs" else lines[-1])
    return lines[-1]


def _run_both(old: Path, new: Path, seed: int, progress: Callable[[str], None]) -> None:
    session = _session(old)
    feeds = dict(_feeds(session, seed))
    before = session.run(None, feeds)
    progress("runs")
    try:
        after = _session(new).run(None, feeds)
    except Exception as error:
        progress(f"the rewritten file does not run: {str(error).splitlines()[0][:200]}")
        return
    progress(next(filter(None, map(_difference, before, after)), "same numbers"))


def _session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feeds(session: Any, seed: int) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(seed)
    for info in session.get_inputs():
        shape = [dim if isinstance(dim, int) and 0 < dim < 100 else 3 for dim in info.shape]
        dtype = {"float": "float32", "double": "float64"}.get(info.type[7:-1], info.type[7:-1])
        values = rng.standard_normal(shape) if dtype.startswith("float") else np.ones(shape)
        yield info.name, np.asarray(values, dtype)


def _difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> str:
    """How two outputs differ; empty if they are equal up to rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"expected an output of type {a.dtype}{a.shape}, got {b.dtype}{b.shape}"
    if a.dtype.kind != "f":
        return "" if np.array_equal(a, b) else "integers differ"
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return "NaN or infinity in one output only"
    left, right = a[finite].astype(np.float64), b[finite].astype(np.float64)
    far = left.size and np.abs(left - right).max() > TOLERANCE[a.dtype.name] * np.abs(left).max()
    return "values differ" if far else ""
