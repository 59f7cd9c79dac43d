"""Run an exported encoder and its decoder together (`opened_parts`, `decoder_steps`, `encoder_decoder_tokens`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...export.graph.cache_names import is_past, present_to_past
from ...export.graph.metadata import PAST, PRESENT
from ...models.calling.parts import DECODER, ENCODER
from ..runners.base import Array, Runner
from ..runners.open import open_runner
from .exported import open_exported
from .synthetic import make_feeds


@contextmanager
def opened_parts(parts: Mapping[str, Path], provider: str) -> Iterator[tuple[Runner, Runner]]:
    """The runners of an encoder and its decoder, given their folders by name."""
    encoder, decoder = (open_exported(parts[name]) for name in (ENCODER, DECODER))
    with open_runner(encoder.model, provider) as first, open_runner(decoder.model, provider) as second:
        yield first, second


def encoder_decoder_tokens(
    runners: tuple[Runner, Runner], prompt: list[int], start_token: int, ends: set[int], count: int
) -> list[int]:
    """The new tokens of an encoder and a decoder that reads its cross-attention cache.

    Args:
        runners: from `opened_parts`.
        prompt: the encoder's tokens.
        start_token: the decoder's first token, which is not returned.
        ends: the tokens that end the result.
        count: the most new tokens.

    Raises:
        UsageError: a model fails on its inputs.
    """
    ids = np.array([prompt], np.int64)
    step = decoder_steps(runners, ids, np.ones_like(ids))
    tokens: list[int] = []
    while len(tokens) < count and not (tokens and tokens[-1] in ends):
        last = tokens[-1] if tokens else start_token
        tokens.append(int(step(np.array([[last]], np.int64))[0].argmax()))
    return tokens


def decoder_steps(runners: tuple[Runner, Runner], ids: Array, mask: Array) -> Callable[[Array], Array]:
    """Run the encoder; the result runs the decoder on the next tokens, `[batch, length]`, with the cache so far.

    It returns the logits of the last token in float32, `[batch, vocabulary]`.

    Args:
        runners: from `opened_parts`.
        ids: the encoder's tokens, `[batch, length]`.
        mask: 0 at padding, as `ids`.
    """
    encoder, decoder = runners
    known = {"input_ids": ids, "attention_mask": mask}
    encoded = encoder.run({info.name: known[info.name] for info in encoder.inputs()})
    fixed = {PAST + n.removeprefix(PRESENT): v for n, v in encoded.items() if n.startswith(PRESENT)}
    fixed |= {"attention_mask": mask, "encoder_hidden_states": encoded["last_hidden_state"]}
    infos = decoder.inputs()
    names = {info.name for info in infos}
    past = make_feeds([info for info in infos if is_past(info.name)], len(ids), 1, 0, None)

    def step(tokens: Array) -> Array:
        nonlocal past
        feeds = {**past, **fixed, "decoder_input_ids": tokens}
        outputs = decoder.run({name: value for name, value in feeds.items() if name in names})
        past = present_to_past(outputs)
        return outputs["logits"][:, -1].astype(np.float32)

    return step
