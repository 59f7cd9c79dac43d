"""`rmsnorm rewrite`: rewrite the norms of any .onnx file in the form that a target requires."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.norms import found_line, print_sites
from rmsnorm_deploy.cli.screen import Screen, file_size
from rmsnorm_deploy.runtime.inputs.arrays import read_arrays
from rmsnorm_deploy.runtime.report.printed import print_deviations

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.rewriting.rewrite_file import RewriteResult

SCHEMA = "rmsnorm_deploy.rewrite/1"
_REFUSALS_SHOWN = 20


class Weights(StrEnum):
    """How external data is placed in the new folder."""

    COPY = "copy"
    LINK = "link"


def rewrite(
    path: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file from any exporter.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR_OR_ONNX",
            help="The folder to create; or a new .onnx file in the model's folder, which refers to the same weights.",
        ),
    ],
    target: Annotated[
        str,
        typer.Option("--target", metavar="TARGET", help="primitives, standard, ort or plugin, see `rmsnorm targets`."),
    ] = "ort",
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset", metavar="N", help="Opset import of the result; raised only as far as required if omitted."
        ),
    ] = None,
    no_function: options.NoFunction = False,
    ort_trt: options.OrtTrt = False,
    weights: Annotated[
        Weights,
        typer.Option(
            "--weights",
            help="Whether external data is copied to the new folder, or hard-linked.",
        ),
    ] = Weights.COPY,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare every norm and the whole model, before and after.")
    ] = True,
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FILE", help="Inputs of the whole model for --verify: .npz or .safetensors."),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Seed of the random inputs for --verify.")
    ] = 0,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Rewrite the norms of any .onnx file for a target, and verify the result."""
    from rmsnorm_deploy.export.lowering.plugin_functions import plugin_style
    from rmsnorm_deploy.export.lowering.table import cell

    screen = Screen(as_json, quiet)
    cell(target, "plain")  # refuses a wrong target before slow work
    plugin_style(not no_function, ort_trt, [target])
    feeds = read_arrays(inputs) if inputs is not None else None
    with screen.working(f"reading {path}") as progress:
        from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model

        result = rewrite_model(
            path, output, target=target, opset=opset, function=not no_function, ort_trt=ort_trt, weights=weights.value,
            verify=verify, inputs=feeds, seed=seed, progress=progress,
        )  # fmt: skip
    payload = _payload(result)
    screen.result(payload, lambda: _print(screen, path, payload))


def _payload(result: RewriteResult) -> dict[str, Any]:
    from rmsnorm_deploy.export.onnx_io.manifest import deviation_rows

    manifest, sites = result.manifest, result.rewritten.sites
    return {
        "schema": SCHEMA,
        "target": manifest["target"],
        "opset": manifest["opset"],
        "folder": str(result.folder),
        "files": [str(file) for file in result.files],
        "norms": len(sites),
        "changed": sum(site.changed for site in sites),
        "kept": sum(site.stood for site in sites),
        "sites": manifest["sites"],
        "refusals": manifest["refusals"],
        "notes": manifest["notes"],
        "deviations": deviation_rows(manifest),
        "proof": manifest["proof"],
    }


def _print(screen: Screen, path: Path, payload: dict[str, Any]) -> None:
    sites, refusals = payload["sites"], payload["refusals"]
    screen.line(found_line(range(payload["norms"]), refusals, str(path)))
    if sites:
        screen.line()
        print_sites(screen, [site for site in sites for _ in site["calls"] or [None]])
        screen.line()
        same = f", {payload['kept']} were in its form already" if payload["kept"] else ""
        screen.line(f"Rewritten for {payload['target']}: {payload['changed']} of {payload['norms']}{same}.")
    if refusals:
        screen.line(f"Not changed: {len(refusals)}")
        places: dict[str, list[str]] = {}
        for row in refusals:
            places.setdefault(row["reason"], []).append(row["node"] or row["path"] or "a node without a name")
        for reason, names in places.items():
            more = f" and {len(names) - _REFUSALS_SHOWN} more" if len(names) > _REFUSALS_SHOWN else ""
            screen.line(f"  {', '.join(names[:_REFUSALS_SHOWN])}{more}: {reason}")
        if any(len(names) > _REFUSALS_SHOWN for names in places.values()):
            screen.line("  --json lists them all")
    for text in payload["notes"]:
        screen.line(f"Note: {text}.")
    print_deviations(screen, payload["deviations"])
    screen.line()
    screen.line(f"{payload['target']} (opset {payload['opset']}) -> {payload['folder']}")
    for file in payload["files"]:
        screen.line(f"  {Path(file).name}  {file_size(Path(file))}")
    proof = payload["proof"]
    if proof is None:
        screen.line("proof: none (--no-verify)")
        return
    for text in proof["notes"]:
        screen.line(f"Note: {text}.")
    screen.line(f"proof: {proof['verdict']} ({proof['reason']})")
