"""Names of dynamic dims: one for each symbol, and by the conventions of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.export.sizes.dims import name_dims
from tests.helpers.graphs.onnx_text import parsed


def named(
    inputs: str, fixed: dict[str, str] | None = None, dynamic: Any = True, documented: dict[str, int] | None = None,
    renamed: dict[str, str] | None = None,
) -> dict[str, list[Any]]:  # fmt: skip
    """The dims of the inputs of a graph with these inputs."""
    model = parsed(f"g ({inputs}) => (float[a, b] y) {{ y = Neg ({inputs.partition(']')[2].split(',')[0]}) }}")
    for value in model.graph.inputs:
        value.name = (renamed or {}).get(str(value.name), value.name)
    name_dims(model, fixed or {}, dynamic, documented)
    return {
        str(value.name): [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
        for value in model.graph.inputs
    }


def test_tokens_have_the_names_of_transformers() -> None:
    assert named("float[s0, s1] input_ids, float[s0, s1] attention_mask, float[s0, s2] decoder_input_ids") == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "decoder_input_ids": ["batch", "decoder_sequence"],
    }


def test_dims_that_the_model_does_not_tie_have_different_names() -> None:
    assert named("float[s0, s1] input_ids, float[s2, s3] attention_mask, float[s4, s0, s5] position_ids") == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["attention_mask_dim_0", "attention_mask_dim_1"],
        "position_ids": ["axes", "batch", "position_ids_dim_2"],
    }


SPLIT = "float[s0, s1] input_ids, float[s2, s3] attention_mask"


def test_the_documentation_ties_dims_of_one_size() -> None:
    assert named(SPLIT, documented={"s0": 2, "s1": 9, "s2": 2, "s3": 9}) == {
        "input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"],
    }  # fmt: skip


def test_the_documentation_ties_no_dims_of_different_sizes() -> None:
    assert named(SPLIT, documented={"s0": 2, "s1": 9, "s2": 2, "s3": 5}) == {
        "input_ids": ["batch", "sequence"], "attention_mask": ["batch", "attention_mask_dim_1"],
    }  # fmt: skip


def test_names_that_are_not_of_the_documentation_are_not_shared() -> None:
    found = named(
        "float[s0, s1] x, float[s2, s3] z", dynamic={"x": {0: "rows"}, "z": {0: "rows"}}, documented={"s0": 2}
    )
    assert found == {"x": ["rows", "x_dim_1"], "z": ["z_dim_0", "z_dim_1"]}


def test_the_decoder_of_an_encoder_decoder_has_two_lengths_and_a_cache_of_each() -> None:
    text = (
        "float[s0, s1] decoder_input_ids, float[s0, s2] attention_mask, float[s0, s2, 8] encoder_hidden_states, "
        "float[s0, 4, s3, 8] own, float[s0, 4, s2, 8] cross"
    )
    renamed = {"own": "past_key_values.0.decoder.key", "cross": "past_key_values.0.encoder.key"}
    assert named(text, renamed=renamed) == {
        "decoder_input_ids": ["batch", "decoder_sequence"],
        "attention_mask": ["batch", "encoder_sequence"],
        "encoder_hidden_states": ["batch", "encoder_sequence", 8],
        "past_key_values.0.decoder.key": ["batch", 4, "past_sequence", 8],
        "past_key_values.0.encoder.key": ["batch", 4, "encoder_sequence", 8],
    }


def test_standing_first_makes_no_batch() -> None:
    assert named("float[s0, s1, 4] hidden_states, float[s1, 3] img_ids, float[s2] table") == {
        "hidden_states": ["hidden_states_dim_0", "hidden_states_dim_1", 4],
        "img_ids": ["hidden_states_dim_1", 3],
        "table": ["table_dim_0"],
    }


def test_names_that_a_user_gave_come_first() -> None:
    found = named("float[s0, s1] x", dynamic={"x": {0: Dim("rows"), 1: "cols"}})
    assert found == {"x": ["rows", "cols"]}


class Pairs(nn.Module):
    """Reads rows in pairs: the second input has twice the rows of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + y.reshape(x.shape[0], 2, 8).sum(1)


def test_an_exported_file_has_names_that_a_user_gave(tmp_path: Path) -> None:
    rows = Dim("rows")
    inputs = {"x": torch.randn(3, 8), "y": torch.randn(6, 8)}
    result = export_model(Pairs().eval(), tmp_path / "a", inputs=inputs, dynamic={"x": {0: rows}, "y": {0: 2 * rows}})
    assert [row["shape"] for row in result.manifest["inputs"]] == [["rows", 8], ["2*rows", 8]]
    assert list(ir.load(tmp_path / "a" / "model.onnx").graph.outputs[0].shape or ())[1] == 8
