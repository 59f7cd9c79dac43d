"""What a file's norm computes (`read_formulas`), and how that differs from PyTorch's module (`differences`).

The graph is read, not its metadata: metadata say what the export intended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from ...export.from_onnx.inline_functions import inline_norm_functions
from ...export.graph.constants import constant
from ...export.graph.metadata import SPEC_KEY
from ...export.onnx_io.read_model import sort_nodes
from ...export.recognition.find_norms import find_graph_norms
from ...models.dtypes import HALF_DTYPES, onnx_name
from ...models.spec import Activation, Gate, Order, Reduction
from ..runners.base import Array
from .access import Formula

ORDERS: dict[Order, str] = {
    "scale_then_cast": "multiplies by the weight before it rounds to {dtype}",
    "cast_then_scale": "rounds to {dtype} before it multiplies by the weight",
    "cast_factor": "rounds the factor 1 / RMS to {dtype} before it multiplies",
    "no_upcast": "computes in {dtype} throughout",
}
REDUCTIONS: dict[Reduction, str] = {"mean": "takes the mean of the squares", "sum": "sums the squares without a mean"}
GATES: dict[Gate, str] = {
    "none": "has no gate",
    "before": "multiplies by the gate before it normalizes",
    "after": "multiplies by the gate after it normalizes",
}
ACTIVATIONS: dict[Activation, str] = {
    "none": "applies no function to the gate",
    "silu": "applies SiLU to the gate",
    "sigmoid": "applies the sigmoid to the gate",
}


@dataclass(frozen=True, slots=True)
class FileFormulas:
    """The norms that a graph shows, by the name of their result, and why others are none, by module path."""

    norms: dict[str, Formula]
    refusals: dict[str, str]


def read_formulas(path: Path) -> FileFormulas:
    """What the norms of an .onnx file compute, as far as its graph shows it.

    Raises:
        UsageError: the nodes of the file cannot be sorted, or its functions cannot be inlined.
    """
    model = ir.load(path)
    sort_nodes(model, str(path))
    model, _ = inline_norm_functions(model)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.pop(SPEC_KEY, None)
    found = find_graph_norms(model)
    norms = {
        str(site.y.name): Formula(site.spec, onnx_name(site.dtype), constant(site.weight), constant(site.bias))
        for site in found.sites
    }
    return FileFormulas(norms, {refusal.path: refusal.reason for refusal in found.refusals})


def differences(file: Formula, module: Formula) -> list[str]:
    """How a file's norm differs from the module's, one phrase for each field of `NormSpec` and each parameter."""
    found = {name: compare(file, module) for name, compare in COMPARED.items()}
    weight = None if found["scale"] else _weight(file, module)
    bias = _values("bias", file.bias, module.bias)
    return [phrase for phrase in (*found.values(), weight, bias) if phrase is not None]


def _eps(file: Formula, module: Formula) -> str | None:
    a, b = file.spec.eps, module.spec.eps
    return None if math.isclose(a, b, rel_tol=1e-6) else f"epsilon is {a:g} in the file and {b:g} in the module"


def _trailing_dims(file: Formula, module: Formula) -> str | None:
    a, b = file.spec.trailing_dims, module.spec.trailing_dims
    return None if a == b else f"the file normalizes the last {a} dims, the module the last {b}"


def _scale(file: Formula, module: Formula) -> str | None:
    """A weight that is missing on one side; or a 1 that one side adds to the same weight."""
    one, other = file.spec, module.spec
    if one.has_weight != other.has_weight:
        present = file if one.has_weight else module
        if present.weight is not None and bool(np.all(_factor(present) == 1.0)):
            return None
        who, whose = ("file", "module") if one.has_weight else ("module", "file")
        return f"the {who} multiplies by a weight, the {whose} does not"
    if one.scale_offset == other.scale_offset or file.weight is None or module.weight is None:
        return None
    if file.weight.size != module.weight.size or not np.array_equal(_wide(file.weight), _wide(module.weight)):
        return None  # 1 + weight may be one constant of the file: then the values are compared
    who, whose = ("file", "module") if one.scale_offset else ("module", "file")
    return f"the {who} adds {max(one.scale_offset, other.scale_offset):g} to the weight, the {whose} does not"


def _order(file: Formula, module: Formula) -> str | None:
    if file.dtype not in HALF_DTYPES or file.spec.order == module.spec.order or not _rounds_apart(file, module):
        return None
    a, b = (ORDERS[side.spec.order].format(dtype=side.dtype) for side in (file, module))
    return f"the file {a}, the module {b}"


def _rounds_apart(file: Formula, module: Formula) -> bool:
    """Whether the orders differ in more than the dtype of the statistics, which has a phrase of its own."""
    return file.spec.sums_in_half == module.spec.sums_in_half


def _statistics(file: Formula, module: Formula) -> str | None:
    a, b = _sums_in(file), _sums_in(module)
    return None if a == b else f"statistics are {a} in the file and {b} in the module"


def _sums_in(side: Formula) -> str:
    if side.dtype in HALF_DTYPES:
        return side.dtype if side.spec.sums_in_half else "float32"
    return side.dtype if side.dtype != "float64" or side.spec.sums_in_double else "float32"


def _root(file: Formula, module: Formula) -> str | None:
    """Never a cause: the roots differ in the last bit only."""
    return None


def _reduction(file: Formula, module: Formula) -> str | None:
    a, b = REDUCTIONS[file.spec.reduction], REDUCTIONS[module.spec.reduction]
    return None if a == b else f"the file {a}, the module {b}"


def _group_size(file: Formula, module: Formula) -> str | None:
    a, b = (
        "the whole row" if side.spec.group_size is None else f"groups of {side.spec.group_size}"
        for side in (file, module)
    )
    return None if a == b else f"the file normalizes {a}, the module {b}"


def _gate(file: Formula, module: Formula) -> str | None:
    a, b = GATES[file.spec.gate], GATES[module.spec.gate]
    return None if a == b else f"the file {a}, the module {b}"


def _activation(file: Formula, module: Formula) -> str | None:
    if file.spec.has_gate != module.spec.has_gate:
        return None  # the gate itself is the difference
    a, b = ACTIVATIONS[file.spec.activation], ACTIVATIONS[module.spec.activation]
    return None if a == b else f"the file {a}, the module {b}"


def _bias(file: Formula, module: Formula) -> str | None:
    if file.spec.bias == module.spec.bias:
        return None
    present = file.bias if file.spec.bias else module.bias
    if present is not None and not np.any(_wide(present)):
        return None
    who, whose = ("file", "module") if file.spec.bias else ("module", "file")
    return f"the {who} adds a bias, the {whose} does not"


def _offset_in_float32(file: Formula, module: Formula) -> str | None:
    both = file.spec.scale_offset and module.spec.scale_offset
    if not both or file.dtype not in HALF_DTYPES or file.spec.offset_in_float32 == module.spec.offset_in_float32:
        return None
    a, b = ("float32" if side.spec.offset_in_float32 else side.dtype for side in (file, module))
    return f"the file adds 1 to the weight in {a}, the module in {b}"


# One entry for each field of `NormSpec`: the phrase where the field differs in what is computed, else None.
COMPARED: MappingProxyType[str, Callable[[Formula, Formula], str | None]] = MappingProxyType(
    {
        "eps": _eps,
        "trailing_dims": _trailing_dims,
        "scale": _scale,
        "order": _order,
        "statistics": _statistics,
        "root": _root,
        "reduction": _reduction,
        "group_size": _group_size,
        "gate": _gate,
        "activation": _activation,
        "bias": _bias,
        "offset_in_float32": _offset_in_float32,
    }
)


def _weight(file: Formula, module: Formula) -> str | None:
    if file.weight is None or module.weight is None:
        return None
    same = file.spec.scale_offset == module.spec.scale_offset
    a, b = (file.weight, module.weight) if same else (_factor(file), _factor(module))
    # 1 + weight as one constant was rounded to the dtype of the constant.
    return _values("weight", a, b, 0.0 if same else 2.0**-7 if file.dtype in HALF_DTYPES else 1e-6)


def _values(noun: str, file: Array | None, module: Array | None, close: float = 0.0) -> str | None:
    """Where two weights differ, in float64; `close` is the relative difference that is none."""
    if file is None or module is None:
        return None
    a, b = _wide(file).ravel(), _wide(module).ravel()
    if a.size != b.size:
        return (
            None
            if 1 in (a.size, b.size)
            else f"the {noun} has {a.size} channels in the file and {b.size} in the module"
        )
    wrong = np.flatnonzero(~np.isclose(a, b, rtol=close, atol=0.0, equal_nan=True))
    if not wrong.size:
        return None
    first = int(wrong[0])
    one, other = _told_apart(float(a[first]), float(b[first]))
    where = f"the first at {first}" if wrong.size > 1 else f"at {first}"
    return f"the {noun} differs in {wrong.size} of {a.size} channels, {where}: {one} in the file, {other} in the module"


def _told_apart(a: float, b: float) -> tuple[str, str]:
    """Both numbers, with as many digits as show that they differ."""
    for digits in (4, 8, 17):
        if f"{a:.{digits}g}" != f"{b:.{digits}g}":
            return f"{a:.{digits}g}", f"{b:.{digits}g}"
    return repr(a), repr(b)


def _factor(side: Formula) -> Array:
    assert side.weight is not None
    return _wide(side.weight) + side.spec.scale_offset


def _wide(array: Array) -> Array:
    return array.astype(np.float64)
