"""Greedy tokens of PyTorch (`torch_tokens`) and of an exported file (`onnx_tokens`), and how they differ."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmsnorm_deploy.models.calling.media_parts import first_one, modality_read
from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.runtime.generation.decoder import Decoder
from rmsnorm_deploy.runtime.generation.open import open_decoder
from rmsnorm_deploy.runtime.generation.parts import EncodedDecoder
from rmsnorm_deploy.runtime.generation.reader import Reader
from rmsnorm_deploy.runtime.inputs.encoder_decoder import opened_parts
from rmsnorm_deploy.runtime.inputs.exported import component_folders
from rmsnorm_deploy.runtime.runners.base import Array, Runner
from rmsnorm_deploy.runtime.runners.open import open_runner

STEPS = 24
# A smaller distance between the two largest logits is a tie: rounding alone may decide it.
TIE = 1e-4


@dataclass(frozen=True, slots=True)
class Greedy:
    """PyTorch's tokens.

    Attributes:
        tokens: int64 [batch, steps].
        margins: distance between the two largest logits of each, [batch, steps].
        never: token ids that were not allowed: those that end a sequence.
        start: the first token of a decoder beside an encoder; None for a decoder.
    """

    tokens: Array
    margins: Array
    never: list[int]
    start: int | None


def torch_tokens(model: Any, prompt: Mapping[str, Tensor], steps: int = STEPS, use_cache: bool = True) -> Greedy:
    """Greedy tokens from `generate` of a transformers model, of a left-padded batch."""
    config = model.generation_config
    config.forced_bos_token_id = config.forced_eos_token_id = None
    with torch.no_grad():
        result = model.generate(
            **prompt, do_sample=False, num_beams=1, max_new_tokens=steps, min_new_tokens=steps,
            use_cache=use_cache, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    scores = torch.stack(list(result.scores), 1).float()
    best = scores.topk(2, -1).values
    end = config.eos_token_id
    never = [] if end is None else end if isinstance(end, list) else [end]
    start = config.decoder_start_token_id
    if start is None:
        start = config.bos_token_id
    return Greedy(
        result.sequences[:, -steps:].numpy(),
        (best[..., 0] - best[..., 1]).numpy(),
        never,
        start if getattr(model.config, "is_encoder_decoder", False) else None,
    )


def onnx_tokens(folder: Path, prompt: Mapping[str, Tensor], wanted: Greedy, steps: int = STEPS) -> Array:
    """Greedy tokens of an exported folder: with its cache where it has one, else from the whole sequence each time.

    Raises:
        UnsupportedError: the file has an input whose value is not known.
    """
    ids, mask = prompt["input_ids"].numpy(), prompt["attention_mask"].numpy()
    parts = component_folders(folder)
    if wanted.start is None:
        with open_decoder(folder) as model:
            return _decoder_tokens(model.decoder, ids, mask, {}, wanted.never, steps)
    if parts:  # the folder of a model in memory does not name the decoder's first token
        with opened_parts(parts, "cpu") as runners:
            return _decoder_tokens(EncodedDecoder(folder, runners, wanted.start), ids, mask, {}, wanted.never, steps)
    with open_runner(folder / "model.onnx", session_options={"intra_op_num_threads": 1}) as runner:
        return _encoder_decoder(runner, ids, mask, wanted, steps)


def media_difference(model: Any, folder: Path, inputs: Mapping[str, Tensor]) -> tuple[bool, str]:
    """As `difference`, for the first row of inputs with an image or a sound, by the parts of the model."""
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = None  # so that no token is forbidden
    modality = modality_read(model, inputs)
    assert modality is not None
    first, sizes, _ = first_one(modality, inputs)
    text = {name: value[:1] for name, value in inputs.items() if name not in modality.of(inputs)}
    wanted = torch_tokens(model, {**text, **first, **{name: torch.tensor(rows) for name, rows in sizes.items()}})
    media = {name: value.numpy() for name, value in first.items()}
    ids = text["input_ids"].numpy()
    with open_decoder(folder) as opened:
        return difference(wanted, _decoder_tokens(opened.decoder, ids, np.ones_like(ids), media, [], STEPS))


def _decoder_tokens(
    decoder: Decoder, ids: Array, mask: Array, media: Mapping[str, Array], never: list[int], steps: int
) -> Array:
    ids, mask = decoder.begin(ids, mask, media)
    first, reader = ids.shape[1], Reader(decoder)
    for _ in range(steps):
        new = _most_likely(reader.logits(ids, mask)[:, None], never)
        ids = np.concatenate([ids, new[:, None]], 1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
    return ids[:, first:]


def _encoder_decoder(runner: Runner, ids: Array, mask: Array, wanted: Greedy, steps: int) -> Array:
    sequence = np.full((len(ids), 1), wanted.start, ids.dtype)
    for _ in range(steps):
        known = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": sequence}
        unknown = [info.name for info in runner.inputs() if info.name not in known]
        if unknown:
            raise UnsupportedError(f"expected inputs {', '.join(known)}, got {', '.join(unknown)} too.")
        logits = runner.run({info.name: known[info.name] for info in runner.inputs()})["logits"]
        sequence = np.concatenate([sequence, _most_likely(logits, wanted.never)[:, None]], 1)
    return sequence[:, 1:]


def _most_likely(logits: Array, never: list[int]) -> Array:
    last = logits[:, -1].astype(np.float32)
    last[:, never] = -np.inf
    return last.argmax(-1)


def difference(wanted: Greedy, got: Array) -> tuple[bool, str]:
    """Whether the tokens agree up to ties, and where they first differ in each row; empty if nowhere."""
    notes, agree = [], True
    for row, (a, b) in enumerate(zip(wanted.tokens, got, strict=True)):
        steps = np.flatnonzero(a != b)
        if len(steps):
            step = int(steps[0])
            margin = float(wanted.margins[row, step])
            agree &= margin < TIE
            word = "a tie" if margin < TIE else "not a tie"
            notes.append(f"row {row} differs from step {step} on, with a margin of {margin:.2g} ({word})")
    return agree, "; ".join(notes)
