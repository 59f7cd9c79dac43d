"""The names of the dynamic dims of a captured graph (`name_dims`).

torch gives each dim that can vary on its own a symbol, and dims that the model ties the same one. A symbol gets one
name, and a name belongs to one symbol, so two dims of a file share a name only if the model ties them. The documented
inputs of transformers' models are tied by their documentation: the batch of the mask is that of the tokens, though the
mask is read by index, which does not tie their sizes in torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from ..graph.metadata import PAST, PRESENT

# What the dims of an input of this name and rank are by the convention of transformers, in the order of preference: the
# first that has a symbol names it.
_CONVENTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_ids", ("batch", "sequence")),
    ("decoder_input_ids", ("batch", "decoder_sequence")),
    ("inputs_embeds", ("batch", "sequence", "hidden")),
    ("image_features", ("image_tokens", "hidden")),
    ("audio_features", ("audio_tokens", "hidden")),
    ("decoder_inputs_embeds", ("batch", "decoder_sequence", "hidden")),
    ("attention_mask", ("batch", "sequence")),
    ("decoder_attention_mask", ("batch", "decoder_sequence")),
    ("encoder_attention_mask", ("batch", "encoder_sequence")),
    ("encoder_hidden_states", ("batch", "encoder_sequence", "hidden")),
    ("position_ids", ("batch", "sequence")),
    ("position_ids", ("axes", "batch", "sequence")),
    ("token_type_ids", ("batch", "sequence")),
)
# The dims of a cache's tensors that follow the batch and the tokens, by the end of their names.
_CACHE_DIMS: dict[tuple[str, ...], dict[int, str]] = {
    (".encoder.key", ".encoder.value"): {0: "batch", 2: "encoder_sequence"},
    (".key", ".value"): {0: "batch", 2: "past_sequence"},
    (".indexer_keys", ".indexer_position_ids"): {0: "batch", 1: "past_sequence"},
}
_SHARED = {name for _, dims in _CONVENTIONS for name in dims} | {"batch", "past_sequence", "total_sequence"}
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def name_dims(
    model: ir.Model,
    fixed: Mapping[str, str],
    dynamic: bool | Mapping[str, Any] = True,
    documented: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Replace the symbols in all shapes of the graph: dynamic dims by descriptive names, fixed dims by their values.

    A dim that is computed from symbols, such as `2*s0`, gets the names in its formula.

    Args:
        model: the graph, whose shapes are changed.
        fixed: the values of symbols that the model fixes.
        dynamic: as for `capture`; the names of a mapping's dims (`{"x": {0: Dim("rows")}}`) are kept.
        documented: of a model whose inputs are as transformers documents them, the size of each symbol at capture.

    Returns:
        The name or value of each symbol.
    """
    names = {**fixed, **_fixed_cache_dims(model)}
    free = [symbol for symbol in _symbols(model) if symbol not in names]
    taken: dict[str, str] = {}
    for symbol, name in (*_given(model, dynamic), *_documented(model), *_own(model)):
        if symbol in free and symbol not in names and _may_have(symbol, name, taken, documented):
            names[symbol] = name
            taken.setdefault(name, symbol)
    pattern = re.compile(r"\b(" + ("|".join(map(re.escape, names)) or "(?!)") + r")\b")

    def renamed(dim: Any) -> Any:
        if not isinstance(dim, ir.SymbolicDim) or dim.value is None:
            return dim
        text = pattern.sub(lambda m: names[m[1]], str(dim.value))
        return int(text) if text.isdigit() else ir.SymbolicDim(text)

    for graph in model.graphs():
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            if value.shape is not None:
                value.shape = ir.Shape([renamed(dim) for dim in value.shape])
    return names


def _symbols(model: ir.Model) -> dict[str, None]:
    """The symbols of the inputs, in order."""
    found = {}
    for value in model.graph.inputs:
        for dim in value.shape or ():
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                found.update(dict.fromkeys(_SYMBOL.findall(str(dim.value))))
    return found


def _given(model: ir.Model, dynamic: bool | Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Symbols and the names that the user gave them."""
    inputs = {value.name or "": value for value in model.graph.inputs}
    for name, dims in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if isinstance(dims, Mapping | list | tuple):
            by_axis = dict(dims.items() if isinstance(dims, Mapping) else enumerate(dims))
            for index, symbol in _alone(inputs.get(name)):
                dim = by_axis.get(index)
                chosen = dim if isinstance(dim, str) else getattr(dim, "__name__", None)
                if chosen is not None:
                    yield symbol, chosen


def _may_have(symbol: str, name: str, taken: Mapping[str, str], documented: Mapping[str, int] | None) -> bool:
    """Whether a symbol may get a name: nothing has it, or only symbols to which the documentation ties this one."""
    if name not in taken:
        return True
    shared = documented is not None and name in _SHARED
    return shared and documented is not None and documented.get(symbol) == documented.get(taken[name])


def _documented(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Symbols and the names of the dims that they are by the documentation of transformers."""
    inputs = {value.name or "": value for value in model.graph.inputs}
    past = any(name.startswith(PAST) for name in inputs)
    # With a cache, the mask of a decoder is as long as the cache and the new tokens; the decoder of an encoder-decoder
    # has the encoder's mask.
    length = "encoder_sequence" if past and "decoder_input_ids" in inputs else "total_sequence" if past else "sequence"
    for name, dims in _CONVENTIONS:
        for index, symbol in _alone(inputs.get(name), len(dims)):
            yield symbol, length if name == "attention_mask" and index == 1 else dims[index]
    for name, value in inputs.items():
        if name.startswith(PAST):
            dims_of_cache = _cache_dims(name)
            for index, symbol in _alone(value):
                if index in dims_of_cache:
                    yield symbol, dims_of_cache[index]


def _cache_dims(name: str) -> dict[int, str]:
    return next((dims for ends, dims in _CACHE_DIMS.items() if name.endswith(ends)), {0: "batch"})


def _own(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Symbols, and names made from the input that they are in."""
    for value in model.graph.inputs:
        for index, symbol in _alone(value):
            yield symbol, f"{value.name or 'input'}_dim_{index}"
    # A symbol that is only part of formulas.
    yield from ((symbol, f"dim_{number}") for number, symbol in enumerate(_symbols(model)))


def _alone(value: ir.Value | None, rank: int | None = None) -> Iterator[tuple[int, str]]:
    """Index and symbol of the dims that are one symbol, of a value of this rank."""
    if value is None or value.shape is None or rank not in (None, len(value.shape)):
        return
    for index, dim in enumerate(value.shape):
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None and _SYMBOL.fullmatch(str(dim.value)):
            yield index, str(dim.value)


def _fixed_cache_dims(model: ir.Model) -> dict[str, str]:
    """Symbols for the heads and the head size of a cache input, with the values that the cache outputs have."""
    outputs = {value.name: value for value in model.graph.outputs}
    fixed = {}
    for value in model.graph.inputs:
        present = outputs.get((value.name or "").replace(PAST, PRESENT, 1))
        if present is None or present is value or value.shape is None or present.shape is None:
            continue
        for dim, known in zip(value.shape, present.shape, strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and isinstance(known, int):
                fixed[dim.value] = str(known)
    return fixed
