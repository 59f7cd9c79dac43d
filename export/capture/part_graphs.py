"""The parts of a transformers model as graphs of their own: what each is called with (`part_sample`), and returns.

The graph of an encoder returns the cross-attention cache too, so that the decoder's does not compute it in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from ...models.calling.media_parts import (
    ENCODER_PARTS,
    EmbeddingPart,
    EmbedsDecoderPart,
    FeaturesPart,
    Modality,
    embed,
    first_one,
    modality_read,
)
from ...models.calling.modalities import TOKEN_TYPES
from ...models.calling.parts import DECODER, ENCODER, EncoderPart, cross_cache, empty_cache, encoder_outputs
from ...models.errors import UnsupportedError
from ..graph.cache_names import cache_name, past_name
from ..graph.metadata import PAST, PRESENT

# Tokens in the decoder's cache, and new ones, of the example.
_PAST_TOKENS, _NEW_TOKENS = 3, 2
_ENCODER_STATES = "encoder_outputs.last_hidden_state"
# Outputs of a part, by the names that transformers gives them.
_OUTPUTS = {ENCODER: {"encoder_last_hidden_state": "last_hidden_state"}, DECODER: {"logits": "logits"}}
_SIDE = {ENCODER: ".encoder.", DECODER: ".decoder."}


def media_sample(model: Any, part: str, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What is captured for the encoder of images or sounds, or the embedding, of a model, and what it is called with.

    Args:
        model: a model of transformers that reads images or sounds, in eval mode.
        part: `vision_encoder`, `audio_encoder` or `embedding`.
        inputs: example inputs of the whole model.
    """
    modality = _modality(model, inputs)
    first, sizes, number = first_one(modality, inputs)
    encoder = FeaturesPart(model, modality, sizes)
    if part in ENCODER_PARTS:
        return encoder.with_tables(), first
    with torch.no_grad():
        features = {name: rows.repeat(number, 1) for name, rows in encoder(**first).items()}
    return EmbeddingPart(model), {"input_ids": inputs["input_ids"], **features}


def name_outputs(program: ir.Model) -> None:
    """Name the outputs of a part as its forward does."""
    for value in program.graph.outputs:
        value.name = (value.name or "").removeprefix("output.")


def finish_embedding(program: ir.Model) -> None:
    """Name the outputs of the embedding; all its features have as many rows, and the width of the embeddings."""
    name_outputs(program)
    width = next(value.shape[-1] for value in program.graph.outputs if value.shape is not None)
    features = [value for value in program.graph.inputs if "input_ids" not in (value.name or "")]
    rows = next(value.shape[0] for value in features if value.shape is not None)
    for value in features:
        value.shape = ir.Shape([rows, width])


def embeds_sample(model: Any, step: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A decode step that reads embeddings instead of token ids: what is captured, and what it is called with.

    Args:
        model: a model of transformers that reads images or sounds, in eval mode.
        step: what the decode step is called with.
        inputs: example inputs of the whole model.
    """
    with torch.no_grad():
        count = step["input_ids"].shape[1]
        embedded = {name: value[:, -count:] for name, value in embed(model, _modality(model, inputs), inputs).items()}
    rest = {name: value for name, value in step.items() if name != "input_ids"}
    # Of all tokens, as in the mask; those after the example's are text.
    mask, names = step.get("attention_mask"), [name for name in TOKEN_TYPES if name in inputs]
    if names and mask is None:
        raise UnsupportedError(
            f"{type(model).__name__} reads {', '.join(names)}: expected an attention_mask beside them, got none. Add "
            "it to the inputs."
        )
    types = {} if mask is None else {name: _padded(inputs[name], mask.shape[1]) for name in names}
    return EmbedsDecoderPart(model), {**embedded, **rest, **types}


def _padded(types: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(types, (0, length - types.shape[1]))


def _modality(model: Any, inputs: Mapping[str, Any]) -> Modality:
    modality = modality_read(model, inputs)
    assert modality is not None, "only a model with inputs of a modality has such parts"
    return modality


def part_sample(model: Any, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the whole model is called with to capture a part of it.

    Args:
        model: an encoder-decoder of transformers, in eval mode.
        part: `encoder` or `decoder`.
        inputs: example inputs of the whole model.
    """
    from transformers.exporters.utils import apply_patches

    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).clone()
    mask[0, 0] = 0  # the exporter removes a mask of only ones
    tokens = inputs["decoder_input_ids"]
    tokens = tokens.repeat(1, -(-(_PAST_TOKENS + _NEW_TOKENS) // tokens.shape[1]))
    if part == ENCODER:
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": tokens[:, :_NEW_TOKENS],
            "use_cache": True,
        }
    # The patches of the exporter keep all tokens in the cache of a sliding window, as the captured graph does.
    with apply_patches("dynamo"):
        encoded = EncoderPart(model)(ids, mask)
        given = {"attention_mask": mask, "encoder_outputs": encoder_outputs(encoded["last_hidden_state"])}
        cache = empty_cache(model, cross_cache(encoded))
        first = model(**given, decoder_input_ids=tokens[:, :_PAST_TOKENS], past_key_values=cache, use_cache=True)
    return {
        **given,
        "decoder_input_ids": tokens[:, _PAST_TOKENS : _PAST_TOKENS + _NEW_TOKENS],
        "past_key_values": first.past_key_values,
        "use_cache": True,
    }


def keep_part(program: ir.Model, part: str) -> None:
    """Keep the outputs of a part of a captured model, with the names of its caches, and the inputs that they need."""
    kept = []
    for value in program.graph.outputs:
        name = (value.name or "").removeprefix("output.")
        cached = cache_name(name)
        renamed = _OUTPUTS[part].get(name) or (None if cached is None else PRESENT + cached)
        is_number = value.shape is not None and len(value.shape) == 0  # a window's length, which does not change
        if renamed is not None and (cached is None or (_SIDE[part] in renamed and not is_number)):
            value.name = renamed
            kept.append(value)
    program.graph.outputs[:] = kept
    RemoveUnusedNodesPass()(program)
    if part == ENCODER:
        _read_batch_of_tokens(program)
    for value in list(program.graph.inputs):
        name = (value.name or "").removeprefix("input.")
        value.name = "encoder_hidden_states" if name == _ENCODER_STATES else past_name(name) or name
        if not value.uses() and not value.is_graph_output():
            program.graph.inputs.remove(value)


def _read_batch_of_tokens(program: ir.Model) -> None:
    """Read the batch from the encoder's tokens where the model reads it from the decoder's."""
    inputs = {(value.name or "").removeprefix("input."): value for value in program.graph.inputs}
    tokens, others = inputs.get("input_ids"), inputs.get("decoder_input_ids")
    if tokens is None or others is None:
        return
    for node, index in list(others.uses()):
        start, end = (node.attributes.get_int(name, default) for name, default in (("start", 0), ("end", -1)))
        if node.op_type == "Shape" and (start, end) == (0, 1):
            node.replace_input_with(index, tokens)


def lost_states(program: ir.Model) -> list[str]:
    """The tensors of the cache that are an input or an output only, without the cross-attention cache.

    That one is made by the encoder's graph and does not change.
    """
    past, present = (
        {(value.name or "").removeprefix(prefix) for value in values if (value.name or "").startswith(prefix)}
        for values, prefix in ((program.graph.inputs, PAST), (program.graph.outputs, PRESENT))
    )
    return sorted(name for name in past ^ present if _SIDE[ENCODER] not in f".{name}")
