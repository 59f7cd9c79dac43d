"""Each row in a process of its own, with a time limit: a crash or a hang costs one row (`isolated`)."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from .rows import Step, run_row

LIMIT = 240.0
# Imported once; every row starts as a fork of the process that imported them.
_PRELOADED = ["torch", "transformers", "onnxruntime", "benchmarks.zoo.rows"]


def isolated(name: str, steps: Sequence[str], limit: float = LIMIT) -> list[Step]:
    """Run the steps of one entry in a process of its own.

    Args:
        name: of the entry.
        steps: some of `rows.STEPS`.
        limit: seconds, after which the process is killed.

    Returns:
        The results; if the process died or was killed, the last is `failed`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sending, name, list(steps)), daemon=True)
    results: list[Step] = []
    process.start()
    sending.close()
    end = time.monotonic() + limit
    try:
        while receiving.poll(max(0.0, end - time.monotonic())):
            step = receiving.recv()
            if step is None:
                return results
            results.append(step)
        results.append(Step(_next(results, steps), "failed", f"exceeded the limit of {limit:.0f} seconds", limit))
    except EOFError:
        process.join(10)
        results.append(Step(_next(results, steps), "failed", f"the process ended with exit code {process.exitcode}"))
    finally:
        process.kill()
        process.join()
    return results


def _next(results: Sequence[Step], steps: Sequence[str]) -> str:
    done = {result.step for result in results}
    return next((step for step in steps if step not in done), "build")


def _work(sending: Connection, name: str, steps: list[str]) -> None:
    # Progress bars and warnings of libraries are no part of the table.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for step in run_row(name, steps):
        sending.send(step)
    sending.send(None)
