"""The parts of a model that are exported as graphs of their own (`part_of`), such as an encoder and its decoder.

A part is a module with the same submodules, under the same paths, as the whole model, so that the norms have the same
names in both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from .media_parts import (
    EMBEDDING,
    OF_SIZE,
    EmbeddingPart,
    EmbedsDecoderPart,
    FeaturesPart,
    modalities_of,
    modality_read,
)
from .part import Part

ENCODER, DECODER = "encoder", "decoder"
# The names of the cross-attention cache's tensors, of a layer.
_CROSS = "past_key_values.{}.encoder.{}"


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder of transformers that generates."""
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", lambda: False)()
    return bool(getattr(config, "is_encoder_decoder", False)) and bool(generates)


def parts_for(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts into which an export with a cache splits a model with these inputs; none for a decoder of text."""
    if is_encoder_decoder(model):
        return (ENCODER, DECODER)
    modality = modality_read(model, inputs)
    return () if modality is None else (modality.part, EMBEDDING, DECODER)


def part_of(model: nn.Module, name: str, manifest: Mapping[str, Any] | None = None) -> nn.Module:
    """A part of a model by its name, as a module that shares the model's submodules.

    Args:
        model: the whole model.
        name: of the part.
        manifest: of the part; a vision encoder's has the sizes of its images, see `FeaturesPart`.

    Raises:
        UsageError: the model has no part of that name.
    """
    known = _PARTS if is_encoder_decoder(model) else _media_parts(model, manifest or {})
    if name not in known:
        raise UsageError(
            f"{type(model).__name__}: expected the name of one of its parts ({', '.join(known) or 'it has none'}), got "
            f"{name!r}. Name the model that was exported (--against)."
        )
    return known[name](model)


def _media_parts(model: nn.Module, manifest: Mapping[str, Any]) -> dict[str, Callable[[nn.Module], nn.Module]]:
    sizes = {name: manifest[name] for name in OF_SIZE if manifest.get(name)}
    encoders = {
        found.part: functools.partial(FeaturesPart, modality=found, sizes=sizes) for found in modalities_of(model)
    }
    return {**encoders, EMBEDDING: EmbeddingPart, DECODER: EmbedsDecoderPart} if encoders else {}


class EncoderPart(Part):
    """The encoder, and the keys and values that every layer of the decoder reads from its result."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The encoder's states and the cross-attention cache.

        Args:
            input_ids: `[batch, sequence]`.
            attention_mask: `[batch, sequence]`, 0 at padding.

        Returns:
            `last_hidden_state`, `[batch, sequence, width]`, and `present.N.encoder.key` and `.value` of each layer N of
            the decoder, `[batch, heads, sequence, head size]`.
        """
        whole: Any = self.__dict__["whole"]
        # The cross-attention cache is computed with any token; the rest of the decoder's results is not used.
        start = input_ids.new_zeros(input_ids.shape[0], 1)
        result = whole(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=start,
            use_cache=True,
            return_dict=True,
        )
        outputs = {"last_hidden_state": result.encoder_last_hidden_state}
        for number, layer in enumerate(result.past_key_values.cross_attention_cache.layers):
            outputs[f"present.{number}.encoder.key"] = layer.keys
            outputs[f"present.{number}.encoder.value"] = layer.values
        return outputs


class DecoderPart(Part):
    """The decoder, which reads the cross-attention cache that `EncoderPart` makes."""

    def forward(
        self,
        decoder_input_ids: Tensor,
        attention_mask: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **cross: Tensor,
    ) -> dict[str, Any]:
        """The logits, and the cache of self-attention from an empty one.

        Args:
            decoder_input_ids: `[batch, decoder sequence]`.
            attention_mask: of the encoder's tokens, `[batch, encoder sequence]`.
            encoder_hidden_states: `[batch, encoder sequence, width]`; zeros if None, because only their shape is read.
            cross: the cross-attention cache, `past_key_values.N.encoder.key` and `.value` of each layer N.
        """
        whole: Any = self.__dict__["whole"]
        if encoder_hidden_states is None:
            first = next(iter(cross.values()))
            encoder_hidden_states = first.new_zeros(*attention_mask.shape, hidden_size(whole))
        result = whole(
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=encoder_outputs(encoder_hidden_states),
            past_key_values=empty_cache(whole, cross),
            use_cache=True,
            return_dict=True,
        )
        own = SimpleNamespace(self_attention_cache=result.past_key_values.self_attention_cache)
        return {"logits": result.logits, "past_key_values": own}


def hidden_size(model: Any) -> int:
    """The width of the encoder's states."""
    config = getattr(model.config, "encoder", None) or model.config
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    return int(width) if width else int(model.get_input_embeddings().weight.shape[-1])


def encoder_outputs(states: Tensor) -> Any:
    """The encoder's states in the form that transformers' decoders read."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)


def empty_cache(model: Any, cross: dict[str, Tensor]) -> Any:
    """A cache of an encoder-decoder that is empty but for the cross-attention cache.

    Args:
        model: the model.
        cross: its tensors, by the names that files have.
    """
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    config = getattr(model.config, "decoder", None) or model.config
    get_text_config = getattr(config, "get_text_config", None)
    if get_text_config is not None:
        config = get_text_config(decoder=True)
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache())
    for layer in range(len(cross) // 2):
        key, value = (cross[_CROSS.format(layer, part)] for part in ("key", "value"))
        cache.cross_attention_cache.update(key, value, layer)
        cache.is_updated[layer] = True
    return cache


def cross_cache(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The cross-attention cache among the outputs of `EncoderPart`, under the names that `DecoderPart` reads."""
    return {n.replace("present.", "past_key_values.", 1): t for n, t in outputs.items() if n.startswith("present.")}


_PARTS: dict[str, Callable[[nn.Module], nn.Module]] = {ENCODER: EncoderPart, DECODER: DecoderPart}
