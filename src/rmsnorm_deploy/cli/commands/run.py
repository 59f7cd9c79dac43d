"""`rmsnorm run`: run an exported model or an engine on the arrays of a file, or on the rows of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.arrays import write_npz
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.export.onnx_io.destinations import check_distinct, check_new_file
from rmsnorm_deploy.export.onnx_io.owned_files import is_own_report
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.inputs.arrays import read_arrays

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.runners.base import Array

SCHEMA = "rmsnorm_deploy.run/1"


def run(
    path: options.Exported,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE.npz", help="The file for the outputs; with --dataset, the folder for them."
        ),
    ],
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FILE", help="One array for each input, by name: .npz or .safetensors."),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset",
            metavar="FILE|DIR",
            help="Parquet with a column for each input; each row is run once, also when a run is killed and repeated.",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="With --dataset: the most rows of one run of the model.")
    ] = 32,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=1, help="With --dataset: the most rows of a file of results.")
    ] = 4096,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="INPUT=COLUMN", help="With --dataset: the column of an input. Repeatable."),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "--outputs", metavar="NAME", help="With --dataset: an output to write; all if omitted. Repeatable."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="MODEL",
            help="With --dataset: folder or hub name of the tokenizer of a column of texts for input_ids.",
            show_default="that of the export",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", metavar="N", min=1, help="With --dataset: the most tokens of a text; the rest is cut off."
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="With --dataset: a cluster of Ray: local (this machine), auto or HOST:PORT.",
        ),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(
            "--worker",
            metavar="NEEDS",
            help="With --ray: what a worker occupies, such as cpus=4,gpus=1,memory=16 (GB).",
            show_default="cpus=1",
        ),
    ] = None,
    provider: options.Provider = "cpu",
    runner: options.Runner = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Run an exported model or an engine on the arrays of a file, or on the rows of a data set."""
    screen = Screen(as_json, quiet)
    if (inputs is None) == (dataset is None):
        raise UsageError(f"expected either --inputs or --dataset, got {'none' if inputs is None else 'both'}.")
    if dataset is not None:
        from rmsnorm_deploy.cli.dataset import DatasetOptions, run_on_dataset

        options_ = DatasetOptions(
            batch, rows, tuple(column or ()), tuple(outputs or ()), tokenizer, max_tokens, ray, worker
        )
        run_on_dataset(path, dataset, output, options_, runner, provider, screen)
        return
    assert inputs is not None
    check_distinct({"-o": output}, {"DIR_OR_ONNX": path, "--inputs": inputs})
    check_new_file(output, is_own_report)
    feeds = read_arrays(inputs)
    with screen.working(f"loading {path}") as progress:
        from rmsnorm_deploy.runtime.inputs.exported import open_exported
        from rmsnorm_deploy.runtime.inputs.synthetic import cast_feeds
        from rmsnorm_deploy.runtime.tensorrt.on_demand import open_model

        with open_model(open_exported(path), runner, provider) as opened:
            progress("running")
            results = opened.run(cast_feeds(feeds, opened.inputs()))
            provenance = opened.provenance()
    widened = write_npz(output, results)
    payload = {
        "schema": SCHEMA,
        "file": str(output),
        "outputs": [_output_row(name, array, name in widened) for name, array in results.items()],
        "provenance": provenance,
    }
    screen.result(payload, lambda: _print(screen, payload))


def _output_row(name: str, array: Array, widened: bool) -> dict[str, Any]:
    saved_as = "float32" if widened else array.dtype.name
    return {"name": name, "dtype": array.dtype.name, "saved_as": saved_as, "shape": list(array.shape)}


def _print(screen: Screen, payload: dict[str, Any]) -> None:
    screen.line(f"{payload['file']}:")
    for row in payload["outputs"]:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        saved = "" if row["saved_as"] == row["dtype"] else f", saved as {row['saved_as']} (.npz has no bfloat16)"
        screen.line(f"  {row['name']}  {row['dtype']}  {shape}{saved}")
