"""Call functions on a cluster of Ray (`run_calls`): where there is room, and again when a worker was lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...models.errors import EnvironmentMissingError, UnsupportedError

Progress = Callable[[str], None]
ATTEMPTS = 4
# Seconds to wait for a node that is large enough, and after which the nodes are looked at again.
PATIENCE, _LOOK = 600.0, 10.0
_GB = 10**9


@dataclass(frozen=True, slots=True)
class Needs:
    """What a call occupies on its node.

    Attributes:
        cpus: number of CPU cores.
        gpus: number of GPUs; a fraction shares one.
        memory: GB of main memory; 0 for no limit.
    """

    cpus: float = 1
    gpus: float = 0
    memory: float = 0

    def fits(self, resources: dict[str, float]) -> bool:
        """Whether a node of these resources, as Ray names them, could run it when it is idle."""
        return self.copies(resources) > 0

    def copies(self, resources: dict[str, float]) -> int:
        """How many such calls a node of these resources runs side by side."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory * _GB}
        return min((int(resources.get(name, 0.0) // amount) for name, amount in wanted.items() if amount), default=1)

    def options(self) -> dict[str, Any]:
        """As options of a task of Ray."""
        memory = {"memory": int(self.memory * _GB)} if self.memory else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **memory}

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs", f"{self.gpus:g} GPUs" if self.gpus else ""]
        return ", ".join([part for part in parts if part] + ([f"{self.memory:g} GB"] if self.memory else []))


@dataclass(frozen=True, slots=True)
class Call:
    """A function with its arguments; all of them are pickled, and so is what it returns.

    Attributes:
        name: in messages.
        function: of a module, which every node has.
        arguments: its arguments.
        needs: what it occupies.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: Needs = field(default_factory=Needs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call: its value, or the error that ended it."""

    call: Call
    value: Any = None
    error: BaseException | None = None


def run_calls(
    ray: Any,
    calls: Sequence[Call],
    *,
    attempts: int = ATTEMPTS,
    patience: float = PATIENCE,
    progress: Progress | None = None,
) -> Iterator[Outcome]:
    """Run calls on the connected cluster; yields what became of each, in the order in which they end.

    A call whose worker or node was lost is run again, elsewhere if need be; one that raised is not. Where the iterator
    is closed early, what runs is stopped.

    Args:
        ray: the module, see `connected`.
        calls: the calls.
        attempts: how often a call is run at most.
        patience: seconds to wait for a node that is large enough for a call, while none runs; a cluster may grow.
        progress: called with a line of text where a worker was lost, and where no node is large enough.
    """
    say = progress or (lambda _: None)
    exceptions = ray.exceptions
    running: dict[Any, tuple[Call, int]] = {_submit(ray, call): (call, 1) for call in calls}
    waits = _Waits(ray, patience, say)
    try:
        while running:
            for reference in [found for found, (call, _) in running.items() if waits.too_long(call)]:
                call, _ = running.pop(reference)
                ray.cancel(reference, force=True)
                yield Outcome(call, error=UnsupportedError(f"{waits.reason(call)}."))
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK) if running else ([], [])
            for reference in ready:
                call, attempt = running.pop(reference)
                try:
                    outcome = Outcome(call, value=ray.get(reference))
                except exceptions.RayTaskError as error:
                    outcome = Outcome(call, error=_cause(error))
                except exceptions.RayError as error:
                    reason = _reason(error)
                    if attempt < attempts:
                        say(f"{call.name}: its worker was lost ({reason}); attempt {attempt + 1} of {attempts}")
                        running[_submit(ray, call)] = (call, attempt + 1)
                        continue
                    lost = f"its worker was lost {attempts} times, the last time: {reason}."
                    outcome = Outcome(call, error=EnvironmentMissingError(lost))
                yield outcome
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _submit(ray: Any, call: Call) -> Any:
    # Attempts are counted here, so that the user is told of each.
    options = {"name": call.name, "max_retries": 0, "scheduling_strategy": "SPREAD", **call.needs.options()}
    return ray.remote(call.function).options(**options).remote(*call.arguments)


def _cause(error: Any) -> BaseException:
    """The exception of the function; Ray's own where that could not be sent."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


class _Waits:
    """The calls for which no node is large enough."""

    def __init__(self, ray: Any, patience: float, say: Progress) -> None:
        self._ray, self._patience, self._say = ray, patience, say
        self._since: dict[str, float] = {}
        self._nodes: list[dict[str, float]] = []
        self._looked = -math.inf

    def too_long(self, call: Call) -> bool:
        """Whether a call has waited for such a node as long as it may; the user is told when it begins to."""
        now = time.monotonic()
        if now - self._looked >= _LOOK:
            self._nodes, self._looked = [node["Resources"] for node in self._ray.nodes() if node["Alive"]], now
        if any(call.needs.fits(node) for node in self._nodes):
            self._since.pop(call.name, None)
            return False
        if call.name not in self._since:
            self._since[call.name] = now
            self._say(f"{call.name}: {self.reason(call)}; waiting up to {self._patience:g} s for one")
        return now - self._since[call.name] >= self._patience

    def reason(self, call: Call) -> str:
        """Why it waits."""
        most = [max((node.get(name, 0.0) for node in self._nodes), default=0.0) for name in ("CPU", "GPU", "memory")]
        return (
            f"expected a node with {call.needs}, got none: the largest have {Needs(most[0], most[1], most[2] // _GB)}"
        )
