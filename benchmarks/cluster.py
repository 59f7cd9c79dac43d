"""Recipes and data sets on a cluster of Ray on this machine, with workers that are killed in the middle.

    python -m benchmarks.cluster                  # both; about ten minutes on two cores
    python -m benchmarks.cluster recipe --models 40
    python -m benchmarks.cluster dataset --rows 100000

recipe: Llamas with random weights, exported with their cache and validated. They are shipped by one worker of one
core, then by two, one of which is killed while it ships a row; then by two nodes, one of which is lost. Printed: the
seconds, their ratio to one worker, the workers that were lost, the rows that are done, the steps of lost workers that
were kept rather than done again, and the steps that a further run would do.

dataset: a small model on rows with an id each. The command is killed with all its processes when a third of the parts
is there, and run again. Printed: the rows, the ids that are missing or there twice, and the largest difference from the
model in PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIZE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256,
}  # fmt: skip
MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(1000, 256)
        self.norm = nn.RMSNorm(256, eps=1e-6)
        self.head = nn.Linear(256, 16, bias=False)

    def forward(self, input_ids):
        return self.head(self.norm(self.embed(input_ids)).mean(1))


def net():
    return Net()
"""


def write_recipe(folder: Path, count: int) -> Path:
    """Models with weights of their own, and a recipe of them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    text = '[defaults]\ntargets = ["ort"]\nwith_past = true\n'
    for number in range(count):
        torch.manual_seed(number)
        LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(folder / "models" / f"llama-{number}")
        text += f'\n[[model]]\nname = "llama-{number}"\nsource = "models/llama-{number}"\n'
    path = folder / "rmsnorm.toml"
    path.write_text(text)
    return path


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Any]:
    """A cluster of a head without cores, and nodes of one core each; the first gets lost by `remove_node`."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.started = [cluster.add_node(num_cpus=1) for _ in range(count)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def lose_a_worker(cluster: Any) -> None:
    """Kill a process that ships a row."""
    for line in subprocess.run(
        ["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        pid, _, words = line.strip().partition(" ")
        if "ray::llama-" in words:
            os.kill(int(pid), signal.SIGKILL)
            return
    raise RuntimeError("no worker ships a row")


def lose_a_node(cluster: Any) -> None:
    """Kill a node with all of its processes."""
    cluster.remove_node(cluster.started[0], allow_graceful=False)


def ship_once(
    recipe: Path, workers: int, name: str, lose: Callable[[Any], None] | None, first: float | None
) -> tuple[float, str]:
    """Ship on a new cluster into an output of its own; the seconds, and a row of the table."""
    from rmsnorm_deploy import ship
    from rmsnorm_deploy.runtime.shipping.ship import plan

    text = recipe.read_text()
    own = recipe.with_name(f"{workers}-{'lost' if lose else 'whole'}-{len(list(recipe.parent.glob('*.toml')))}.toml")
    own.write_text(f'output = "{own.stem}"\n{text}')
    told: list[str] = []
    ended = threading.Event()

    def progress(line: str) -> None:
        told.append(line)
        if line.split(" of ")[0] == "10" and lose is not None:
            ended.set()

    with nodes(workers) as cluster:
        if lose is not None:
            act = lose
            threading.Thread(target=lambda: (ended.wait(), time.sleep(1.5), act(cluster)), daemon=True).start()
        start = time.monotonic()
        done = ship(own, ray="auto", progress=progress)
        seconds = time.monotonic() - start
    lost = [line for line in told if "its worker was lost" in line]
    for line in lost:
        print(f"  {line}", file=sys.stderr)
    states = Counter(row["status"] for row in done.rows)
    kept = sum(step["status"] == "unchanged" for row in done.rows for step in row["steps"])
    left = sum(len(row["steps"]) for row in plan(own))
    ratio = "1.00" if first is None else f"{seconds / first:.2f}"
    numbers = [len(lost), states["done"], len(done.rows) - states["done"], kept, left]
    cells = [name, f"{seconds:.0f}", ratio, *map(str, numbers)]
    return seconds, f"| {' | '.join(cells)} |"


def recipe_table(count: int) -> None:
    """Print the table of the recipe."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), count)
        print(
            f"\n{count} models\n\n| workers | seconds | ratio | lost | rows done | failed | steps kept | steps left |"
        )
        print("|---|---|---|---|---|---|---|---|", flush=True)
        first, row = ship_once(recipe, 1, "one", None, None)
        print(row, flush=True)
        for name, lose in (
            ("two", None), ("two, one is killed", lose_a_worker), ("two nodes, one is lost", lose_a_node),
        ):  # fmt: skip
            print(ship_once(recipe, 2, name, lose, first)[1], flush=True)


def dataset_check(rows: int) -> None:
    """Kill a run of a data set, run it again, and compare every row."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from rmsnorm_deploy import export_model
    from rmsnorm_deploy.models.loading import load_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models.py").write_text(MODEL)
        source = f"{folder / 'models.py'}:net"
        export_model(source, folder / "exported", target="ort")
        tokens = np.random.default_rng(0).integers(0, 1000, (rows, 64))
        table = pa.table(
            {"id": np.arange(rows), "input_ids": pa.FixedSizeListArray.from_arrays(tokens.reshape(-1), 64)}
        )
        pq.write_table(table, folder / "rows.parquet")
        command = [
            sys.executable, "-m", "rmsnorm_deploy", "run", str(folder / "exported"), "--dataset",
            str(folder / "rows.parquet"), "-o", str(folder / "out"), "--ray", "local", "--rows", "2000",
        ]  # fmt: skip
        start = time.monotonic()
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        parts = -(-rows // 2000)
        while len(list((folder / "out").glob("part-*.parquet"))) < parts // 3 and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        there = len(list((folder / "out").glob("part-*.parquet")))
        print(f"\nkilled after {time.monotonic() - start:.1f} s with {there} of {parts} parts")
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        found = pq.read_table(sorted((folder / "out").glob("part-*.parquet")))
        counts = Counter(found["id"].to_pylist())
        missing, twice = rows - len(counts), sum(count > 1 for count in counts.values())
        column = next(column for column in found.column_names if column != "id")
        model = load_model(source).model
        with torch.no_grad():
            expected = torch.cat([model(torch.from_numpy(part)) for part in np.array_split(tokens, 100)]).numpy()
        got = np.stack(found[column].to_numpy())[np.argsort(found["id"].to_numpy())]
        print(f"{len(found)} rows, {missing} missing, {twice} twice; off by at most {np.abs(got - expected).max():.1e}")


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["recipe", "dataset"], help="recipe, dataset, or both")
    parser.add_argument("--models", type=int, default=40, help="models of the recipe")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the data set")
    arguments = parser.parse_args()
    if "recipe" in arguments.parts:
        recipe_table(arguments.models)
    if "dataset" in arguments.parts:
        dataset_check(arguments.rows)


if __name__ == "__main__":
    main()
