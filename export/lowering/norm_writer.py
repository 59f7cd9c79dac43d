"""Write one norm of a graph in a target's form; exports and rewrites both use this."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ...models.dtypes import onnx_name
from ...models.errors import UnsupportedError
from ...models.spec import NormSpec
from ..graph.constants import constant
from ..graph.metadata import (
    FORM_KEY,
    FOUND_KEY,
    PARAMETERS_KEY,
    PATH_KEY,
    SPEC_KEY,
    TARGET_KEY,
    VALUES_KEY,
    Form,
)
from ..graph.residual import residual_operands
from ..graph.site import GraphSite
from .already_lowered import counterparts
from .builder import Builder
from .steps import Emitted, NormInputs, emit
from .table import Deviation, Environment, LoweringRefusal, deviations, resolve

# What a norm keeps when it is written again: where an export found it.
_ORIGIN = (FOUND_KEY, PARAMETERS_KEY)


@dataclass(frozen=True, slots=True)
class LoweredSite:
    """One norm of the finished graph.

    Attributes:
        path: path of its module.
        spec: what it computes in this call (a gated norm called without a gate has none).
        form: `plain`, or `residual_add` when a residual add precedes the norm.
        node: name of its main node.
        dtype: dtype of its input.
        deviations: the cases in which the target is not exact for it.
    """

    path: str
    spec: NormSpec
    form: Form
    node: str
    dtype: str
    deviations: list[Deviation] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The norm as the manifest shows it, below the module that it came from."""
        return {
            "node": self.node,
            "form": self.form,
            "spec": self.spec.to_dict(),
            "deviations": [{"runtime": d.runtime, "at_most_ulp": d.ulp, "reason": d.reason} for d in self.deviations],
        }


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A norm that was written.

    Attributes:
        lowered: the written norm.
        changed: False where the norm was in the target's form already; then only metadata was added.
        x: the value to normalize; None where one operator adds, normalizes and does not output the sum.
        y: the result.
    """

    lowered: LoweredSite
    changed: bool
    x: ir.Value | None
    y: ir.Value


def _as_narrow_as_the_result(value: ir.Value | None, site: GraphSite) -> ir.Value | None:
    """A weight or bias in x's dtype, if a file stores it wider than that and the result is not wider.

    Else a norm whose result follows its weight would return the wider dtype. Nothing changes if a value would.
    """
    dtype, array = site.dtype, constant(value)
    if value is None or array is None or value.dtype == dtype or site.y.dtype != dtype or not site.spec.follows_weight:
        return value
    narrow = array.astype(dtype.numpy())
    if not np.array_equal(narrow.astype(array.dtype), array):
        return value
    name = f"{value.name}.{onnx_name(dtype)}"
    return ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype), const_value=ir.tensor(narrow, name=name))


class NormWriter:
    """Writes the norms of one model.

    Args:
        root: the main graph, to which constants are added.
        target: one of the lowering table's targets.
        opset: opset import of the finished file.
    """

    def __init__(self, root: ir.Graph, target: str, opset: int) -> None:
        self._root, self._target, self._opset = root, target, opset
        self._constants: dict[Any, ir.Value] = {}
        self._names = {node.name for node in root.all_nodes() if node.name}
        self._successors: dict[ir.Value, ir.Value] = {}
        self._left: set[ir.Value] = set()
        self._numbers: Counter[str] = Counter()

    def current(self, value: ir.Value | None) -> ir.Value | None:
        """The value that has replaced this one, or the value itself; every written norm has a new result."""
        while value is not None and value in self._successors:
            value = self._successors[value]
        return value

    def write(self, site: GraphSite, notes: Mapping[str, str] | None = None) -> Written:
        """Write the norm in the target's form, unless it has that form already.

        Args:
            site: the norm; those of its nodes that nothing else reads are removed.
            notes: additional metadata of each new node.

        Raises:
            UnsupportedError: the target does not support this norm; the graph is unchanged.
        """
        site = self._now(site)
        spec, target, last = site.spec, self._target, site.y.producer()
        if last is None or not isinstance(last.graph, ir.Graph):
            raise ValueError(f"norm {site.path!r} is outside of any graph")
        graph, dtype = last.graph, onnx_name(site.dtype)
        environment = Environment(opset=self._opset, dtype=dtype, top_level=graph is self._root)
        cell = resolve(spec, site.form, target, environment)
        if isinstance(cell, LoweringRefusal):
            raise cell.to_error()
        origin = {key: last.metadata_props[key] for key in _ORIGIN if key in last.metadata_props}
        metadata = {**origin, **(notes or {}), PATH_KEY: site.path, TARGET_KEY: target, FORM_KEY: site.form}
        builder = Builder(graph, self._root, metadata, self._constants, self._opset)
        composite = last if site.target is not None else None
        try:
            inputs, x = self._inputs(builder, site, composite)
            emitted = emit(builder, spec, inputs, target, site.path)
            self._check(site, emitted)
        except Exception:
            builder.withdraw()
            raise
        form = site.form
        if inputs.sum_of is not None and emitted.total is None:  # a gate or a bias is between the add and the norm
            form = "plain"
            for node in builder.nodes:
                node.metadata_props[FORM_KEY] = form
        found = counterparts(builder.nodes, emitted.output, site.y)
        if found is not None:
            for node in builder.nodes:
                found[node].metadata_props.update(node.metadata_props)
            core, total = found[emitted.core], site.x
            output = site.y
            builder.withdraw()
        else:
            self.name_nodes(builder.nodes, site.path or "norm")
            total = self._replace(builder, site, emitted, composite, x)
            core, output = emitted.core, emitted.output
        if found is None or SPEC_KEY not in core.metadata_props:
            core.metadata_props[SPEC_KEY] = spec.to_json()
        values = {"x": total, "y": output, "gate": site.gate}
        names = {role: value.name for role, value in values.items() if value is not None}
        core.metadata_props[VALUES_KEY] = json.dumps(names, sort_keys=True)
        lowered = LoweredSite(site.path, spec, form, core.name or "", dtype, deviations(cell, spec, dtype))
        return Written(lowered, found is None, total, output)

    def _now(self, site: GraphSite) -> GraphSite:
        x = self.current(site.x)
        sum_of = tuple(value for value in map(self.current, site.sum_of or ()) if value is not None)
        form = site.form
        if site.target is None and x is not None and residual_operands(x, site.y) is None:
            form, sum_of = "plain", ()  # the Add was fused into another norm of the same sum
        return replace(
            site,
            form=form,
            x=x,
            weight=self.current(site.weight),
            bias=self.current(site.bias),
            gate=self.current(site.gate),
            sum_of=(sum_of[0], sum_of[1]) if len(sum_of) == 2 else None,
        )

    def _inputs(self, builder: Builder, site: GraphSite, composite: ir.Node | None) -> tuple[NormInputs, ir.Value]:
        """The inputs of `emit`, and x. Where one operator added and normalized, x is a new Add or a placeholder."""
        weight, bias = (
            self._registered(builder, _as_narrow_as_the_result(value, site)) for value in (site.weight, site.bias)
        )
        # A fused node takes the position of the Add, and a computed weight may be computed after it.
        early = weight is None or weight.producer() is None
        operands = site.sum_of if self._target == "plugin" and early and site.form == "residual_add" else None
        if composite is None:
            if site.x is None:
                raise ValueError(f"norm {site.path!r} does not have an input")
            return NormInputs(site.x, weight, bias, site.gate, operands), site.x
        a, b = site.sum_of or (None, None)
        if a is None or b is None:
            raise ValueError(f"norm {site.path!r}: expected two operands of a residual add")
        if operands is not None:
            x = ir.Value(name=None, shape=a.shape, type=ir.TensorType(site.dtype))
        else:
            x = builder.op("Add", [a, b], dtype=site.dtype, shape=a.shape)
        return NormInputs(x, weight, bias, site.gate, operands), x

    def _registered(self, builder: Builder, value: ir.Value | None) -> ir.Value | None:
        """A constant as an initializer of the main graph; any other value as it is."""
        array = constant(value)
        if value is None or array is None or value.is_initializer() or value.dtype is None:
            return value
        return builder.constant(array, value.dtype, str(value.name))

    def _check(self, site: GraphSite, emitted: Emitted) -> None:
        if site.y.dtype is not None and emitted.output.dtype != site.y.dtype:
            given = "an unknown dtype" if emitted.output.dtype is None else onnx_name(emitted.output.dtype)
            raise UnsupportedError(
                f"norm {site.path!r} returns {onnx_name(site.y.dtype)}, and target {self._target} would return {given}."
            )

    def _replace(
        self, builder: Builder, site: GraphSite, emitted: Emitted, composite: ir.Node | None, x: ir.Value
    ) -> ir.Value | None:
        """Insert the new nodes, replace the old values, and remove the nodes that nothing reads any more."""
        old_sum, last = site.x, site.y.producer()
        assert last is not None
        total = emitted.total if emitted.total is not None else x
        add = old_sum.producer() if old_sum is not None and composite is None else None
        if emitted.total is not None and add is not None and old_sum is not None:
            # Nodes after the Add read the sum, so the fused node takes the position of the Add.
            builder.insert_before(add)
            self.take_over(old_sum, emitted.total)
            self.take_over(site.y, emitted.output)
            self.remove_unread([last, add])
            return emitted.total
        builder.insert_before(last)
        if composite is not None and old_sum is not None:
            self.take_over(old_sum, total)
        self.take_over(site.y, emitted.output)
        self.remove_unread([last])
        return total

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of `old` read `new`, under the name of `old`."""
        name, shape = old.name, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = None, name
        if new.shape is None:
            new.shape = shape
        self._successors[old] = new

    def remove_unread(self, nodes: list[ir.Node]) -> None:
        """Remove these nodes if nothing reads them, and then the nodes that only they read."""
        pending = list(nodes)
        while pending:
            node = pending.pop()
            graph = node.graph
            if graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
                continue
            read = [value for value in node.inputs if value is not None]
            graph.remove(node, safe=True)
            for value in read:
                producer = value.producer()
                if producer is not None:
                    pending.append(producer)
                elif value.is_initializer():
                    self._left.add(value)

    def finish(self) -> None:
        """Remove the initializers that only removed nodes read. Call this after the last `write`."""
        for value in self._left:
            owner = value.graph
            if not value.uses() and not value.is_graph_input() and not value.is_graph_output() and owner is not None:
                owner.initializers.pop(str(value.name), None)
        for value in self._constants.values():  # added for a norm that was then refused
            if not value.uses():
                self._root.initializers.pop(str(value.name), None)
        self._left.clear()

    def name_nodes(self, nodes: Sequence[ir.Node], path: str) -> None:
        """Name new nodes after their module, so that profiles and engines are readable.

        Node names are unique: those of a module that is called several times end in a number.
        """
        for node in nodes:
            base = name = f"{path}/{node.op_type}"
            while name in self._names:
                self._numbers[base] += 1
                name = f"{base}_{self._numbers[base]}"
            self._names.add(name)
            node.name = name
