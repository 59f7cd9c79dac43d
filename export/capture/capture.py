"""Capture a model whose norms are swapped as an ONNX graph, which can then be lowered for any target."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from ...models.errors import RmsnormDeployError, UnsupportedError
from ...models.weights.stand_ins import unread_weights
from ..graph.repairs import repair
from ..graph.sizes import SizeLimits
from ..lowering.table import DEFAULT_OPSET
from ..sizes.dims import name_dims
from ..sizes.ranges import size_limits, symbols_of
from ..sizes.second_sizes import check_second_sizes, example_sizes
from .attention_nodes import attentions_by_spec
from .captured import Capture
from .causes import explained
from .quick_exporters import quick_exporters
from .torch_module import capture_module
from .transformers_model import capture_transformers, is_pretrained


def capture_opset(opset: int | None) -> int:
    """The opset to capture at: at most 20, because later opsets change other operators too."""
    return DEFAULT_OPSET if opset is None else min(opset, DEFAULT_OPSET)


def capture(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    opset: int | None = None,
    dynamic: bool | Mapping[str, Any] = True,
    with_past: bool = False,
    part: str | None = None,
) -> Capture:
    """Capture `model` called with `inputs`.

    Args:
        model: in eval mode, its norms swapped.
        inputs: keyword arguments of its forward, tensors of at least 2 in every dim that is to be dynamic.
        opset: opset import of the exported file.
        dynamic: True makes every dim dynamic that the model does not fix; False makes all static; a mapping is passed
            to `torch.export` as `dynamic_shapes`.
        with_past: make the KV cache an input and an output (decoders of transformers).
        part: capture this part of an encoder-decoder only, with its cache; see `part_of`.

    Raises:
        UnsupportedError: the upstream exporter cannot capture the model; the message contains the cause.
    """
    is_transformers = is_pretrained(model)
    if with_past and not is_transformers:
        raise UnsupportedError(
            f"{type(model).__name__} is not a transformers model, so there is no KV cache to export. Omit --with-past."
        )
    with _quiet(), _without_needless_conversions(), quick_exporters():
        try:
            if is_transformers:
                captured = capture_transformers(model, dict(inputs), capture_opset(opset), dynamic, with_past, part)
            else:
                captured = capture_module(model, dict(inputs), capture_opset(opset), dynamic)
        except (RmsnormDeployError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise explained(model, error) from error
        repair(captured.model)
        names = name_dims(captured.model, captured.fixed_dims, dynamic, _documented(captured, is_transformers))
        with unread_weights(model):
            _check_sizes(captured, names)
    return captured


def _documented(captured: Capture, is_transformers: bool) -> dict[str, int] | None:
    """The sizes of all symbols of a model whose inputs are as transformers documents them."""
    if not is_transformers or captured.program is None:
        return None
    program = captured.program[1]
    return example_sizes(program, {symbol: symbol for _, _, symbol in symbols_of(program)})


def _check_sizes(captured: Capture, names: Mapping[str, str]) -> None:
    """Set the limits of a graph with dynamic dims, and compare it with the model at other sizes."""
    if captured.program is None:
        return
    model, program = captured.program
    dynamic = {symbol: name for symbol, name in names.items() if not name.isdigit()}
    example = example_sizes(program, {symbol: symbol for symbol in dynamic})
    limits = size_limits(program, dynamic, example)
    if captured.with_past:
        # torch's conditions and lower ends describe the example's mask and cache, not what the graph computes.
        highs = {name: (0, ends[1]) for name, ends in limits.ranges.items() if ends[1] is not None}
        limits = SizeLimits(highs)
    outputs = [str(value.name) for value in captured.model.graph.outputs]
    with attentions_by_spec():
        checked = check_second_sizes(model, program, dynamic, limits, outputs)
    captured.limits = checked.limits
    captured.notes += checked.notes
    captured.program = None  # it holds a second copy of the graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the upstream exporters, whose output would hide this package's messages and corrupt JSON output."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def _without_needless_conversions() -> Iterator[None]:
    """`module.to(dtype)` returns at once where the module has the dtype.

    Some routers convert their classifier in every call. torch's own conversion replaces each parameter by itself then,
    which torch.export cannot capture.
    """
    original = nn.Module.to

    def to(self: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
        given = [*arguments, *keywords.values()]
        dtype = given[0] if len(given) == 1 and isinstance(given[0], torch.dtype) else None
        floating = [t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()]
        if dtype is not None and all(tensor.dtype == dtype for tensor in floating):
            return self
        return original(self, *arguments, **keywords)

    with mock.patch.object(nn.Module, "to", to):
        yield


def detached(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the inputs that a model may change."""
    return {name: copy.deepcopy(value) for name, value in inputs.items()}
