"""Packages for onnxruntime-genai: the real one gives our tokens, with its cache, in a batch, and for a chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy import export_model, package_model
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.runtime.generation.api import generate_batch
from rmsnorm_deploy.runtime.inputs.tokenizer import load_tokenizer
from rmsnorm_deploy.runtime.packaging.genai import genai_config, genai_notes
from tests.helpers.models.families import build
from tests.helpers.models.tokenizers import save_bpe_tokenizer
from tests.helpers.runtime.genai import genai_tokens

og = pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")

VOCABULARY, NEW = 290, 20
PROMPTS = [[50, 17, 40, 80, 33, 61], [91, 12], [44, 30, 70, 21]]
# With one buffer for the cache, and with a cache that grows. `python -m benchmarks.genai_tokens` runs the others.
MODELS = (("qwen3", "in-place"), ("llama", "node"))


@pytest.fixture(scope="module", params=MODELS, ids=lambda param: param[0])
def folders(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An exported decoder and its package."""
    name, attention = request.param
    place = tmp_path_factory.mktemp(name)
    model = build(name, vocab_size=VOCABULARY)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(place / "checkpoint")
    save_bpe_tokenizer(place / "checkpoint", VOCABULARY)
    export_model(place / "checkpoint", place / "out", target="ort", with_past=True, attention=attention)
    package_model(place / "out", "genai", place / "package")
    return place / "out", place / "package"


def test_a_batch_of_several_lengths_has_our_tokens(folders: tuple[Path, Path]) -> None:
    wanted = [one.ids for one in generate_batch(folders[0], PROMPTS, max_new_tokens=NEW)]
    assert max(map(len, wanted)) == NEW
    assert genai_tokens(folders[1], PROMPTS, NEW) == wanted


@pytest.mark.parametrize(
    ("fields", "is_told"),
    [
        ({}, False),
        ({"sliding_window": 4, "use_sliding_window": None}, True),
        ({"sliding_window": 4, "use_sliding_window": False}, False),
    ],
)
def test_a_sliding_window_counts_the_padding(
    folders: tuple[Path, Path], tmp_path: Path, fields: dict[str, Any], is_told: bool
) -> None:
    notes = genai_notes(changed(folders[0], tmp_path / "one", **{"sliding_window": None, **fields}))
    assert [("a sliding window of 4 tokens" in note) for note in notes] == [True] * is_told


def test_a_chat_has_our_tokens(folders: tuple[Path, Path]) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello, how are you?"}]
    tokenizer = og.Tokenizer(og.Model(str(folders[1])))
    text = tokenizer.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=True)
    wanted = load_tokenizer(folders[0]).encode_chat(messages)
    assert tokenizer.encode(text).tolist() == wanted
    assert tokenizer.decode(wanted[-4:]) == load_tokenizer(folders[0]).decode(wanted[-4:])


def test_the_package_is_an_exported_folder(folders: tuple[Path, Path]) -> None:
    results = [generate_batch(folder, PROMPTS[:1], max_new_tokens=4)[0].ids for folder in folders]
    assert results[0] == results[1]


def test_the_configuration_says_how_the_cache_is_kept(folders: tuple[Path, Path]) -> None:
    config = genai_config(folders[0])
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    assert config["search"]["past_present_share_buffer"] == bool(manifest.get("in_place_cache"))
    assert (config["model"]["eos_token_id"], config["model"]["vocab_size"]) == ([0], VOCABULARY)
    assert config["model"]["decoder"]["num_key_value_heads"] == 2


def changed(folder: Path, place: Path, **fields: Any) -> Path:
    """A copy of the small files of an exported folder, with other fields in its config.json."""
    place.mkdir()
    for name in ("manifest.json", "generation_config.json"):
        (place / name).write_bytes((folder / name).read_bytes())
    config = {**json.loads((folder / "config.json").read_text()), **fields}
    (place / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return place


def test_a_config_without_what_is_needed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    place = changed(folders[0], tmp_path / "one", hidden_size=None)
    with pytest.raises(UsageError, match=r"config.json: hidden_size: expected a positive integer, got None"):
        genai_config(place)
    (place / "config.json").unlink()
    with pytest.raises(UsageError, match=r"expected the model's config.json beside the file, got none"):
        genai_config(place)
    place = changed(folders[0], tmp_path / "two", eos_token_id=None)
    (place / "generation_config.json").unlink()
    with pytest.raises(UsageError, match="expected an eos_token_id"):
        genai_config(place)


@pytest.mark.parametrize("old", ["past_key_values.0.key", "input_ids", "logits"])
def test_decoders_that_it_does_not_run(folders: tuple[Path, Path], tmp_path: Path, old: str) -> None:
    """A cache of another kind, other inputs, other outputs."""
    place = changed(folders[0], tmp_path / "one")
    manifest = (place / "manifest.json").read_text()
    (place / "manifest.json").write_text(manifest.replace(f'"name": "{old}"', '"name": "past_key_values.0.conv_state"'))
    with pytest.raises(UnsupportedError, match=r"expected a decoder that reads .* Export a decoder with --with-past"):
        genai_config(place)
