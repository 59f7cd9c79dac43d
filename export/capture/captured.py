"""What a capture returns (`Capture`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from ..graph.sizes import SizeLimits


@dataclass(slots=True)
class Capture:
    """A captured model.

    Attributes:
        model: the graph, with one `rmsnorm_deploy.capture::Norm` for each call of a norm. Its weights are the torch
            tensors themselves, not copies.
        with_past: whether the KV cache is an input and an output.
        notes: changes that were required to capture the model, for the manifest.
        fixed_dims: symbols in the graph's shapes that the model fixes, with their values.
        program: torch's program that the graph was made from, and what was captured; None if torch returns none.
        limits: the sizes of dynamic dims for which the graph is valid.
    """

    model: ir.Model
    with_past: bool = False
    notes: list[str] = field(default_factory=list)
    fixed_dims: dict[str, str] = field(default_factory=dict)
    program: tuple[Any, torch.export.ExportedProgram] | None = None
    limits: SizeLimits = field(default_factory=SizeLimits)
