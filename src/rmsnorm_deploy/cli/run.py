"""`rmsnorm run`: one inference in ONNX Runtime, arrays in and arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.arrays import check_writable, read_npz, write_npz
from rmsnorm_deploy.cli.screen import Screen

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.runner import Array, TensorInfo

SCHEMA = "rmsnorm_deploy.run/1"


def run(
    path: options.Exported,
    inputs: Annotated[Path, typer.Option("--inputs", metavar="FILE.npz", help="One array for each input, by name.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.npz", help="Where the outputs go.")],
    provider: options.Provider = "cpu",
    as_json: options.AsJson = False,
) -> None:
    """Run an exported model on the arrays of a file."""
    screen = Screen(as_json)
    check_writable(output)
    feeds = read_npz(inputs)
    with screen.working(f"loading {path}") as say:
        from rmsnorm_deploy.runtime.exported import open_exported
        from rmsnorm_deploy.runtime.ort_runner import OrtRunner

        with OrtRunner(open_exported(path).model, providers=[provider]) as runner:
            say("running")
            results = runner.run(_as_wanted(feeds, runner.inputs()))
            provenance = runner.provenance()
    widened = write_npz(output, results)
    payload = {
        "schema": SCHEMA,
        "file": str(output),
        "outputs": [_output_row(name, array, name in widened) for name, array in results.items()],
        "provenance": provenance,
    }
    screen.result(payload, lambda: _print(screen, payload))


def _as_wanted(feeds: Mapping[str, Array], infos: Sequence[TensorInfo]) -> dict[str, Array]:
    """The arrays as given, but float32 as bfloat16 where that is wanted: an .npz file cannot hold bfloat16."""
    import ml_dtypes

    wanted = {info.name: info.dtype for info in infos}
    return {
        name: array.astype(ml_dtypes.bfloat16)
        if wanted.get(name) == "bfloat16" and array.dtype.name == "float32"
        else array
        for name, array in feeds.items()
    }


def _output_row(name: str, array: Array, widened: bool) -> dict[str, Any]:
    saved_as = "float32" if widened else array.dtype.name
    return {"name": name, "dtype": array.dtype.name, "saved_as": saved_as, "shape": list(array.shape)}


def _print(screen: Screen, payload: dict[str, Any]) -> None:
    screen.line(f"{payload['file']}:")
    for row in payload["outputs"]:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        saved = "" if row["saved_as"] == row["dtype"] else f", saved as {row['saved_as']} (.npz has no bfloat16)"
        screen.line(f"  {row['name']}  {row['dtype']}  {shape}{saved}")
