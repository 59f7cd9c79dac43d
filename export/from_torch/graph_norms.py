"""Norms of a captured graph that no recognized module computes (`find_unswapped`, `mark`, `marked`).

A norm may be a call of `F.rms_norm` or a formula in the forward of another module, or the forward of a module that
returns a tuple. `find_norms` of `export.recognition` finds it in the graph, as in any ONNX file. Its path is:

- `MODULE:rms_norm_N`, such as `layers.0.attn:rms_norm_1`: MODULE is the path of the module whose forward computes it
  (empty for the model itself), N counts the norms of this module in graph order, from 0, over all its calls;
- `MODULE` alone, where recognition refused that module and all norms in it have one formula and one weight: these are
  calls of one norm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from ...models.recognition.site import Recognition, Refusal
from ..graph.captured_nodes import CAPTURE_DOMAIN
from ..graph.constants import constant
from ..graph.metadata import FOUND_KEY, IN_GRAPH, PARAMETERS_KEY, PATH_KEY
from ..graph.site import GraphRefusal, GraphSite
from ..recognition.find_norms import find_norms

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, slots=True)
class UnswappedNorms:
    """The norms of a captured graph that are not modules.

    Attributes:
        rows: one row for each path, as the manifest shows a norm, without its calls.
        refusals: nodes of the graph that look like a norm and were not recognized, with the reason.
        replaced: refused modules whose norms were found in the graph.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[GraphRefusal] = field(default_factory=list)
    replaced: list[Refusal] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """A note for each reason for which modules were refused whose norms were found in the graph."""
        groups: dict[tuple[str, str], list[str]] = {}
        for refusal in self.replaced:
            key = (refusal.class_name.rpartition(".")[2], refusal.reason)
            groups.setdefault(key, []).append(refusal.path or "the model itself")
        return [
            f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} ({name}) found in the graph, because "
            f"not recognized as a module: {reason}"
            for (name, reason), paths in groups.items()
        ]

    def left(self, refusals: Iterable[Refusal]) -> list[Refusal]:
        """The refused modules whose norms were not found in the graph."""
        paths = {refusal.path for refusal in self.replaced}
        return [refusal for refusal in refusals if refusal.path not in paths]


def find_unswapped(captured: ir.Model, model: nn.Module, recognition: Recognition) -> UnswappedNorms:
    """Find the norms of a captured graph that are not swapped modules, and mark their nodes with path and parameters.

    Args:
        captured: the captured graph of `model`; only metadata of nodes changes. Of the weights, only those of norms
            are read.
        model: the captured module.
        recognition: its modules: the recognized ones are single nodes of the graph already.
    """
    found = find_norms(captured)
    modules = dict(model.named_modules())
    sites = [site for site in found.sites if site.x is not None]
    owners = [_module(site, modules) for site in sites]
    refused = {refusal.path: refusal for refusal in recognition.refusals}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    rows: dict[str, dict[str, Any]] = {}
    for site, owner, path in zip(sites, owners, _paths(sites, owners, refused), strict=True):
        parameters = _parameters(site, owner, tensors)
        _mark(site, path, parameters)
        class_name = refused[owner].class_name if path in refused else None
        row = {**site.to_dict(), "path": path, "class": class_name, "parameters": parameters}
        rows.setdefault(path, row)
    replaced = [refusal for refusal in recognition.refusals if refusal.path in owners]
    return UnswappedNorms(list(rows.values()), _refusals(found.refusals, captured, modules, refused, owners), replaced)


def marked(model: ir.Model) -> Iterator[tuple[ir.Node, GraphSite]]:
    """The norms that `find_unswapped` marked, and the last node of each; their metadata stay."""
    if not any(FOUND_KEY in node.metadata_props for node in ir.traversal.RecursiveGraphIterator(model.graph)):
        return
    for site in find_norms(model).sites:
        last = site.y.producer()
        if last is not None and FOUND_KEY in last.metadata_props:
            yield last, replace(site, path=last.metadata_props[PATH_KEY])


def unmark(node: ir.Node) -> None:
    """Remove the marks of a norm that stays as it is."""
    for key in (PATH_KEY, FOUND_KEY, PARAMETERS_KEY):
        node.metadata_props.pop(key, None)


def _mark(site: GraphSite, path: str, parameters: Sequence[str]) -> None:
    last = site.y.producer()
    assert last is not None
    last.metadata_props.update({PATH_KEY: path, FOUND_KEY: IN_GRAPH, PARAMETERS_KEY: json.dumps(parameters)})


def _paths(sites: Sequence[GraphSite], owners: Sequence[str], refused: Mapping[str, Refusal]) -> list[str]:
    """The path of each norm, as the module's docstring describes."""
    of_module: dict[str, list[GraphSite]] = {}
    paths = []
    for site, owner in zip(sites, owners, strict=True):
        of_module.setdefault(owner, []).append(site)
        paths.append(f"{owner}:rms_norm_{len(of_module[owner]) - 1}")
    whole = {owner for owner, norms in of_module.items() if owner in refused and _is_one_norm(norms)}
    return [owner if owner in whole else path for owner, path in zip(owners, paths, strict=True)]


def _is_one_norm(sites: Sequence[GraphSite]) -> bool:
    first = sites[0]
    return all(site.spec == first.spec and _same(site.weight, first.weight) for site in sites)


def _same(a: ir.Value | None, b: ir.Value | None) -> bool:
    if a is b:
        return True
    one, other = constant(a), constant(b)
    return one is not None and other is not None and one.dtype == other.dtype and np.array_equal(one, other)


def _module(site: GraphSite, modules: Mapping[str, nn.Module]) -> str:
    """The path of the module whose forward computes a norm: that of the node that sums the squares, or of another."""
    nodes = sorted(site.nodes, key=lambda node: node.name != site.node)
    return next((path for path in (_scope(node, modules) for node in nodes) if path is not None), "")


def _scope(node: ir.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The module in the exporter's metadata: a list of the paths of nested modules that ends with the operation."""
    text = node.metadata_props.get(_SCOPES, "")
    names = [part.strip().strip("'\"") for part in text.strip("[]").split(",")][:-1]
    known = [path for path in (re.sub(r"@\d+$", "", name) for name in names) if path in modules]
    return known[-1] if known else None


def _parameters(site: GraphSite, owner: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of a norm's weight and bias in the model; a name in the graph where the model has no such tensor."""
    return [_parameter(value, owner, tensors) for value in (site.weight, site.bias) if value is not None]


def _parameter(value: ir.Value, owner: str, tensors: Mapping[str, Tensor]) -> str:
    """The exporter folds casts of parameters into constants, so a constant is compared with the module's tensors."""
    name, array = str(value.name), constant(value)
    if name in tensors or array is None:
        return name
    prefix = f"{owner}." if owner else ""
    own = (key for key in tensors if key.startswith(prefix))
    return next((key for key in own if _holds(tensors[key], array)), name)


def _holds(tensor: Tensor, array: np.ndarray[Any, Any]) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() != array.size:
        return False
    return np.array_equal(tensor.detach().cpu().double().numpy().ravel(), array.astype(np.float64).ravel())


def _refusals(
    refusals: Iterable[GraphRefusal],
    captured: ir.Model,
    modules: Mapping[str, nn.Module],
    refused: Mapping[str, Refusal],
    owners: Sequence[str],
) -> list[GraphRefusal]:
    """The refusals of the graph, by module; those of modules that are refused or have a norm are not repeated."""
    nodes = {node.name: node for node in ir.traversal.RecursiveGraphIterator(captured.graph)}
    found: dict[tuple[str, str], GraphRefusal] = {}
    for refusal in refusals:
        node = nodes.get(refusal.node)
        path = (_scope(node, modules) if node is not None else None) or ""
        if path not in refused and path not in owners and (node is None or node.domain != CAPTURE_DOMAIN):
            found.setdefault((path, refusal.reason), replace(refusal, path=path))
    return list(found.values())
