"""`rmsnorm inspect`: list the norms of a model, what each one computes, and the dtypes in which it is at risk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.norms import attention_lines, found_line, print_found, quantized_line
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.regular_files import read_json
from rmsnorm_deploy.runtime.report.printed import print_risk

if TYPE_CHECKING:
    from rmsnorm_deploy.export.graph.sizes import SizeLimits
    from rmsnorm_deploy.models.loading import LoadedModel
    from rmsnorm_deploy.runtime.risk.report import RiskReport

SCHEMA = "rmsnorm_deploy.inspect/1"


@options.takes_hub()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model as for export, an exported folder, or an .onnx file.",
            show_default=False,
        ),
    ],
    dtype: options.Dtype = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--inputs",
            metavar="SOURCE",
            help="Run the model on these inputs and report which norms are at risk in which dtype: an .npz or "
            ".safetensors file, a folder of them, or file.py:function.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="As --inputs, with a prompt; may be repeated."),
    ] = None,
    made_up: Annotated[bool, typer.Option("--made-up", help="As --inputs, with generated inputs.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing: options.AllowMissing = None,
    allow_pickle: options.AllowPickle = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Find every RMSNorm of a model and show what it computes.

    In a PyTorch model, norms are modules; those outside of modules (F.rms_norm, formulas in a forward) are found at
    export, so inspect the exported folder for these.

    With inputs, the model runs, and the risk of each norm in float32, float16 and bfloat16 is reported.
    """
    screen = Screen(as_json, quiet)
    place = Path(model).expanduser()
    wanted = _Wanted(inputs, prompt or [], made_up)
    extra: dict[str, Any] = {}
    if _is_exported_folder(place) or (place.is_file() and place.suffix == ".onnx"):
        wanted.refuse_exported(model)
        found_in_file = _from_folder(place) if place.is_dir() else _from_file(place)
        sites, refusals = found_in_file.sites, found_in_file.refusals
        extra = {"calls": found_in_file.calls}
        extra |= {"sizes": found_in_file.limits.to_dict()} if found_in_file.limits else {}
        extra |= {"attention": found_in_file.attention} if found_in_file.attention else {}
        extra |= {"quantized": found_in_file.quantized} if found_in_file.quantized else {}
    else:
        with screen.working(f"loading {model}") as progress:
            from rmsnorm_deploy.models.loading import load_model
            from rmsnorm_deploy.models.recognition.find_norms import find_norms

            loaded = load_model(
                model, dtype=dtype, trust_remote_code=trust_remote_code, allow_missing=allow_missing or ()
            )
            if wanted.any:
                report = _risk(loaded, wanted, trust_remote_code, progress)
                found, extra = report.recognition, {"risk": report.to_dict()}
            else:
                progress("finding the norms")
                found = find_norms(loaded.model)
        sites, refusals = [s.to_dict() for s in found.sites], [r.to_dict() for r in found.refusals]
    payload = {"schema": SCHEMA, "model": model, "sites": sites, "refusals": refusals, **extra}
    screen.result(payload, lambda: _print(screen, payload), is_answer=True)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The inputs to run the model on."""

    source: str | None
    prompts: list[str]
    made_up: bool

    @property
    def any(self) -> bool:
        return self.source is not None or bool(self.prompts) or self.made_up

    def refuse_exported(self, model: str) -> None:
        if self.any:
            raise UsageError(
                f"{model} is an exported model, but --inputs, --prompt and --made-up require a PyTorch model. Give the "
                "model that it was exported from."
            )


def _print(screen: Screen, payload: dict[str, Any]) -> None:
    sites, refusals = payload["sites"], payload["refusals"]
    calls = payload.get("calls")  # a PyTorch model has no graph yet, so only its modules were searched
    first = found_line(sites, refusals, payload["model"], calls, modules_only=calls is None)
    print_found(screen, sites, refusals, first)
    for line in _size_lines(payload.get("sizes", {})):
        screen.line(line)
    for line in attention_lines(payload.get("attention", ())):
        screen.line(line)
    if "quantized" in payload:
        screen.line(quantized_line(payload["quantized"]))
    if payload.get("risk", {}).get("norms"):
        screen.line()
        print_risk(screen, payload["risk"])


def _size_lines(sizes: dict[str, Any]) -> list[str]:
    """The sizes for which a file was exported, one line each."""
    from rmsnorm_deploy.export.graph.sizes import range_text

    ranges = [f"{name}: {range_text((low, high))}" for name, (low, high) in sizes.get("ranges", {}).items()]
    return [f"valid for {text}" for text in (*ranges, *sizes.get("conditions", ()))]


def _risk(loaded: LoadedModel, wanted: _Wanted, trust_remote_code: bool, progress: Callable[[str], None]) -> RiskReport:
    from rmsnorm_deploy.models.calling.calls import call_form
    from rmsnorm_deploy.runtime.inputs.cases import inputs_of, load_cases, made_up_for, prompt_cases
    from rmsnorm_deploy.runtime.risk.report import risk

    cases = made_up_for(loaded) if wanted.made_up else []
    infos = inputs_of(loaded) if wanted.source is not None or wanted.prompts else []
    if wanted.source is not None:
        cases += load_cases(wanted.source, infos)
    if wanted.prompts:
        if loaded.kind != "transformers" and loaded.folder is None and loaded.task is None:
            raise UsageError(f"--prompt requires a tokenizer, and {loaded.source} has none; give --inputs instead.")
        tokenizer = str(loaded.folder or loaded.source)
        cases += prompt_cases(wanted.prompts, tokenizer, infos, trust_remote_code=trust_remote_code)
    form = None if loaded.example_inputs is None else call_form(loaded.example_inputs)
    return risk(loaded.model, [case.feeds for case in cases], progress=progress, form=form)


def _is_exported_folder(place: Path) -> bool:
    """Whether a folder was written by export; a model's folder may have a manifest.json with another schema."""
    from rmsnorm_deploy.export.onnx_io.manifest import SCHEMA as MANIFEST_SCHEMA

    try:
        content = read_json(place / "manifest.json", "")
    except UsageError:
        return False
    kind = MANIFEST_SCHEMA.partition("/")[0]
    return isinstance(content, dict) and str(content.get("schema")).partition("/")[0] == kind


@dataclass(frozen=True, slots=True)
class _InFile:
    """The norms of an exported model, one for each module, the number of their calls, and what else it says."""

    sites: list[dict[str, Any]]
    calls: int
    refusals: list[dict[str, Any]]
    limits: SizeLimits
    attention: Sequence[dict[str, Any]] = ()
    quantized: dict[str, Any] | None = None


def _from_folder(folder: Path) -> _InFile:
    from rmsnorm_deploy.export.graph.sizes import size_limits_of
    from rmsnorm_deploy.export.onnx_io.manifest import read_manifest

    manifest = read_manifest(folder)
    calls = sum(len(site.get("calls") or [None]) for site in manifest.get("sites", ()))
    sites = [{key: value for key, value in site.items() if key != "calls"} for site in manifest.get("sites", ())]
    sites = [{"class": None, "width": None, "dtype": None, **site} for site in sites]
    refusals = [{"class": "", **row} for row in manifest.get("refusals", ())]
    attention = manifest.get("attention", ())
    return _InFile(sites, calls, refusals, size_limits_of(manifest), attention, manifest.get("quantized"))


def _from_file(path: Path) -> _InFile:
    """The norms and refusals of an ONNX file, and the sizes for which it was exported."""
    from rmsnorm_deploy.export.from_onnx.inline_functions import inline_norm_functions
    from rmsnorm_deploy.export.graph.sizes import limits_in
    from rmsnorm_deploy.export.lowering.quantized_norms import split_quantized_outputs
    from rmsnorm_deploy.export.onnx_io.check_graph import check_graph
    from rmsnorm_deploy.export.onnx_io.read_model import read_model, to_ir
    from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
    from rmsnorm_deploy.export.recognition.separate_biases import separate_biases

    file = read_model(path)
    check_graph(file.model, file.where)
    model = inline_norm_functions(to_ir(file))[0]
    split_quantized_outputs(model)  # an operator with a quantized output is also a norm
    separate_biases(model)  # as rewrite does
    found = find_graph_norms(model)
    limits = limits_in({row.key: row.value for row in file.model.metadata_props}, file.where)
    sites = list({site.path: site.to_dict() for site in reversed(found.sites)}.values())[::-1]
    return _InFile(sites, len(found.sites), [refusal.to_dict() for refusal in found.refusals], limits)
