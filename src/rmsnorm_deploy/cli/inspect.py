"""`rmsnorm inspect`: which norms a model has, and what each one computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.norms import found_line, print_refusals, print_sites
from rmsnorm_deploy.cli.screen import Screen

SCHEMA = "rmsnorm_deploy.inspect/1"


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model as for export, an exported folder, or an .onnx file that was exported by this tool.",
            show_default=False,
        ),
    ],
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Find every RMSNorm and say what it computes."""
    screen = Screen(as_json)
    place = Path(model).expanduser()
    if _is_exported_folder(place):
        sites, refusals = _from_folder(place)
    elif place.is_file() and place.suffix == ".onnx":
        sites, refusals = _from_file(place), []
    else:
        with screen.working(f"loading {model}") as say:
            from rmsnorm_deploy.models.loading import load_model
            from rmsnorm_deploy.models.recognise import recognise

            loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
            say("finding the norms")
            found = recognise(loaded.model)
        sites, refusals = [s.to_dict() for s in found.sites], [r.to_dict() for r in found.refusals]
    payload = {"schema": SCHEMA, "model": model, "sites": sites, "refusals": refusals}
    screen.result(payload, lambda: _print(screen, model, sites, refusals))


def _print(screen: Screen, model: str, sites: list[dict[str, Any]], refusals: list[dict[str, Any]]) -> None:
    screen.line(found_line(sites, refusals, model))
    if sites:
        screen.line()
        print_sites(screen, sites)
    if refusals:
        screen.line()
        print_refusals(screen, refusals)


def _is_exported_folder(place: Path) -> bool:
    """Whether the folder is one of ours; a model's own folder may hold a manifest.json of another kind."""
    from rmsnorm_deploy.export.manifest import SCHEMA as MANIFEST_SCHEMA

    try:
        content = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    kind = MANIFEST_SCHEMA.partition("/")[0]
    return isinstance(content, dict) and str(content.get("schema")).partition("/")[0] == kind


def _from_folder(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from rmsnorm_deploy.export.manifest import read_manifest

    manifest = read_manifest(folder)
    sites = [{key: value for key, value in site.items() if key != "calls"} for site in manifest["sites"]]
    return sites, manifest["refusals"]


def _from_file(path: Path) -> list[dict[str, Any]]:
    """One site for each module that the nodes' metadata name. Class, width and dtype are in the manifest only."""
    from rmsnorm_deploy.models.spec import NormSpec
    from rmsnorm_deploy.runtime.exported import norm_nodes

    unknown: dict[str, Any] = {"class": None, "width": None, "dtype": None, "parameters": []}
    sites = {
        node["path"]: {"path": node["path"], "spec": NormSpec.from_json(node["spec"]).to_dict(), **unknown}
        for node in norm_nodes(path)
    }
    return list(sites.values())
