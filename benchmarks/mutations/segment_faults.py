"""Faults between norms: Linear and embedding weights, residual adds, masks, connections."""

from __future__ import annotations

import numpy as np

from .faults import Fault, Plant
from .model_faults.graph_values import all_ones, rewired
from .norm_faults import ADDITION, LLAMA, LLAMA_POST
from .plants import exchange
from .surgery import Array, Edit


def linear(scope: str, change: str, other: str = "") -> Plant:
    """A Linear whose weight is transposed, 1% larger in one channel, or another Linear's."""

    def plant(edit: Edit) -> None:
        node = edit.linear(scope)
        if other:
            node.replace_input_with(1, edit.linear(other).inputs[1])
        else:
            edit.change_constant(node, 1, {"transposed": np.transpose, "channel": _one_channel}[change])

    return plant


def _one_channel(array: Array) -> Array:
    changed = array.copy()
    changed[:, 2] *= 1.01
    return changed


def embedding_rows_swapped(edit: Edit) -> None:
    """The rows of two tokens are swapped; the inputs of `validate` contain the first of them."""

    def swap(array: Array) -> Array:
        changed = array.copy()
        changed[[5, 9]] = array[[9, 5]]
        return changed

    edit.change_constant(edit.node("Gather", after="input_ids"), 0, swap)


def residual(path: str, kind: str) -> Plant:
    """A wrong residual add before a norm: dropped, added twice, or replaced by the norm's result for later readers."""

    def plant(edit: Edit) -> None:
        add = edit.residual_add(path)
        x, branch = add.inputs[0], add.inputs[1]
        if kind == "dropped":
            add.replace_input_with(0, edit.op("Sub", x, x))
        elif kind == "twice":
            add.replace_input_with(1, edit.op("Add", branch, branch))
        else:
            norm = edit.norm(path)
            for node, index in list(norm.x.uses()):
                if node not in norm.nodes:
                    node.replace_input_with(index, norm.y)

    return plant


def consumers_swapped(first: str, second: str) -> Plant:
    """The readers of two norms' results are exchanged."""
    return lambda edit: exchange(edit.norm(first).y, edit.norm(second).y)


def causal_mask_ignored(edit: Edit) -> None:
    edit.node("LessOrEqual").op_type = "GreaterOrEqual"


def rotation_reversed(edit: Edit) -> None:
    edit.node("Neg").op_type = "Identity"


ATTENTION = "model.layers.0.self_attn"
Q_PROJ, K_PROJ, O_PROJ = (f"{ATTENTION}.{name}_proj" for name in "qko")
DOWN, LATER_DOWN = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"

_SEGMENTS = (
    Fault("Linear transposed", "llama", "primitives", linear(Q_PROJ, "transposed"), before=LLAMA_POST),
    Fault("Linear transposed", "llama", "ort", linear(O_PROJ, "transposed"), before=LLAMA_POST, dtype="float16"),
    Fault("Linear: one channel 1% larger", "llama", "standard", linear(DOWN, "channel"), before=LLAMA),
    Fault("Linear: one channel 1% larger", "llama", "plugin", linear("lm_head", "channel"), before="logits"),
    Fault("Linear of another layer", "llama", "plugin", linear(DOWN, "", LATER_DOWN), before=LLAMA),
    Fault("embedding: two rows swapped", "llama", "ort", embedding_rows_swapped,
          before="model.layers.0.input_layernorm"),
    Fault("embedding: two rows swapped", "mamba2", "primitives", embedding_rows_swapped,
          before="backbone.layers.0.norm", dtype="float16"),
    Fault("residual dropped", "llama", "primitives", residual(LLAMA, "dropped"), before=LLAMA),
    Fault("residual dropped", "addition", "standard", residual(ADDITION, "dropped"), before=ADDITION),
    Fault("residual added twice", "llama", "ort", residual(LLAMA_POST, "twice"), before=LLAMA_POST, dtype="float16"),
    Fault("residual taken after the norm", "llama", "primitives", residual(LLAMA, "late"),
          before="model.layers.1.post_attention_layernorm"),
    Fault("readers of two norms swapped", "assorted", "ort", consumers_swapped("query", "key"), before="grouped"),
    Fault("causal mask turned around", "llama", "standard", causal_mask_ignored, before=LLAMA_POST),
    Fault("attention mask ignored", "llama", "primitives", rewired("attention_mask", all_ones), before=LLAMA_POST),
    Fault("rotary embedding without its minus", "qwen3", "plugin", rotation_reversed,
          before="model.layers.0.post_attention_layernorm"),
    Fault("Linear transposed", "gemma3", "standard", linear("model.layers.1.self_attn.o_proj", "transposed"),
          before="model.layers.1.post_attention_layernorm", dtype="float16"),
)  # fmt: skip

SEGMENT_FAULTS: dict[str, tuple[Fault, ...]] = {"segments": _SEGMENTS}
