"""Graphs in ONNX's own text form, and their values and nodes by name."""

from __future__ import annotations

import onnx_ir as ir


def parsed(graph: str, opset: int = 18, *domains: str) -> ir.Model:
    """A model of one graph, such as `g (float[2,8] x) => (float[2,8] y) { y = Neg(x) }`; its types are not inferred.

    Every node is called after its first output, with `node_` in front.
    """
    imports = ", ".join([f'"" : {opset}', *(f'"{domain}" : 1' for domain in domains)])
    model = ir.from_onnx_text(f"<ir_version: 8, opset_import: [{imports}]> {graph}")
    for node in model.graph.all_nodes():
        node.name = f"node_{node.outputs[0].name}"
    return model


def values(model: ir.Model) -> dict[str, ir.Value]:
    """Every value of the main graph, by its name."""
    graph = model.graph
    made = [output for node in graph for output in node.outputs]
    return {str(value.name): value for value in (*graph.inputs, *graph.initializers.values(), *made)}


def op_types(model: ir.Model) -> list[str]:
    """The operators of the main graph, in order."""
    return [node.op_type for node in model.graph]
