"""Tokens of onnxruntime-genai (`genai_tokens`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def genai_tokens(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The new tokens of a package, of each prompt up to the one that ends its text.

    Args:
        folder: made for onnxruntime-genai.
        prompts: token ids, which it pads on the right.
        count: the most new tokens.
    """
    import onnxruntime_genai as og

    config = json.loads((folder / "genai_config.json").read_text())["model"]
    model, length = og.Model(str(folder)), max(map(len, prompts))
    rows = np.full((len(prompts), length), config["pad_token_id"])
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length + count, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(rows.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = []
    for row in range(len(prompts)):
        ids = [int(token) for token in generator.get_sequence(row)[length:]]
        ends = [place for place, token in enumerate(ids, start=1) if token in config["eos_token_id"]]
        found.append(ids[: ends[0]] if ends else ids)
    return found
