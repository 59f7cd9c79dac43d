"""Values of a recipe that exclude each other, where each of them alone is possible (`together`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...export.lowering.attention_table import AttentionMode, check_attention, parse_attention
from ...export.lowering.table import DEFAULT_TARGET, opset_for, parse_target
from ...models.dtypes import norm_dtype
from ...models.errors import RmsnormDeployError, UsageError
from ...models.regular_files import read_json
from ..accuracy.tolerances import PARTS, Limits
from ..engines.api import FLAVORS, RUNTIMES, flavor_name
from .defaults import EXPORTS_ONLY, OF_PLUGIN, WEIGHTS
from .fields import default_of
from .recipe import Merged, Problem, refused, scheme_of
from .rows import is_validated
from .sources import located, source_kind
from .step_options import validation_options
from .steps import FIELDS, TRITON


def together(model: Merged, base: Path) -> Iterator[Problem]:
    """The problems of a model whose values are each possible.

    Args:
        model: the model with its defaults.
        base: the folder that paths are relative to.
    """
    source = model.values.get("source")
    kind = None if source is None else source_kind(source, base)
    is_onnx = kind == "onnx"
    if kind != "missing":
        yield from _of_source(model, is_onnx)
    yield from _of_file(model, is_onnx)
    yield from _of_engines(model)
    yield from _of_validation(model, is_onnx)
    yield from _of_packages(model, is_onnx)
    yield from _of_two_models(model, base)


def _of_source(model: Merged, is_onnx: bool) -> Iterator[Problem]:
    """Fields that models of PyTorch alone have, or files alone."""
    values = model.values
    if not is_onnx:
        if "against" in values:
            yield Problem(model.at("against"), f"expected a source that is an .onnx file, got {values.get('source')!r}")
    else:
        for key in EXPORTS_ONLY:
            if values.get(key):
                what = "an .onnx file keeps what it has: expected none for such a source"
                yield Problem(model.at(key), f"{what}, got {values[key]!r}")
        if values.get("validate") and "against" not in values:
            what = "an .onnx file is compared with PyTorch where against names the model: expected against"
            yield Problem(model.at("validate"), f"{what}, got none. The rewriting compares it before and after")
    allowed = WEIGHTS[is_onnx]
    if "weights" in values and values["weights"] not in allowed:
        yield Problem(model.at("weights"), f"expected one of {', '.join(allowed)}, got {values['weights']!r}")


def _of_file(model: Merged, is_onnx: bool) -> Iterator[Problem]:
    """The form of the norms and attentions, and the dtypes."""
    values = model.values
    try:
        targets = [parse_target(target) for target in values.get("targets") or [DEFAULT_TARGET]]
        dtypes: list[str | None] = [norm_dtype(dtype) for dtype in values.get("dtypes") or []] or [None]
        mode = parse_attention(values.get("attention") or ("decomposed" if is_onnx else "node"))
        scheme = scheme_of(values.get("quantize"))
    except RmsnormDeployError:
        return
    yield from _attention(model, mode, targets, is_onnx)
    for target in targets:
        remedy = "Omit opset, or use another target."
        yield from refused(model.at("opset"), partial(opset_for, target, values.get("opset")), remedy)
    for key in OF_PLUGIN if "plugin" not in targets else ():
        if values.get(key, default_of(key)) != default_of(key):
            yield Problem(model.at(key), f"expected the target plugin for {key} = {str(values[key]).lower()}, got none")
    for dtype in dtypes if scheme is not None else []:
        from ...export.lowering.weight_quantizer import check_quantize

        remedy = 'Use targets = ["ort"] and dtypes = ["float32"], or omit quantize.'
        yield from refused(model.at("quantize"), partial(check_quantize, scheme, targets, dtype), remedy)


def _attention(model: Merged, mode: AttentionMode, targets: list[Any], is_onnx: bool) -> Iterator[Problem]:
    if is_onnx:
        from ...export.from_onnx.rewrite_attentions import check_rewriting

        for target in targets:
            yield from refused(model.at("attention"), partial(check_rewriting, mode, target))
    elif mode == "in-place":
        remedy, with_past = 'Expected targets = ["ort"] and with_past = true.', model.values.get("with_past", False)
        yield from refused(model.at("attention"), partial(check_attention, mode, targets, with_past=with_past), remedy)


def _of_engines(model: Merged) -> Iterator[Problem]:
    values = model.values
    build = values.get("build") or []
    yield from _without_effect(model, FIELDS["build"], 'build = ["rtx"] or ["tensorrt"]', has_effect=bool(build))
    if build and values.get("quantize") is not None:
        what = f"TensorRT does not run quantize = {values['quantize']!r}"
        yield Problem(model.at("build"), f"{what}; omit one of them, or have a [[model]] for each")
    for runtime in (name for name in build if name in RUNTIMES):
        flavor = FLAVORS[flavor_name(runtime)]
        if values.get("architectures") and not flavor.architectures:
            what = f"{flavor.title} builds for the GPU of the machine: expected none"
            yield Problem(model.at("architectures"), f"{what}, got {', '.join(values['architectures'])}")


def _of_validation(model: Merged, is_onnx: bool) -> Iterator[Problem]:
    values = model.values
    own = tuple(key for key in FIELDS["validate"] if key not in FIELDS["export"] and key != "against")
    is_compared = is_validated(values, is_onnx=is_onnx)
    yield from _without_effect(model, (*own, "runners", "provider"), "validate = true", has_effect=is_compared)
    for name in values.get("runners") or []:
        if name in RUNTIMES and name not in values.get("build", ()):
            yield Problem(model.at("runners"), f'expected build = ["{name}"] for the runner {name}, got none')
    found = [
        Problem((*model.at("limits"), name), f"expected the name of an output, {' or '.join(PARTS)}, got {name!r}")
        for name in values.get("limits", {})
        if name.startswith("@") and name not in PARTS
    ]
    found += [
        problem
        for name, kinds in values.get("limits", {}).items()
        for kind, limit in kinds.items()
        for problem in refused((*model.at("limits"), name, kind), partial(Limits, **{kind: limit}))
    ]
    found += [
        problem
        for key in own
        if key in values and key != "limits"
        for problem in refused(model.at(key), partial(validation_options, {key: values[key]}))
    ]
    if not found:
        found += _inputs_twice(model)
    yield from found or refused(model.header, partial(validation_options, values))


def _inputs_twice(model: Merged) -> Iterator[Problem]:
    """Several sources of the inputs of the comparison, of which only one can be used."""
    values = model.values
    given = [key for key in ("test_inputs", "prompts", "shapes") if values.get(key)]
    yield from _without_effect(model, ("tokenizer",), "prompts", has_effect="prompts" in given)
    if {"test_inputs", "prompts"} <= set(given):
        yield Problem(model.at("test_inputs"), "expected only one of test_inputs and prompts, got both")
    if values.get("thorough") and given:
        what = "thorough adds generated inputs: expected no test_inputs, prompts or shapes beside it"
        yield Problem(model.at("thorough"), f"{what}, got {' and '.join(given)}")


def _of_packages(model: Merged, is_onnx: bool) -> Iterator[Problem]:
    values = model.values
    servers = values.get("package") or []
    if "genai" in servers and not is_onnx and not values.get("with_past", False):
        yield Problem(model.at("package"), "genai runs decoders with a cache: expected with_past = true, got false")
    yield from _without_effect(model, ("backend", "max_batch"), 'package = ["triton"]', has_effect=TRITON in servers)
    if values.get("backend") == "tensorrt" and TRITON in servers and "tensorrt" not in values.get("build", ()):
        yield Problem(model.at("backend"), 'tensorrt runs an engine: expected build = ["tensorrt"], got none')
    if "trtexec" not in servers:
        return
    if "ort" in (target.lower() for target in values.get("targets") or ()):
        yield Problem(
            model.at("package"), "trtexec parses the targets standard, primitives and plugin, got the target ort"
        )
    if values.get("quantize") is not None:
        yield Problem(model.at("package"), f"trtexec does not run quantize = {values['quantize']!r}; omit one of them")


def _of_two_models(model: Merged, base: Path) -> Iterator[Problem]:
    """What takes one model, where an export with a cache makes two, an encoder and its decoder."""
    values = model.values
    source = values.get("source")
    if source is None or not values.get("with_past") or source_kind(source, base) != "folder":
        return
    try:
        config = read_json(Path(located(source, base)) / "config.json", "")
    except UsageError:
        return  # the row says so
    if not isinstance(config, dict) or config.get("is_encoder_decoder") is not True:
        return
    if values.get("build"):
        what = "an encoder and its decoder are two models: expected no build, got"
        yield Problem(model.at("build"), f"{what} {', '.join(values['build'])}. Build each of them with rmsnorm build")
    others = [server for server in values.get("package") or () if server != TRITON]
    if others:
        what = "an encoder and its decoder are two models, which triton alone serves from one folder: expected triton"
        yield Problem(
            model.at("package"), f"{what}, got {', '.join(others)}. Package each of them with rmsnorm package"
        )


def _without_effect(model: Merged, keys: tuple[str, ...], needs: str, *, has_effect: bool) -> Iterator[Problem]:
    """Fields of the model itself that nothing reads; defaults need not fit every model."""
    for key in keys if not has_effect else ():
        if model.places.get(key, ("defaults",))[0] == "model":
            yield Problem(model.at(key), f"expected {needs}, without which {key} has no effect, got none")
