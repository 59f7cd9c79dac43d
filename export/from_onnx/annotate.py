"""Record in the metadata of a graph's nodes which norm they belong to, for files that this package did not write."""

from __future__ import annotations

import json

import onnx_ir as ir

from ..graph.metadata import FORM_KEY, PATH_KEY, SPEC_KEY, VALUES_KEY
from ..graph.site import GraphSite
from ..recognition.find_norms import find_graph_norms

_CASTS = ("Cast", "CastLike", "Identity")


def annotate(model: ir.Model) -> None:
    """Recognize the norms of the main graph and record them in the nodes' metadata, as `NormWriter` does.

    A model whose nodes already have this metadata is not changed. Nodes without a name get one, because they are
    identified by it.
    """
    if any(SPEC_KEY in node.metadata_props for node in model.graph):
        return
    taken = {node.name for node in model.graph if node.name}
    seen: set[ir.Node] = set()
    for site in find_graph_norms(model).sites:
        nodes = _with_casts(site)
        if site.x is None or seen.intersection(nodes) or any(node.graph is not model.graph for node in nodes):
            continue
        seen.update(nodes)
        for node in nodes:
            if not node.name:
                node.name = _free(f"{site.path}/{node.op_type}", taken)
            node.metadata_props.update({PATH_KEY: site.path, FORM_KEY: "plain"})
        core = site.nodes[-1]
        core.metadata_props[SPEC_KEY] = site.spec.to_json()
        values = {"x": site.x, "y": site.y, "gate": site.gate}
        names = {role: value.name for role, value in values.items() if value is not None}
        core.metadata_props[VALUES_KEY] = json.dumps(names, sort_keys=True)


def _with_casts(site: GraphSite) -> list[ir.Node]:
    """The norm's nodes, and the casts between x or the gate and these nodes."""
    nodes = list(site.nodes)
    ends, inside = {site.x, site.gate}, set(nodes)
    for node in site.nodes:
        for value in node.inputs:
            way: list[ir.Node] = []
            current = value
            while current is not None and current not in ends:
                before = current.producer()
                if before is None or before in inside or before.op_type not in _CASTS:
                    way = []
                    break
                way.append(before)
                current = before.inputs[0]
            inside.update(way)
            nodes[:0] = way
    return nodes


def _free(base: str, taken: set[str]) -> str:
    name, number = base, 1
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    taken.add(name)
    return name
