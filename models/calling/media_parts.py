"""The parts of a model that reads images or sounds beside text: their encoder, the embedding, and the decoder.

The encoder makes one row of features for each image token of one image (audio token of one sound), the embedding puts
them in the places of these tokens, and the decoder, which has a cache, reads embeddings instead of token ids. A model
that adds features of inner layers of its vision encoder to the states of its first layers (DeepStack,
https://arxiv.org/abs/2406.04334) has them as further outputs of the encoder and inputs of the decoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .modalities import DEEP_EMBEDS, TEXT_INPUTS, TOKEN_TYPES
from .part import Part

EMBEDDING = "embedding"
GRID = "image_grid_thw"
# Inputs that follow from the size of the images, so that a graph for one size has them as constants.
OF_SIZE = (GRID, "image_sizes")
# Features of inner layers by their number, as an output of the encoder.
_DEEP_FEATURES = "deepstack_features_"
# The largest difference of logits that rounding explains, in eps of their dtype times the largest logit.
_MOST_EPS = 64


@dataclass(frozen=True, slots=True)
class Modality:
    """What a model reads beside text, with an encoder of its own.

    Attributes:
        name: as transformers names it, `image` or `audio`.
        plural: what it is called in messages.
        part: the name of the encoder's part.
        values: the model's input that holds it.
        others: further inputs of the encoder.
    """

    name: str
    plural: str
    part: str
    values: str
    others: tuple[str, ...]

    @property
    def getter(self) -> str:
        """The method of a model that computes the features."""
        return f"get_{self.name}_features"

    @property
    def features(self) -> str:
        """The output of the encoder, an input of the embedding."""
        return f"{self.name}_features"

    @property
    def token_field(self) -> str:
        """The manifest's field for the token in whose place a feature goes."""
        return f"{self.name}_token_id"

    @property
    def note(self) -> str:
        """What the encoder reads, for the manifest."""
        what = "image of the size" if self.name == "image" else "sound of the length"
        return f"the {self.part.replace('_', ' ')} reads one {what} of the example inputs"

    def token(self, model: Any) -> int | None:
        """The id of that token; None if the config does not state it."""
        config = getattr(model, "config", None)
        found = (getattr(config, field, None) for field in (self.token_field, f"{self.name}_token_index"))
        return next((token for token in found if isinstance(token, int)), None)

    def of(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that its encoder reads."""
        return {name: inputs[name] for name in (self.values, *self.others) if name in inputs}


IMAGES = Modality("image", "images", "vision_encoder", "pixel_values", (*OF_SIZE, "pixel_attention_mask"))
SOUNDS = Modality("audio", "sounds", "audio_encoder", "input_features", ("input_features_mask",))
MODALITIES = (IMAGES, SOUNDS)
ENCODER_PARTS = {modality.part: modality for modality in MODALITIES}


def modality_read(model: nn.Module, inputs: Mapping[str, Any]) -> Modality | None:
    """The modality of the inputs for which a model of transformers can be split into these parts."""
    return next((found for found in modalities_of(model) if found.values in inputs), None)


def modalities_of(model: nn.Module) -> list[Modality]:
    """The modalities for which a model has an encoder and a token."""
    return [found for found in MODALITIES if _base(model, found) is not None and found.token(model) is not None]


def _base(model: Any, modality: Modality) -> Any:
    """The module that computes the features."""
    return next((m for m in (getattr(model, "model", None), model) if hasattr(m, modality.getter)), None)


class FeaturesPart(Part):
    """The encoder of images of one size, or of sounds of one length, and the projector.

    Args:
        whole: the model.
        modality: what it encodes.
        sizes: what the model reads of the sizes of the images, by name: `image_grid_thw`, the numbers of patches in
            time, height and width of each, or `image_sizes`, their heights and widths.
    """

    def __init__(self, whole: nn.Module, modality: Modality, sizes: Mapping[str, Sequence[Sequence[int]]]) -> None:
        super().__init__(whole)
        self.modality = modality
        self.sizes = {name: [list(map(int, row)) for row in rows] for name, rows in sizes.items()}
        # What the encoder computes from the grid, where it was computed before; see `with_tables`.
        self.__dict__["tables"] = {}

    def with_tables(self) -> FeaturesPart:
        """This part, with the positions and windows of its grid as tensors, which a capture cannot compute."""
        from transformers.exporters.utils import precompute_export_inputs

        whole: Any = self.__dict__["whole"]
        if GRID in self.sizes:
            found: dict[str, Any] = {"hidden_states": torch.zeros(0), "grid_thw": torch.tensor(self.sizes[GRID])}
            precompute_export_inputs(whole.get_encoder(modality=self.modality.name), found)
            self.__dict__["tables"] = {n: v for n, v in found.items() if n not in ("hidden_states", "grid_thw")}
        return self

    def forward(self, **values: Tensor) -> dict[str, Tensor]:
        """The features of the tokens of an image or a sound.

        Args:
            values: of one image or sound, the modality's inputs as the model's processor makes them, without those of
                its size.

        Returns:
            `image_features` or `audio_features`, `[tokens, width]`; and with DeepStack `deepstack_features_N` of each
            inner layer, of the same shape.
        """
        given: dict[str, Any] = {**values, **self.__dict__["tables"], **self.sizes}
        if GRID in given:  # other sizes are read as numbers
            given[GRID] = torch.tensor(given[GRID], device=next(iter(values.values())).device)
        found = getattr(_base(self.__dict__["whole"], self.modality), self.modality.getter)(**given)
        deep = getattr(found, "deepstack_features", None) or []
        features = {self.modality.features: _rows(getattr(found, "pooler_output", found))}
        return {**features, **{f"{_DEEP_FEATURES}{n}": _rows(rows) for n, rows in enumerate(deep)}}


def _rows(found: Any) -> Tensor:
    parts = found if isinstance(found, list | tuple) else [found]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


class EmbeddingPart(Part):
    """The embeddings of the tokens, with the features of images or sounds in the places of their tokens."""

    def forward(self, input_ids: Tensor, **features: Tensor) -> dict[str, Tensor]:
        """The input of the decoder.

        Args:
            input_ids: `[batch, sequence]`.
            features: the outputs of `FeaturesPart` of all images or sounds in order, `[tokens, width]`; at least one
                row.

        Returns:
            `inputs_embeds`, `[batch, sequence, width]`; and with DeepStack `deepstack_embeds_N`, of the same shape,
            zero for the tokens of text.
        """
        whole: Any = self.__dict__["whole"]
        modality = next(found for found in MODALITIES if found.features in features)
        token, embedding = modality.token(whole), whole.get_input_embeddings()
        is_feature = torch.eq(input_ids, -1 if token is None else token)
        known = embedding.weight.shape[0]
        ids = input_ids.masked_fill(is_feature, 0) if token is not None and token >= known else input_ids
        embedded = embedding(ids)
        places = is_feature.unsqueeze(-1).expand_as(embedded)
        results = {"inputs_embeds": embedded.masked_scatter(places, features[modality.features].to(embedded.dtype))}
        for name, rows in features.items():
            if name.startswith(_DEEP_FEATURES):
                level = torch.zeros_like(embedded).masked_scatter(places, rows.to(embedded.dtype))
                results[DEEP_EMBEDS + name.removeprefix(_DEEP_FEATURES)] = level
        return results


class EmbedsDecoderPart(Part):
    """The decoder, which reads embeddings, and with DeepStack the features that its first layers add."""

    def forward(self, **inputs: Any) -> Any:
        """The results of the whole model.

        Args:
            inputs: `inputs_embeds` and `deepstack_embeds_N`, `[batch, sequence, width]`, and what the model reads
                beside them.
        """
        whole: Any = self.__dict__["whole"]
        deep = [inputs[name] for name in sorted(inputs, key=_level) if name.startswith(DEEP_EMBEDS)]
        rest = {name: value for name, value in inputs.items() if not name.startswith(DEEP_EMBEDS)}
        for name in TOKEN_TYPES:
            if name in rest and rest.get("attention_mask") is not None:
                torch._check(rest[name].shape[1] == rest["attention_mask"].shape[1])  # one dim of the graph
        with _adding(whole, deep):
            return whole(**rest)


def _level(name: str) -> int:
    number = name.removeprefix(DEEP_EMBEDS)
    return int(number) if number.isdigit() else -1


@contextmanager
def _adding(whole: Any, deep: Sequence[Tensor]) -> Iterator[None]:
    """A model whose first layers add these tensors to their results, as they add the features of images."""
    decoder = whole.get_decoder() if deep else None
    if decoder is None:
        yield
        return
    forward = decoder.forward

    def with_features(**arguments: Any) -> Any:
        # The mask is not read: `_deepstack_process` gets the tensors in the places of the tokens already.
        return forward(**{**arguments, "visual_pos_masks": None, "deepstack_visual_embeds": list(deep)})

    decoder.forward = with_features
    decoder._deepstack_process = lambda states, _, features: states + features
    try:
        yield
    finally:
        del decoder.forward, decoder._deepstack_process


def first_one(modality: Modality, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The encoder's inputs for the first image or sound of the inputs, its size, and how many there are."""
    values, given = inputs[modality.values], modality.of(inputs)
    sizes = {name: rows[:1] for name, rows in _sizes(given).items()}
    if GRID in sizes:
        return {modality.values: values[: int(given[GRID][0].prod())]}, sizes, len(given[GRID])
    return {name: value[:1] for name, value in given.items() if name not in sizes}, sizes, values.shape[0]


def _sizes(given: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    return {name: torch.as_tensor(given[name]).tolist() for name in OF_SIZE if given.get(name) is not None}


def media_record(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the images or sounds that the parts of a model read: see `ManifestFields`."""
    modality = modality_read(model, inputs)
    if modality is None:
        return {}
    record: dict[str, Any] = {modality.token_field: modality.token(model), **first_one(modality, inputs)[1]}
    if GRID in record:
        vision = getattr(model.config, "vision_config", None)
        record["image_merge_size"] = int(getattr(vision, "spatial_merge_size", 1))
    return record


def embed(model: nn.Module, modality: Modality, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The decoder's inputs instead of token ids for inputs of the whole model, by the parts."""
    given = modality.of(inputs)
    sizes = _sizes(given)
    features = FeaturesPart(model, modality, sizes)(**{n: value for n, value in given.items() if n not in sizes})
    embedded: dict[str, Tensor] = EmbeddingPart(model)(inputs["input_ids"], **features)
    return embedded


def _positions(model: Any, modality: Modality, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The positions of text and images, where the model computes them from the token ids."""
    owner = next((m for m in (model, getattr(model, "model", None)) if hasattr(m, "get_rope_index")), None)
    if owner is None or "position_ids" in inputs:
        return {}
    wanted = inspect.signature(owner.get_rope_index).parameters
    known = {**inputs, "mm_token_type_ids": (inputs["input_ids"] == modality.token(model)).long()}
    positions, _ = owner.get_rope_index(**{name: known[name] for name in wanted if name in known})
    return {"position_ids": positions}


def check_parts(model: Any, modality: Modality, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Check that the parts together give the logits of the whole model.

    The decoder is called as its graph is, with a cache that is there and has no tokens: some models read the types of
    the tokens only then, or only with no cache.

    Returns:
        The inputs with which the parts are captured: without the types of the tokens, where the decoder does not need
        them.

    Raises:
        UnsupportedError: they do not: the model uses the images or sounds in another place too, or reads more.
    """
    who, plural = type(model).__name__, modality.plural
    split = f"cannot be split into {article(modality.part)} and a decoder"
    media = modality.of(inputs)
    text = {name: value for name, value in inputs.items() if name not in media and name != "input_ids"}
    more = sorted(name for name in text.keys() - TEXT_INPUTS if isinstance(text[name], Tensor))
    if more:
        raise UnsupportedError(
            f"{who} {split} with these inputs: the parts read text and {plural}, and the inputs have "
            f"{', '.join(more)} too. Omit --with-past to export one graph, or omit these inputs."
        )
    types = [name for name in TOKEN_TYPES if name in inputs]
    known = {name: value for name, value in text.items() if name not in TOKEN_TYPES}
    with torch.no_grad():
        wanted = model(**inputs).logits
        try:
            given = {**embed(model, modality, inputs), **known, **_positions(model, modality, inputs)}
            for needed in ([], types) if types else ([],):
                more_inputs = {name: inputs[name] for name in needed}
                got = EmbedsDecoderPart(model)(**given, **more_inputs, **_empty_cache(model, given)).logits
                off = beyond_rounding(got, wanted)
                if off is None:
                    return {name: value for name, value in inputs.items() if name not in types or name in needed}
        except Exception as error:
            first = " ".join(str(error).split())[:200]
            raise UnsupportedError(f"{who} {split}: {first}.") from error
    raise UnsupportedError(
        f"{who} {split}: with the features of the {plural} as embeddings and a cache its logits differ by {off}, "
        f"so it uses the {plural} in another place too, or another attention mask in the first call. "
        f"Omit --with-past to export one graph with {plural}, or omit the {plural}."
    )


def beyond_rounding(got: Tensor, wanted: Tensor) -> str | None:
    """The largest difference of logits and the largest logit, such as `0.3 of 4.7`; None if rounding explains it."""
    off, largest = float((got - wanted).abs().max()), float(wanted.abs().max())
    fits = off <= _MOST_EPS * torch.finfo(wanted.dtype).eps * largest
    return None if fits else f"{off:.3g} of {largest:.3g}"


def _empty_cache(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """A cache that is there and has no tokens, for a decoder whose layers all have keys and values; else no cache."""
    cache = getattr(EmbedsDecoderPart(model)(**given, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", [])
    if not layers or not all(getattr(getattr(layer, "keys", None), "ndim", 0) == 4 for layer in layers):
        return {}
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = 0
    return {"past_key_values": cache, "use_cache": True}


def article(part: str) -> str:
    """The name of a part in a sentence."""
    words = part.replace("_", " ")
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
