"""Inline the model-local functions that contain norms or parts of one: recognition reads a single graph."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from ..lowering.plugin_functions import stands_in_for_plugin
from ..recognition.find_norms import find_graph_norms

_TAG = "rmsnorm_deploy.function"


def inline_norm_functions(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """The model with every function inlined that contains a norm or a part of one.

    These functions are determined on a copy in which all functions are inlined. Functions without norms are not
    inlined, and neither are the functions that replace the plugin where it is not registered.

    Returns:
        The model itself where there is nothing to inline, else a copy; and the names of the inlined functions.
    """
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    # A function with another opset than the model cannot be inlined unchanged.
    own = [
        function for function in model.functions.values()
        if not stands_in_for_plugin(function) and function.opset_imports.get("", opset) == opset
    ]  # fmt: skip
    keys = {_key(function) for function in own}
    if not own:
        return model, []
    trial = model.clone()
    for function in trial.functions.values():
        for node in function.all_nodes():
            node.metadata_props[_TAG] = _key(function)
    InlinePass(lambda function: _key(function) in keys)(trial)
    sites = find_graph_norms(trial).sites
    wanted = {node.metadata_props[_TAG] for site in sites for node in site.nodes if _TAG in node.metadata_props}
    if not wanted:
        return model, []
    # A function is inlined wherever it is called: also in one of another opset, whose body it would make invalid.
    wanted = _with_callers(list(model.functions.values()), wanted)
    if not wanted <= keys:
        return model, []
    inlined = model.clone()
    InlinePass(lambda function: _key(function) in wanted)(inlined)
    return inlined, sorted(f"{f.domain}::{f.name}" for f in own if _key(f) in wanted)


def _key(function: ir.Function) -> str:
    return "::".join(function.identifier())


def _with_callers(functions: list[ir.Function], wanted: set[str]) -> set[str]:
    """These functions and all that call them, directly or indirectly."""
    calls = {_key(f): {"::".join(node.op_identifier()) for node in f.all_nodes()} for f in functions}
    found, grown = set(wanted), True
    while grown:
        callers = {key for key, called in calls.items() if called & found}
        grown = not callers <= found
        found |= callers
    return found
