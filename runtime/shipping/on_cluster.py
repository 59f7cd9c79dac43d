"""Ship the rows of a recipe on a cluster of Ray (`rows_on_cluster`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...models.hub.options import HubOptions, hub_options, using_hub
from ..cluster.calls import PATIENCE, Call, Needs, run_calls
from ..cluster.connection import LOCAL, SharedFolder, check_node, connected, shared_folder
from ..recipe.rows import Row
from ..runners.threads import using_threads
from .ship_row import failed_row, ship_row
from .steps import Progress, Result


def rows_on_cluster(
    rows: Sequence[Row], address: str, output: Path, *, force: bool = False, progress: Progress | None = None
) -> Iterator[Result]:
    """Ship rows where there is room; yields the result of each, see `ship_row`, in the order in which they end.

    Every step that a row has done is in its folder, so that a row whose worker was lost goes on where it stopped.

    Args:
        rows: of `rows_of`.
        address: of the cluster, see `connected`.
        output: the folder of the results, which every node must see.
        force: do all steps again.
        progress: called with a line of text as rows end and workers are lost.

    Raises:
        EnvironmentMissingError: Ray is not installed.
        UsageError: there is no cluster at the address.
    """
    say = progress or (lambda _: None)
    by_name = {row["row"]: row for row in rows}
    with connected(address) as ray, shared_folder(output) as folder:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cores = sum(node["Resources"].get("CPU", 0) for node in nodes)
        say(f"{len(rows)} rows on {len(nodes)} nodes with {cores:g} CPUs")
        patience = 0.0 if address == LOCAL else PATIENCE  # this machine does not grow
        given = (folder, force, hub_options(""))
        calls = [Call(row["row"], _ship_there, (row, *given), Needs(**row["needs"])) for row in rows]
        for number, outcome in enumerate(run_calls(ray, calls, patience=patience, progress=progress), 1):
            row = by_name[outcome.call.name]
            result = outcome.value if outcome.error is None else failed_row(row, outcome.error)
            say(f"{number} of {len(rows)}: {row['row']}: {result['status']} in {result['seconds']:.1f} s")
            yield result


def _ship_there(row: dict[str, Any], folder: SharedFolder, force: bool, hub: HubOptions) -> Result:
    check_node(folder)
    with using_hub(hub), using_threads(max(1, int(row["needs"]["cpus"]))):
        return ship_row(row, force=force)
