"""`rmsnorm export`: export a PyTorch model to a folder with an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.norms import found_line, print_found, quantized_line
from rmsnorm_deploy.cli.screen import Screen, file_size
from rmsnorm_deploy.runtime.inputs.arrays import read_arrays
from rmsnorm_deploy.runtime.report.printed import print_deviations

if TYPE_CHECKING:
    from rmsnorm_deploy.export.from_torch.save import ExportResult
    from rmsnorm_deploy.models.outliers import OutlierReport

SCHEMA = "rmsnorm_deploy.export/1"


@options.takes_hub()
def export(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The folder to create; with several targets it gets a subfolder for each.",
        ),
    ],
    target: options.Targets = None,
    dtype: options.Dtype = None,
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset", metavar="N", help="Opset import of the file, 18 to 23; the target's default if omitted."
        ),
    ] = None,
    with_past: Annotated[
        bool, typer.Option("--with-past", help="Make the KV cache an input and an output (decoders of transformers).")
    ] = False,
    attention: Annotated[
        str,
        typer.Option(
            "--attention",
            metavar="HOW",
            help="How attention of a transformers model is written: node (in the target's own form, where its function "
            "was proven to compute it), decomposed (the operators of its function), or in-place (target ort with "
            "--with-past: nodes that write keys and values into the cache's own buffer, ONNX Runtime 1.32 or later).",
        ),
    ] = "node",
    no_function: options.NoFunction = False,
    ort_trt: options.OrtTrt = False,
    static: Annotated[
        bool, typer.Option("--static", help="Make every dim static, with the size of the example inputs.")
    ] = False,
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FILE.npz", help="Example inputs by name, for a model without token inputs."),
    ] = None,
    outliers: Annotated[
        str | None,
        typer.Option(
            "--outliers",
            metavar="CHANNELSxFACTOR",
            help="Give the weights outlier channels before the export, such as 4x50; for models with random weights.",
        ),
    ] = None,
    outlier_seed: Annotated[
        int, typer.Option("--outlier-seed", metavar="N", min=0, help="Seed of the choice of outlier channels.")
    ] = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing: options.AllowMissing = None,
    allow_pickle: options.AllowPickle = False,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="HOW",
            help="How the folder gets a checkpoint's weights: link (hard links to its files; packed where the file "
            "system cannot link), copy (copies of its files), pack (one new file, each weight at a memory page) or "
            "reference (DIR is the checkpoint's own folder, into which the model is written).",
        ),
    ] = "link",
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="BITS",
            help="int4 or int8: quantize the weights of MatMuls with ONNX Runtime's quantizer, for ONNX Runtime alone; "
            "norms, attention and embeddings stay as they are.",
        ),
    ] = None,
    full_hash: Annotated[
        bool,
        typer.Option("--hash", help="Hash all weights, so that `rmsnorm verify` notices every change of a byte."),
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Export a model to ONNX with its norms in the form that the target requires."""
    from rmsnorm_deploy.export.lowering.attention_table import check_attention, parse_attention
    from rmsnorm_deploy.export.lowering.plugin_functions import plugin_style
    from rmsnorm_deploy.export.lowering.table import DEFAULT_TARGET, opset_for, parse_targets
    from rmsnorm_deploy.export.lowering.weight_quantizer import check_quantize, parse_quantize
    from rmsnorm_deploy.export.onnx_io.place_weights import parse_weights

    screen = Screen(as_json, quiet)
    targets = parse_targets(target or DEFAULT_TARGET)
    mode = parse_weights(weights)
    attention_mode = parse_attention(attention)
    check_attention(attention_mode, targets, with_past=with_past)
    for name in targets:
        opset_for(name, opset)  # refuses a wrong target or opset before slow work
    plugin_style(not no_function, ort_trt, targets)
    check_quantize(parse_quantize(quantize), targets, dtype)
    arrays = read_arrays(inputs) if inputs is not None else None
    injection = _injection(outliers)
    with screen.working(f"loading {model}") as progress:
        from rmsnorm_deploy.export.from_torch.export_model import existing_parent, export_model
        from rmsnorm_deploy.models.loading import load_model

        loaded = load_model(
            model,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            allow_missing=allow_missing or (),
            side_folder=existing_parent(output),
        )
        details: dict[str, Any] = {}
        injected = None
        if injection is not None:
            from rmsnorm_deploy.models.outliers import inject_outliers

            progress("injecting outlier channels")
            injected = inject_outliers(loaded.model, *injection, outlier_seed)
            details |= injected.record()
        results = export_model(
            loaded,
            output,
            inputs=arrays,
            target=targets,
            opset=opset,
            dynamic=not static,
            attention=attention_mode,
            with_past=with_past,
            function=not no_function,
            ort_trt=ort_trt,
            weights=mode,
            full_hash=full_hash,
            quantize=quantize,
            details=details,
            progress=progress,
        )
    payload = _payload(results, injected)
    screen.result(payload, lambda: _print(screen, model, payload))


def _injection(text: str | None) -> tuple[int, float] | None:
    """The value of --outliers, which is checked before slow work."""
    if text is None:
        return None
    from rmsnorm_deploy.models.outliers import parse_outliers

    return parse_outliers(text)


def _payload(results: list[ExportResult], injected: OutlierReport | None) -> dict[str, Any]:
    exports = [_export_row(result) for result in results]
    first = results[0].manifest
    single = exports[0] if len(exports) == 1 else None
    return {
        "schema": SCHEMA,
        "exports": exports,
        "files": [file for row in exports for file in row["files"]],
        "manifest": single["manifest"] if single else [row["manifest"] for row in exports],
        "sites": [{k: v for k, v in site.items() if k != "calls"} for site in first["sites"]],
        "calls": sum(len(site["calls"]) for site in first["sites"]),
        "refusals": first["refusals"],
        "left_out": first.get("left_out", []),
        "notes": list(dict.fromkeys(text for result in results for text in result.manifest["notes"])),
        "outliers": injected and injected.to_dict(),
    }


def _export_row(result: ExportResult) -> dict[str, Any]:
    from rmsnorm_deploy.export.onnx_io.manifest import deviation_rows

    return {
        "target": result.target,
        "opset": result.manifest["opset"],
        "dtype": result.manifest["dtype"],
        "folder": str(result.folder),
        "files": [str(result.folder / name) for name in result.files],
        "manifest": str(result.folder / "manifest.json"),
        "deviations": deviation_rows(result.manifest),
        **({"quantized": result.manifest["quantized"]} if "quantized" in result.manifest else {}),
    }


def _print(screen: Screen, model: str, payload: dict[str, Any]) -> None:
    sites, refusals = payload["sites"], payload["refusals"]
    first = found_line(sites, refusals, model, payload["calls"]) + ("" if sites else " It was exported unchanged.")
    if payload["left_out"]:
        first += f" It was exported without its {' and '.join(payload['left_out'])} inputs: the file reads text only."
    print_found(screen, sites, refusals, first)
    if payload["outliers"] is not None:
        screen.line(_outlier_line(payload["outliers"]))
    for text in payload["notes"]:
        screen.line(f"Note: {text}.")
    for row in payload["exports"]:
        screen.line()
        screen.line(f"{row['target']} (opset {row['opset']}, {row['dtype']}) -> {row['folder']}")
        for file in row["files"]:
            screen.line(f"  {Path(file).relative_to(row['folder'])}  {file_size(Path(file))}")
        if "quantized" in row:
            screen.line(quantized_line(row["quantized"]))
        print_deviations(screen, row["deviations"])


def _outlier_line(outliers: dict[str, Any]) -> str:
    return (
        f"Outlier channels: {outliers['channels']} of {outliers['width']}, {outliers['factor']:g} times larger in "
        f"{', '.join(outliers['embeddings'])} (norms changed: {len(outliers['norms'])}; seed {outliers['seed']})."
    )
