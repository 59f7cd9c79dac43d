"""How many threads a session of ONNX Runtime has where nothing else says so (`using_threads`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_threads: ContextVar[int] = ContextVar("threads", default=0)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Open sessions with this number of threads, while the context is open; 0 is one for each core of the machine.

    Workers that share a machine need it: each would take all cores otherwise.
    """
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


def default_threads() -> int:
    """The number of the innermost open context of `using_threads`; 0 outside."""
    return _threads.get()
