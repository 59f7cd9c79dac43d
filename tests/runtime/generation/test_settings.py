"""Batches, sampling, beams, streams, chats and ends of a text: what PyTorch generates with the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.generation.api import Generator, generate, generate_batch
from tests.helpers.extent import EVERY, slow
from tests.helpers.models.encoder_decoders import PROMPTS, export_t5, t5
from tests.helpers.models.families import VOCABULARY, build
from tests.helpers.models.tokenizers import CHAT_TEMPLATE, save_tokenizer

STEPS = 24
# Of several lengths.
BATCH = [[5, 17, 40, 8, 33, 61], [9, 12], [44, 3, 70, 21]]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.5},
}


def of_pytorch(model: Any, rows: list[list[int]], seed: int = 3, **settings: Any) -> list[list[int]]:
    """What PyTorch generates from rows that are padded on the left."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    torch.manual_seed(seed)
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=STEPS, pad_token_id=0, eos_token_id=None,
            **{"do_sample": False, **settings},
        )  # fmt: skip
    return made[:, length:].tolist()  # type: ignore[no-any-return]


def sharp(name: str) -> Any:
    """A model whose tokens depend on the text, and which has no token that ends it."""
    model = build(name)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = sharp("qwen3")
    folder = tmp_path_factory.mktemp("qwen3") / "out"
    export_model(model, folder, target="ort", with_past=True)
    save_tokenizer(folder, VOCABULARY)
    return model, folder


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_several_lengths_is_pytorchs(qwen: tuple[Any, Path], mode: str) -> None:
    model, folder = qwen
    wanted = of_pytorch(model, BATCH, **MODES[mode])
    made = generate_batch(folder, BATCH, max_new_tokens=STEPS, seed=3, **MODES[mode])
    assert [one.ids for one in made] == wanted
    assert [one.prompt_ids for one in made] == BATCH
    assert {one.finish for one in made} == {"length"}
    assert len({token for row in wanted for token in row}) > 10


@pytest.mark.parametrize("name", ["gpt_oss", "mamba2", *(["gemma3"] if EVERY else [])])
def test_sinks_windows_and_states_of_a_padded_batch(name: str, tmp_path: Path) -> None:
    model = sharp(name)
    export_model(model, tmp_path / "out", target="ort", with_past=True)
    for mode in ("greedy", "beams"):
        made = generate_batch(tmp_path / "out", BATCH, max_new_tokens=STEPS, **MODES[mode])
        assert [one.ids for one in made] == of_pytorch(model, BATCH, **MODES[mode])


def test_a_file_without_a_cache_reads_all_tokens_each_time(qwen: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = qwen
    export_model(model, tmp_path / "out", target="ort")
    made = generate_batch(tmp_path / "out", BATCH, max_new_tokens=STEPS, num_beams=2)
    assert [one.ids for one in made] == of_pytorch(model, BATCH, num_beams=2)


@slow
def test_an_encoder_reads_a_batch_and_beams(tmp_path: Path) -> None:
    model = t5()
    folder = export_t5(tmp_path)
    ends = set(model.generation_config.eos_token_id if isinstance(model.generation_config.eos_token_id, list) else [
        model.generation_config.eos_token_id
    ])  # fmt: skip
    for settings in ({}, {"num_beams": 3}):
        made = generate_batch(folder, PROMPTS, max_new_tokens=STEPS, **settings)
        for prompt, one in zip(PROMPTS, made, strict=True):
            with torch.no_grad():
                row = model.generate(torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False, **settings)[0, 1:]
            wanted = row.tolist()
            last = next((n for n, token in enumerate(wanted) if token in ends), len(wanted) - 1)
            assert one.ids == wanted[: last + 1]


def test_a_seed_repeats_and_leaves_the_random_numbers_outside_alone(qwen: tuple[Any, Path]) -> None:
    _, folder = qwen
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5}
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, again = (generate(folder, BATCH[0], seed=1, **settings).ids for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == again
    assert first != generate(folder, BATCH[0], seed=2, **settings).ids


def test_the_pieces_of_a_stream_are_the_text(qwen: tuple[Any, Path]) -> None:
    _, folder = qwen
    pieces: list[str] = []
    made = generate(folder, "abc", max_new_tokens=STEPS, stream=pieces.append)
    assert "".join(pieces) == made.text
    assert len(pieces) > 3


def test_a_stop_text_ends_a_generation(qwen: tuple[Any, Path]) -> None:
    _, folder = qwen
    text = generate(folder, "abc", max_new_tokens=STEPS).text
    assert text is not None
    stop = text[5:7]
    made = generate(folder, "abc", max_new_tokens=STEPS, stop_strings=[stop])
    assert made.text == text[: text.index(stop) + len(stop)]
    assert made.finish == "stop"
    # In a batch, a row that has stopped is filled up.
    rows = generate_batch(folder, ["abc", "xyz"], max_new_tokens=STEPS, stop_strings=[stop])
    assert (rows[0].text, rows[0].finish) == (made.text, "stop")
    assert rows[1].ids == generate(folder, "xyz", max_new_tokens=STEPS, stop_strings=[stop]).ids


def test_a_chat_is_read_from_where_it_was(qwen: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = qwen
    messages = [{"role": "user", "content": "ab"}]
    with Generator(folder) as generator:
        first = generator.generate(messages, max_new_tokens=6)
        assert first.text is not None
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "ba"}]
        lengths: list[int] = []
        read = type(generator._model.decoder).read

        def counted(decoder: Any, ids: Any, mask: Any, new: int) -> Any:
            lengths.append(new)
            return read(decoder, ids, mask, new)

        monkeypatch.setattr(type(generator._model.decoder), "read", counted)
        second = generator.generate(messages, max_new_tokens=6)
    assert lengths[1:] == [1] * 5
    # All but the answer's last token are in the cache.
    assert lengths[0] == len(second.prompt_ids) - len(first.prompt_ids) - len(first.ids) + 1
    assert second.ids == generate(folder, second.prompt_ids, max_new_tokens=6).ids
    assert CHAT_TEMPLATE.startswith("{% for")


def test_settings_that_are_wrong(qwen: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = qwen
    for settings, message in [
        ({"temprature": 1.0}, "temprature: expected settings of do_sample, temperature, top_k"),
        ({"temperature": -1.0}, "temperature: expected greater than 0, got -1.0"),
        ({"temperature": "hot"}, "temperature: expected a valid number, got 'hot'"),
        ({"top_p": 3.0}, "top_p: expected less than or equal to 1, got 3.0"),
        ({"num_beams": 0}, "num_beams: expected greater than or equal to 1, got 0"),
        ({"stop_strings": [""]}, r"stop_strings\.0: String should have at least 1 character, got ''"),
        ({"do_sample": False, "top_k": 3}, "top_k: expected do_sample=True with it"),
    ]:
        with pytest.raises(UsageError, match=message):
            generate(folder, [1, 2], **settings)
    with pytest.raises(UsageError, match="prompts: expected at least one, got none"):
        generate_batch(folder, [])
    with pytest.raises(UsageError, match=r"the chat template rejects the messages: .*no such role"):
        generate(folder, [{"role": "nobody", "content": "a"}])
    (folder / "chat_template.jinja").rename(tmp_path / "kept")
    try:
        with pytest.raises(UsageError, match="has no chat template; give a prompt without --chat"):
            generate(folder, [{"role": "user", "content": "a"}])
    finally:
        (tmp_path / "kept").rename(folder / "chat_template.jinja")


def test_sampling_has_the_settings_of_the_model(tmp_path: Path) -> None:
    model = sharp("llama")
    model.generation_config.update(do_sample=True, top_k=1)
    model.save_pretrained(tmp_path / "model")
    export_model(model, tmp_path / "out", target="ort", with_past=True, companions=tmp_path / "model")
    # The most likely of one token is the most likely token.
    assert generate(tmp_path / "out", BATCH[0], do_sample=True).ids == generate(tmp_path / "out", BATCH[0]).ids
    assert generate(tmp_path / "out", BATCH[0], top_k=90, temperature=5.0, seed=1).ids != (
        generate(tmp_path / "out", BATCH[0]).ids
    )


def test_prompts_of_several_lengths_need_a_mask(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    export_model(build("llama"), tmp_path / "out", inputs={"input_ids": ids}, target="ort")
    assert len(generate_batch(tmp_path / "out", [[1, 2], [3, 4]], max_new_tokens=2)) == 2
    with pytest.raises(UsageError, match="expected prompts of one length, got several: the file has no input"):
        generate_batch(tmp_path / "out", [[1, 2], [3]])


def test_logits_that_are_copied_are_those_of_the_last_token(qwen: tuple[Any, Path]) -> None:
    model, folder = qwen
    with Generator(folder) as generator:
        ids = np.array([BATCH[0]])
        got = generator._model.decoder.read(ids, np.ones_like(ids), ids.shape[1])
        with torch.no_grad():
            wanted = model(torch.from_numpy(ids)).logits[:, -1]
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)
