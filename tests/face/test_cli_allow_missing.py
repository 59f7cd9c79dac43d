"""The option --allow-missing of every command that loads a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.interface.command_line import CommandLine

KEY = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def lacking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of transformers without one of its weights."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("lacking")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[KEY]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_each_command_refuses_the_checkpoint_and_takes_it_where_the_key_is_allowed(
    rmsnorm: CommandLine, lacking: Path, tmp_path: Path
) -> None:
    exported, allowed = tmp_path / "exported", ("--allow-missing", "absent.*", "--allow-missing", "*.up_proj.weight")
    commands: dict[str, tuple[str | Path, ...]] = {
        "export": (lacking, "-o", exported, "--target", "ort"),
        "inspect": (lacking,),
        "validate": (exported, "--against", lacking, "--shape", "2x5"),
        "bisect": (exported, "--against", lacking, "--shape", "2x5"),
    }
    for command, arguments in commands.items():
        refused = rmsnorm(command, *arguments)
        assert refused.code == 2, command
        assert KEY in refused.err
        assert "--allow-missing" in refused.err
        taken = rmsnorm(command, *arguments, *allowed)
        assert taken.code == 0, (command, taken.err)
    notes = json.loads((exported / "manifest.json").read_text())["notes"]
    assert f"missing keys of the checkpoint that were allowed and have random values: 1, namely {KEY}" in notes
    again = rmsnorm("export", *commands["export"], *allowed)
    assert KEY in again.out
