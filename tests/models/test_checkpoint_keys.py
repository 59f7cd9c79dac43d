"""A checkpoint that does not fill its model exactly is an error that lists the keys, unless they are allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.checkpoint_keys import allowing_missing, check_keys
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.loading import load_model

transformers = pytest.importorskip("transformers")


def save(folder: Path, *, shard: str | None = None, **changes: Any) -> Path:
    """A small random Llama, saved."""
    sizes = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**sizes, **changes})
    options = {} if shard is None else {"max_shard_size": shard}
    transformers.LlamaForCausalLM(config).save_pretrained(folder, **options)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def error(folder: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as raised:
        load_model(str(folder), **options)
    assert raised.value.exit_code == 2
    return str(raised.value)


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_weight_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    edit(folder, lambda t: t.pop(UP))
    message = error(folder)
    assert str(folder) in message
    assert f"missing keys (in the model and not in the checkpoint, so the values are random): 1, namely {UP}" in message
    assert "--allow-missing" in message


@pytest.mark.parametrize("pattern", [UP, "*.up_proj.*", "model.layers.?.mlp.up_proj.weight"])
def test_what_is_allowed_loads_and_is_noted(pattern: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    edit(folder, lambda t: t.pop(UP))
    note = f"missing keys of the checkpoint that were allowed and have random values: 1, namely {UP}"
    loaded = load_model(str(folder), allow_missing=["other", pattern])
    assert loaded.notes == [note]
    again = load_model(str(folder), allow_missing=[pattern]).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in loaded.model.state_dict().items())
    with allowing_missing([pattern]):
        assert load_model(str(folder)).notes == [note]
    assert UP in error(folder)
    result = export_model(loaded, tmp_path / "exported", target="ort")
    assert note in result.manifest["notes"]


def test_a_pattern_allows_only_what_it_matches(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    edit(folder, lambda t: (t.pop(UP), t.pop("model.norm.weight")))
    message = error(folder, allow_missing=["model.norm.*"])
    assert UP in message
    assert "model.norm.weight" not in message


def test_a_text_is_not_a_list_of_patterns(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a list of names or patterns"):
        load_model("builtin:small", allow_missing="lm_head.weight")


def test_an_unexpected_weight_is_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    edit(folder, lambda t: t.update({"extra.weight": torch.zeros(2)}))
    assert "unexpected keys" in error(folder)
    assert "extra.weight" in error(folder)
    assert len(load_model(str(folder), allow_missing=["extra.*"]).notes) == 1


def test_an_output_layer_that_is_not_tied_is_not_made_up(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    edit(folder, lambda t: t.pop("lm_head.weight"))
    assert "lm_head.weight" in error(folder)


def test_tied_weights_and_old_buffers_are_harmless(tmp_path: Path) -> None:
    assert load_model(str(save(tmp_path / "tied", tie_word_embeddings=True))).notes == []
    folder = save(tmp_path / "old")
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert load_model(str(folder)).notes == []


def test_tied_weights_that_are_both_missing_are_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", tie_word_embeddings=True)
    edit(folder, lambda t: t.pop("model.embed_tokens.weight"))
    assert "model.embed_tokens.weight" in error(folder)


def test_a_missing_buffer_is_an_error(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.pop("resnet.embedder.embedder.normalization.running_mean"))
    assert "1, namely resnet.embedder.embedder.normalization.running_mean" in error(tmp_path)


def test_a_config_of_another_width_lists_at_most_five_keys_with_both_shapes(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    message = error(folder)
    assert "mismatched keys (of another shape in the checkpoint, so the values are random): 21, namely" in message
    assert "lm_head.weight (expected 32x64, got 32x32)" in message
    assert "and 16 more" in message
    assert message.count("expected") == 5


def test_a_missing_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", shard="20KB")
    assert load_model(str(folder)).notes == []
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    message = error(folder)
    assert "names 1 of" in message
    assert shard.name in message


def test_an_index_that_is_no_index_is_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", shard="20KB")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "expected a JSON object with a weight_map" in error(folder)


def test_an_index_that_is_not_read_does_not_matter(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (folder / name).write_text(json.dumps({"weight_map": {"a": "absent.bin"}}))
    assert load_model(str(folder)).notes == []


@pytest.mark.parametrize("kept", [0, 5, 2000])
def test_a_truncated_file_is_an_error_that_names_it(kept: int, tmp_path: Path) -> None:
    file = save(tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{file} is not a complete safetensors file" in error(tmp_path / "m")


def test_errors_of_transformers_are_listed() -> None:
    with pytest.raises(UsageError, match="errors: 1, namely size of a"):
        check_keys("here", {"error_msgs": ["size of a"]})
    assert check_keys("here", {}) == []
