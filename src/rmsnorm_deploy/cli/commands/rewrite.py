"""`rmsnorm rewrite`: rewrite the norms of any .onnx file in the form that a target requires."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.norms import found_line, print_sites
from rmsnorm_deploy.cli.screen import Screen, file_size
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.inputs.arrays import read_arrays
from rmsnorm_deploy.runtime.report.printed import print_deviations

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.rewriting.rewrite_file import RewriteResult

SCHEMA = "rmsnorm_deploy.rewrite/3"
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
            help="The folder to create, with several targets a subfolder for each; or a new .onnx file in the model's "
            "folder, which refers to the same weights.",
        ),
    ],
    target: options.Targets = None,
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
    attention: Annotated[
        str,
        typer.Option(
            "--attention",
            metavar="HOW",
            help="How attention is written: decomposed (as it is), or node (target ort: each attention that the file "
            "spells out becomes one operator of opset 23, if its nodes are proven to compute that).",
        ),
    ] = "decomposed",
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
    from rmsnorm_deploy.export.from_onnx.rewrite_attentions import check_rewriting
    from rmsnorm_deploy.export.lowering.attention_table import parse_attention
    from rmsnorm_deploy.export.lowering.plugin_functions import plugin_style
    from rmsnorm_deploy.export.lowering.table import DEFAULT_TARGET, parse_targets

    screen = Screen(as_json, quiet)
    targets = parse_targets(target or DEFAULT_TARGET)
    attention_mode = parse_attention(attention)
    for name in targets:
        check_rewriting(attention_mode, name)
    plugin_style(not no_function, ort_trt, targets)
    places = _places(output, targets)
    feeds = read_arrays(inputs) if inputs is not None else None
    with screen.working(f"reading {path}") as progress:
        from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model

        styles = {name: (not no_function, ort_trt) if name == "plugin" else (True, False) for name in places}
        results = [
            rewrite_model(
                path, place, target=name, opset=opset, function=styles[name][0], ort_trt=styles[name][1],
                weights=weights.value, attention=attention_mode, verify=verify, inputs=feeds, seed=seed,
                progress=progress,
            )
            for name, place in places.items()
        ]  # fmt: skip
    payloads = [_payload(result) for result in results]
    whole = payloads[0] if len(payloads) == 1 else {"schema": SCHEMA, "rewrites": payloads}
    screen.result(whole, lambda: _print_all(screen, path, payloads))


def _places(output: Path, targets: Sequence[str]) -> dict[str, Path]:
    """Where the file of each target is written."""
    if len(targets) == 1:
        return {targets[0]: output}
    if output.suffix == ".onnx":
        raise UsageError(f"{output}: expected a folder for {len(targets)} targets, got the name of one file.")
    return {name: output / name for name in targets}


def _print_all(screen: Screen, path: Path, payloads: Sequence[dict[str, Any]]) -> None:
    for index, payload in enumerate(payloads):
        if index:
            screen.line()
        _print(screen, path, payload)


def _payload(result: RewriteResult) -> dict[str, Any]:
    from rmsnorm_deploy.export.onnx_io.manifest import deviation_rows

    manifest, calls = result.manifest, result.rewritten.sites
    changed = {site.before.path for site in calls if site.changed}
    kept = {site.before.path for site in calls} - {site.before.path for site in calls if not site.stood}
    return {
        "schema": SCHEMA,
        "target": manifest["target"],
        "opset": manifest["opset"],
        "folder": str(result.folder),
        "files": [str(file) for file in result.files],
        "norms": len(manifest["sites"]),
        "calls": len(calls),
        "changed": len(changed),
        "kept": len(kept),
        "sites": manifest["sites"],
        "refusals": manifest["refusals"],
        "attention": manifest["attention"],
        "notes": manifest["notes"],
        "deviations": deviation_rows(manifest),
        "proof": manifest["proof"],
    }


def _print_attentions(screen: Screen, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    left = [row for row in rows if row["node"] is None]
    screen.line(f"Attentions as one operator: {len(rows) - len(left)} of {len(rows)}.")
    if left:
        screen.line(f"Attentions left as they are: {len(left)}")
        _print_reasons(screen, [(row["softmax"] or row["path"], row["reason"]) for row in left])


def _print_reasons(screen: Screen, rows: Sequence[tuple[str, str]]) -> None:
    """The nodes that were not changed, together by reason."""
    places: dict[str, list[str]] = {}
    for name, reason in rows:
        places.setdefault(reason, []).append(name or "a node without a name")
    for reason, names in places.items():
        more = f" and {len(names) - _REFUSALS_SHOWN} more" if len(names) > _REFUSALS_SHOWN else ""
        screen.line(f"  {', '.join(names[:_REFUSALS_SHOWN])}{more}: {reason}")
    if any(len(names) > _REFUSALS_SHOWN for names in places.values()):
        screen.line("  --json lists them all")


def _print(screen: Screen, path: Path, payload: dict[str, Any]) -> None:
    sites, refusals = payload["sites"], payload["refusals"]
    screen.line(found_line(sites, refusals, str(path), payload["calls"]))
    if sites:
        screen.line()
        print_sites(screen, sites)
        screen.line()
        same = f", {payload['kept']} were in its form already" if payload["kept"] else ""
        screen.line(f"Rewritten for {payload['target']}: {payload['changed']} of {payload['norms']}{same}.")
    if refusals:
        screen.line(f"Not changed: {len(refusals)}")
        _print_reasons(screen, [(row["node"] or row["path"], row["reason"]) for row in refusals])
    _print_attentions(screen, payload["attention"])
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
