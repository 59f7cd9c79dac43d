"""Faults inside norms: epsilon, weight, statistics, casts, groups, gates, the fused residual add, whole norms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .faults import Fault, Plant
from .plants import (
    attribute,
    eps,
    formula,
    in_body,
    op_type,
    results_swapped,
    skipped,
    sum_and_result_swapped,
    twice,
    unlabeled,
    weight,
    weight_of_other,
)
from .steps import (
    all_axes,
    bessel,
    bfloat16,
    bias_before_scale,
    centered,
    clamped,
    doubled_residual,
    dropped_residual,
    eps_outside,
    gate_itself,
    half,
    mean_in,
    mean_size,
    other_axis,
    renamed,
    residual_twice,
    rounded_x,
    scaled_in_half,
    slightly_larger,
    stale_sum,
    swapped_channels,
    times_at,
    unweighed,
    variance,
    weighed_first,
    without_eps,
    x_alone,
)
from .surgery import BFLOAT16, FLOAT16

# One norm of each kind of model, and the ones that the fused residual add belongs to.
ADDITION, ADDITION_MLP = "layers.1.attention_norm", "layers.0.mlp_norm"
LLAMA, LLAMA_FIRST = "model.layers.1.input_layernorm", "model.layers.0.input_layernorm"
LLAMA_POST, LAST = "model.layers.0.post_attention_layernorm", "model.norm"
LLAMA_ADDS = (LLAMA_POST, LLAMA, "model.layers.1.post_attention_layernorm", LAST)
Q_NORM, K_NORM = "model.layers.0.self_attn.q_norm", "model.layers.1.self_attn.k_norm"
POST_FF = "model.layers.0.post_feedforward_layernorm"
MAMBA, MAMBA_GATED = "backbone.layers.1.norm", "backbone.layers.0.mixer.norm"


def _norm(name: str, model: str, target: str, path: str, plant: Plant, dtype: str = "float32") -> Fault:
    return Fault(name, model, target, plant, norms=(path,), dtype=dtype)


def _add_body(name: str, change: Callable[[ir.Function, ir.Node], None], first: str = "Add") -> Fault:
    return Fault(name, "llama", "plugin", in_body("AddRMSNorm", first, change), norms=LLAMA_ADDS)


_EPS = (
    _norm("eps x 10", "addition", "primitives", ADDITION, eps(ADDITION, lambda e: 10 * e)),
    _norm("eps x 10", "llama", "standard", LLAMA, eps(LLAMA, lambda e: 10 * e)),
    _norm("eps x 10", "llama", "ort", LLAMA_POST, eps(LLAMA_POST, lambda e: 10 * e), "float16"),
    _norm("eps x 10", "gemma3", "plugin", Q_NORM, eps(Q_NORM, lambda e: 10 * e)),
    _norm("eps x 10, metadata dropped", "llama", "primitives", LLAMA_FIRST,
          unlabeled(LLAMA_FIRST, lambda e: 10 * e)),
    _norm("eps / 10", "llama", "primitives", LLAMA, eps(LLAMA, lambda e: e / 10), "float16"),
    _norm("eps / 10", "olmo2", "ort", POST_FF, eps(POST_FF, lambda e: e / 10)),
    _norm("eps / 10", "llama", "plugin", LAST, eps(LAST, lambda e: e / 10)),
    _norm("eps outside the root", "llama", "primitives", LLAMA, formula(LLAMA, normalize=eps_outside)),
    _norm("eps outside the root", "gemma3", "standard", K_NORM, formula(K_NORM, normalize=eps_outside), "float16"),
    _norm("eps = 0", "addition", "standard", "norm", eps("norm", lambda e: 0.0)),
    _norm("eps = 0", "assorted", "primitives", "query", eps("query", lambda e: 0.0)),
    _norm("eps left out", "mamba2", "ort", MAMBA_GATED, formula(MAMBA_GATED, normalize=without_eps)),
    _norm("eps of another norm", "assorted", "ort", "final", eps("final", lambda e: 3e-6)),
    _norm("eps of another norm", "assorted", "primitives", "biased", eps("biased", lambda e: 1e-6), "float16"),
)  # fmt: skip

_WEIGHT = (
    _norm("gamma dropped", "llama", "ort", LLAMA, weight(LLAMA, np.ones_like)),
    _norm("gamma dropped", "olmo2", "plugin", Q_NORM, weight(Q_NORM, np.ones_like), "float16"),
    _norm("gamma + 1 missing", "gemma3", "plugin", Q_NORM, attribute(Q_NORM, "scale_offset", 0.0)),
    _norm("gamma + 1 missing", "gemma3", "primitives", LAST, weight(LAST, lambda w: w - 1)),
    _norm("gamma + 1 doubled", "gemma3", "plugin", K_NORM, attribute(K_NORM, "scale_offset", 2.0)),
    _norm("gamma + 1 doubled", "gemma3", "standard", POST_FF, weight(POST_FF, lambda w: w + 1), "float16"),
    _norm("gamma squared", "qwen3", "standard", K_NORM, weight(K_NORM, np.square)),
    _norm("gamma on x before the statistics", "llama", "ort", LLAMA,
          formula(LLAMA, enter=weighed_first, leave=unweighed)),
    _norm("gamma rounded to float16", "llama", "primitives", LLAMA, weight(LLAMA, half)),
    _norm("gamma rounded to float16", "addition", "plugin", ADDITION_MLP, weight(ADDITION_MLP, half)),
    _norm("gamma rounded to bfloat16", "addition", "ort", ADDITION, weight(ADDITION, bfloat16)),
    _norm("gamma of another layer", "addition", "primitives", ADDITION, weight_of_other(ADDITION, ADDITION_MLP)),
    _norm("gamma of another layer", "llama", "plugin", LLAMA, weight_of_other(LLAMA, LAST), "float16"),
    _norm("gamma: two channels swapped", "gemma3", "ort", LAST, weight(LAST, swapped_channels), "float16"),
    _norm("gamma: one channel 1% larger", "llama", "primitives", LLAMA, weight(LLAMA, times_at(3, 1.01))),
    _norm("gamma: one channel 1% larger", "olmo2", "ort", POST_FF, weight(POST_FF, times_at(3, 1.01)), "float16"),
    _norm("gamma: one channel negated", "addition", "plugin", "norm", weight("norm", times_at(7, -1.0))),
    _norm("gamma reversed", "mamba2", "standard", MAMBA, weight(MAMBA, lambda w: w[::-1])),
)  # fmt: skip

_CAST = (
    _norm("cast before the scale", "olmo2", "primitives", Q_NORM, formula(Q_NORM, leave=scaled_in_half), "float16"),
    _norm("cast before the scale", "olmo2", "plugin", POST_FF, formula(POST_FF, leave=scaled_in_half), "float16"),
    _norm("cast before the scale", "gemma3", "plugin", Q_NORM, attribute(Q_NORM, "scale_type", FLOAT16), "float16"),
    _norm("statistics in float16", "llama", "primitives", LLAMA, formula(LLAMA, statistic=mean_in(FLOAT16))),
    _norm("statistics in float16", "llama", "ort", LLAMA, formula(LLAMA, statistic=mean_in(FLOAT16)), "float16"),
    _norm("statistics in bfloat16", "addition", "standard", ADDITION, formula(ADDITION, statistic=mean_in(BFLOAT16))),
    _norm("statistics in bfloat16", "olmo2", "standard", Q_NORM,
          formula(Q_NORM, statistic=mean_in(BFLOAT16)), "float16"),
    _norm("x rounded to float16", "gemma3", "ort", POST_FF, formula(POST_FF, enter=rounded_x)),
    _norm("x rounded to float16", "addition", "plugin", ADDITION, formula(ADDITION, enter=rounded_x)),
)  # fmt: skip

_FORMULA = (
    # statistics
    _norm("sum in place of the mean", "addition", "primitives", ADDITION, op_type(ADDITION, "ReduceMean", "ReduceSum")),
    _norm("sum in place of the mean", "llama", "plugin", LLAMA_FIRST,
          in_body("RMSNorm", "ReduceMean", renamed({"ReduceMean": "ReduceSum"}))),
    _norm("mean over width - 1", "llama", "standard", LLAMA, formula(LLAMA, statistic=bessel)),
    _norm("mean over width - 1", "qwen3", "primitives", Q_NORM, formula(Q_NORM, statistic=bessel), "float16"),
    _norm("variance in place of the mean square", "addition", "ort", ADDITION,
          formula(ADDITION, statistic=variance)),
    _norm("LayerNormalization in place of RMSNormalization", "llama", "standard", LLAMA,
          op_type(LLAMA, "RMSNormalization", "LayerNormalization")),
    _norm("mean subtracted", "olmo2", "primitives", POST_FF, formula(POST_FF, enter=centered), "float16"),
    _norm("mean of sizes in place of squares", "llama", "ort", LLAMA_POST, formula(LLAMA_POST, statistic=mean_size)),
    _norm("statistics along the sequence", "llama", "primitives", LAST, formula(LAST, statistic=other_axis)),
    _norm("statistics along the batch", "addition", "standard", "norm", formula("norm", statistic=all_axes)),
    _norm("root left out", "llama", "plugin", LLAMA_FIRST, in_body("RMSNorm", "Sqrt", renamed({"Sqrt": "Identity"}))),
    # groups and gates
    _norm("one group in place of two", "mamba2", "ort", MAMBA_GATED, formula(MAMBA_GATED, spec={"group_size": None})),
    _norm("groups half as wide", "assorted", "plugin", "grouped", formula("grouped", spec={"group_size": 8})),
    _norm("gate after in place of before", "mamba2", "primitives", MAMBA_GATED,
          formula(MAMBA_GATED, spec={"gate": "after", "order": "scale_then_cast"})),
    _norm("gate before in place of after", "assorted", "standard", "after",
          formula("after", spec={"gate": "before"}), "float16"),
    _norm("gate without its activation", "mamba2", "plugin", MAMBA_GATED, formula(MAMBA_GATED, gate=gate_itself)),
    _norm("sigmoid in place of silu", "assorted", "ort", "after", formula("after", spec={"activation": "sigmoid"})),
    # the rest of the formula
    _norm("bias dropped", "assorted", "ort", "biased", formula("biased", spec={"bias": False})),
    _norm("bias before the scale", "assorted", "primitives", "biased",
          formula("biased", leave=bias_before_scale), "float16"),
    _norm("normalized value clamped at 4", "llama", "standard", LLAMA, formula(LLAMA, normalize=clamped)),
    _norm("normalized value clamped at 4", "mamba2", "ort", MAMBA, formula(MAMBA, normalize=clamped), "float16"),
    _norm("result x 1.001", "llama", "ort", LLAMA, formula(LLAMA, leave=slightly_larger)),
    # whole norms
    _norm("norm skipped, its nodes deleted", "llama", "ort", LLAMA, skipped(LLAMA, deleted=True)),
    _norm("norm skipped, its nodes deleted", "gemma3", "primitives", Q_NORM, skipped(Q_NORM, deleted=True), "float16"),
    _norm("norm skipped, its nodes left dead", "addition", "primitives", ADDITION, skipped(ADDITION, deleted=False)),
    _norm("norm skipped, its nodes left dead", "llama", "plugin", LLAMA, skipped(LLAMA, deleted=False)),
    _norm("norm applied twice", "llama", "standard", LLAMA, twice(LLAMA)),
    _norm("norm applied twice", "olmo2", "ort", Q_NORM, twice(Q_NORM), "float16"),
    Fault("results of two norms swapped", "assorted", "standard", results_swapped("query", "key"),
          norms=("query", "key")),
    Fault("results of two norms swapped", "assorted", "plugin", results_swapped("query", "key"),
          norms=("query", "key"), dtype="float16"),
)  # fmt: skip

_RESIDUAL = (
    _add_body("residual dropped", dropped_residual),
    _add_body("residual added twice", doubled_residual),
    _add_body("sum returned without the residual", stale_sum),
    _norm("residual dropped", "addition", "plugin", ADDITION, formula(ADDITION, add=x_alone)),
    _norm("residual added twice", "addition", "plugin", "norm", formula("norm", add=residual_twice), "float16"),
    _norm("sum and result swapped", "llama", "plugin", LLAMA, sum_and_result_swapped(LLAMA)),
)  # fmt: skip

NORM_FAULTS: dict[str, tuple[Fault, ...]] = {
    "eps": _EPS,
    "weight": _WEIGHT,
    "casts": _CAST,
    "norm formula": _FORMULA,
    "residual add": _RESIDUAL,
}
