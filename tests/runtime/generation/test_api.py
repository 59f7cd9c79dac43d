"""Greedy generation from exported decoders, with and without KV cache, against PyTorch's own greedy search."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.builtin import addition_task as addition
from rmsnorm_deploy.models.builtin.addition_task import TOKENIZER
from rmsnorm_deploy.models.builtin.checkpoint import addition as addition_model
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.runtime.generation.api import generate
from rmsnorm_deploy.runtime.runners.ort_decoding import OrtDecoding
from tests.helpers.models.encoder_decoders import PROMPTS, export_t5, t5
from tests.helpers.models.families import build
from tests.helpers.models.small_models import Residual, residual_inputs

PROMPT = [5, 17, 40, 8]


@pytest.mark.parametrize("with_past", [True, False])
def test_tokens_are_those_of_pytorch(with_past: bool, tmp_path: Path) -> None:
    model = build("qwen3")
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        wanted = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
    export_model(model, tmp_path / "out", target="ort", with_past=with_past)
    made = generate(tmp_path / "out", PROMPT, max_new_tokens=12)
    assert made.ids == wanted
    assert made.with_past is with_past
    assert made.text is None
    assert len(set(wanted)) > 1
    with pytest.raises(UsageError, match="--prompt-ids"):
        generate(tmp_path / "out", "hello")
    with pytest.raises(UsageError, match=r"expected ids in the model's vocabulary of 97 tokens, got \[97\]"):
        generate(tmp_path / "out", [97])


def test_a_prompt_is_read_in_pieces_of_the_length_that_the_file_is_valid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(build("qwen3"), tmp_path / "out", with_past=True)
    wanted = generate(tmp_path / "out", PROMPT, max_new_tokens=6).ids
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["inputs"][0]["ranges"] = {"sequence": [1, 3]}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    lengths: list[int] = []
    step = OrtDecoding.step

    def recorded(decoding: OrtDecoding, feeds: Any) -> Any:
        lengths.append(feeds["input_ids"].shape[1])
        return step(decoding, feeds)

    monkeypatch.setattr(OrtDecoding, "step", recorded)
    assert generate(tmp_path / "out", PROMPT, max_new_tokens=6).ids == wanted
    assert lengths == [3, 1, 1, 1, 1, 1, 1]


def test_a_cache_restarts_where_the_rotary_embedding_changes(tmp_path: Path) -> None:
    rotary = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 4.0]}
    config = Phi3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters={**rotary, "rope_theta": 10000.0, "original_max_position_embeddings": 16},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.generation_config.eos_token_id = None
    result = export_model(model, tmp_path / "out", target="ort", with_past=True)
    assert result.manifest["restart_cache_above"] == 16
    assert any("computed again from all tokens" in note for note in result.manifest["notes"])
    for prompt in (PROMPT, PROMPT * 5):  # shorter and longer than the switch
        with torch.no_grad():
            wanted = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
        assert generate(tmp_path / "out", prompt, max_new_tokens=20).ids == wanted.tolist()
    without = {name: value for name, value in result.manifest.items() if name != "restart_cache_above"}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(without))
    with torch.no_grad():
        wanted = model.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)[0, len(PROMPT) :]
    assert generate(tmp_path / "out", PROMPT, max_new_tokens=20).ids != wanted.tolist()


def test_the_trained_checkpoint_adds(tmp_path: Path) -> None:
    details = {"task": "addition", "tokenizer": TOKENIZER}
    export_model(addition_model(), tmp_path / "out", details=details)
    for problem in addition.problems(3, seed=5):
        made = generate(tmp_path / "out", problem.prompt, max_new_tokens=addition.ANSWER_DIGITS)
        assert made.text is not None
        assert made.text[::-1] == problem.answer
    with pytest.raises(UsageError, match="max_new_tokens: expected at least 1, got 0"):
        generate(tmp_path / "out", "001+002=", max_new_tokens=0)
    with pytest.raises(UsageError, match="empty"):
        generate(tmp_path / "out", [])


def test_a_model_that_is_not_a_decoder_is_refused(tmp_path: Path) -> None:
    export_model(Residual(), tmp_path / "out", inputs=residual_inputs())
    with pytest.raises(UnsupportedError, match="expected a decoder"):
        generate(tmp_path / "out", [1, 2])


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_t5(tmp_path_factory.mktemp("t5"))


def test_an_encoder_and_a_decoder_generate_pytorchs_tokens(t5_folder: Path) -> None:
    model = t5()
    for prompt in PROMPTS:
        with torch.no_grad():
            wanted = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, 1:].tolist()
        made = generate(t5_folder, prompt, max_new_tokens=20)
        assert made.ids == wanted
        assert (made.prompt_ids, made.text, made.with_past) == (prompt, None, True)
        assert len(set(wanted)) > 1
    assert generate(t5_folder, PROMPTS[0]).ids != generate(t5_folder, PROMPTS[1]).ids


def test_generation_ends_at_the_end_token_and_needs_a_start_token(t5_folder: Path, tmp_path: Path) -> None:
    ids = generate(t5_folder, PROMPTS[0], max_new_tokens=8).ids
    folder = tmp_path / "out"
    shutil.copytree(t5_folder, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ids[2]}))
    assert generate(folder, PROMPTS[0], max_new_tokens=8).ids == ids[: ids.index(ids[2]) + 1]
    path.unlink()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"config\.json: decoder_start_token_id: expected a token id, got None"):
        generate(folder, PROMPTS[0])
    with pytest.raises(UsageError, match="--prompt-ids"):
        generate(t5_folder, "hello")
    shutil.rmtree(folder / "decoder")
    with pytest.raises(UsageError, match="names the models encoder, decoder, but decoder is missing"):
        generate(folder, PROMPTS[0])
