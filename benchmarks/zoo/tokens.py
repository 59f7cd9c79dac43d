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

from rmsnorm_deploy.export.graph.cache_names import is_past, present_to_past
from rmsnorm_deploy.export.onnx_io.manifest import read_manifest
from rmsnorm_deploy.models.calling.media_parts import first_one, modality_read
from rmsnorm_deploy.models.calling.rotary import RESTART_FIELD
from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.runtime.generate_parts import with_parts
from rmsnorm_deploy.runtime.inputs.encoder_decoder import decoder_steps, opened_parts
from rmsnorm_deploy.runtime.inputs.exported import component_folders
from rmsnorm_deploy.runtime.inputs.synthetic import make_feeds
from rmsnorm_deploy.runtime.runners.base import Array, Runner, TensorInfo
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
    if parts:
        return _with_encoder(parts, ids, mask, wanted, steps)
    with open_runner(folder / "model.onnx", session_options={"intra_op_num_threads": 1}) as runner:
        if wanted.start is not None:
            return _encoder_decoder(runner, ids, mask, wanted, steps)
        return _decoder(runner, ids, mask, wanted, steps, read_manifest(folder).get(RESTART_FIELD))


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
    ids, _ = with_parts(folder, component_folders(folder), text["input_ids"][0].tolist(), media, STEPS, set(), "cpu")
    return difference(wanted, np.array([ids]))


def _decoder(runner: Runner, ids: Array, mask: Array, wanted: Greedy, steps: int, restart: int | None = None) -> Array:
    infos = runner.inputs()
    cached = any(is_past(info.name) for info in infos)
    tokens: list[Array] = []
    past: dict[str, Array] = {}
    pending = ids
    while True:
        feeds = _feeds(infos, pending, mask, past)
        outputs = runner.run(feeds)
        tokens.append(_most_likely(outputs["logits"], wanted.never))
        if len(tokens) == steps:
            return np.stack(tokens, 1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
        new = tokens[-1][:, None]
        ids = np.concatenate([ids, new], 1)
        again = not cached or ids.shape[1] - 1 == restart
        past, pending = ({}, ids) if again else (present_to_past(outputs), new)


def _feeds(infos: list[TensorInfo], pending: Array, mask: Array, past: Mapping[str, Array]) -> dict[str, Array]:
    length = pending.shape[1]
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -length:]
    known = {"input_ids": pending, "attention_mask": mask, "position_ids": positions}
    feeds = make_feeds([info for info in infos if is_past(info.name)], len(pending), length, 0, None)
    feeds.update({name: value for name, value in past.items() if name in feeds})
    for info in infos:
        if is_past(info.name):
            continue
        if info.name not in known:
            raise UnsupportedError(f"expected inputs {', '.join(known)} and a cache, got {info.name!r} too.")
        value = known[info.name]
        if info.shape is not None and len(info.shape) == value.ndim + 1:  # one row of positions for each axis of M-RoPE
            value = np.broadcast_to(value, (int(info.shape[0] or 1), *value.shape)).copy()
        feeds[info.name] = value.astype(info.dtype)
    return feeds


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


def _with_encoder(parts: Mapping[str, Path], ids: Array, mask: Array, wanted: Greedy, steps: int) -> Array:
    sequence = np.full((len(ids), 1), wanted.start, ids.dtype)
    with opened_parts(parts, "cpu") as runners:
        step = decoder_steps(runners, ids, mask)
        for _ in range(steps):
            new = _most_likely(step(sequence[:, -1:])[:, None], wanted.never)
            sequence = np.concatenate([sequence, new[:, None]], 1)
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
