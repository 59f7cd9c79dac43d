"""The parts of a model that reads images and text: the vision encoder, the embedding, and the decoder with its cache.

The vision encoder makes one row of features for each image token of one image, the embedding puts them in the places of
the image tokens, and the decoder reads embeddings instead of token ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .part import Part

VISION, EMBEDDING = "vision_encoder", "embedding"
PIXELS, GRID = "pixel_values", "image_grid_thw"
# Inputs of the vision encoder, beside `pixel_values`.
_OF_IMAGES = (GRID, "image_sizes", "pixel_attention_mask")
# The largest difference of logits between the parts and the whole, in eps of their dtype times the largest logit.
_MOST_EPS = 64


def reads_images(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a model of transformers can be split into these parts, and the inputs have images."""
    return PIXELS in inputs and _base(model) is not None and image_token(model) is not None


def image_token(model: Any) -> int | None:
    """The id of the token in whose place a feature of an image goes; None if the config does not state it."""
    config = getattr(model, "config", None)
    found = getattr(config, "image_token_id", None)
    found = getattr(config, "image_token_index", None) if found is None else found
    return found if isinstance(found, int) else None


def _base(model: Any) -> Any:
    """The module that has `get_image_features`."""
    return next((m for m in (getattr(model, "model", None), model) if hasattr(m, "get_image_features")), None)


class VisionPart(Part):
    """The vision encoder and the projector, for images of one size.

    Args:
        whole: the model.
        grid: numbers of patches in time, height and width of each image, where the model reads them.
    """

    def __init__(self, whole: nn.Module, grid: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(whole)
        self.grid = None if grid is None else [[int(size) for size in sizes] for sizes in grid]
        # What the encoder computes from the grid, where it was computed before; see `with_tables`.
        self.__dict__["tables"] = {}

    def with_tables(self) -> VisionPart:
        """This part, with the positions and windows of its grid as tensors, which a capture cannot compute."""
        from transformers.exporters.utils import precompute_export_inputs

        whole: Any = self.__dict__["whole"]
        if self.grid is not None:
            found: dict[str, Any] = {"hidden_states": torch.zeros(0), "grid_thw": torch.tensor(self.grid)}
            precompute_export_inputs(whole.get_encoder(modality="image"), found)
            self.__dict__["tables"] = {n: v for n, v in found.items() if n not in ("hidden_states", "grid_thw")}
        return self

    def forward(self, pixel_values: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """The features of the image tokens.

        Args:
            pixel_values: of one image, as the model's image processor makes them.
            others: further inputs of the model's `get_image_features`, such as `image_sizes`.

        Returns:
            `image_features`, `[image tokens, width]`.
        """
        given: dict[str, Any] = {**others, **self.__dict__["tables"]}
        if self.grid is not None:
            given[GRID] = torch.tensor(self.grid, device=pixel_values.device)
        found = _base(self.__dict__["whole"]).get_image_features(pixel_values=pixel_values, **given)
        found = getattr(found, "pooler_output", found)
        rows = found if isinstance(found, list | tuple) else [found]
        return {"image_features": torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])}


class EmbeddingPart(Part):
    """The embeddings of the tokens, with the features of images in the places of the image tokens."""

    def forward(self, input_ids: Tensor, image_features: Tensor) -> dict[str, Tensor]:
        """The input of the decoder.

        Args:
            input_ids: `[batch, sequence]`.
            image_features: of all images in order, `[image tokens, width]`; at least one row.

        Returns:
            `inputs_embeds`, `[batch, sequence, width]`.
        """
        whole: Any = self.__dict__["whole"]
        token, embedding = image_token(whole), whole.get_input_embeddings()
        is_image = torch.eq(input_ids, -1 if token is None else token)
        known = embedding.weight.shape[0]
        ids = input_ids.masked_fill(is_image, 0) if token is not None and token >= known else input_ids
        embedded = embedding(ids)
        places = is_image.unsqueeze(-1).expand_as(embedded)
        return {"inputs_embeds": embedded.masked_scatter(places, image_features.to(embedded.dtype))}


def first_image(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], list[list[int]] | None, int]:
    """The vision encoder's inputs for the first image of a model's inputs, its grid or None, and how many there are."""
    pixels, grid = inputs[PIXELS], inputs.get(GRID)
    if grid is not None:
        first = grid[:1].tolist()
        return {PIXELS: pixels[: int(grid[0].prod())]}, first, len(grid)
    others = {name: inputs[name][:1] for name in _OF_IMAGES if name in inputs}
    return {PIXELS: pixels[:1], **others}, None, pixels.shape[0]


def image_record(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the images that the parts of a model read: see `ManifestFields`."""
    record: dict[str, Any] = {"image_token_id": image_token(model)}
    if GRID in inputs:
        vision = getattr(model.config, "vision_config", None)
        record["image_grid_thw"] = inputs[GRID][:1].tolist()
        record["image_merge_size"] = int(getattr(vision, "spatial_merge_size", 1))
    return record


def embed(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The decoder's input for inputs of the whole model, by the parts."""
    grid = inputs[GRID].tolist() if GRID in inputs else None
    images = {name: value for name, value in inputs.items() if name == PIXELS or (name in _OF_IMAGES and name != GRID)}
    features = VisionPart(model, grid)(**images)["image_features"]
    embedded: Tensor = EmbeddingPart(model)(inputs["input_ids"], features)["inputs_embeds"]
    return embedded


def _positions(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The positions of text and images, where the model computes them from the token ids."""
    owner = next((m for m in (model, getattr(model, "model", None)) if hasattr(m, "get_rope_index")), None)
    if owner is None or "position_ids" in inputs:
        return {}
    wanted = inspect.signature(owner.get_rope_index).parameters
    known = {**inputs, "mm_token_type_ids": (inputs["input_ids"] == image_token(model)).long()}
    positions, _ = owner.get_rope_index(**{name: known[name] for name in wanted if name in known})
    return {"position_ids": positions}


def check_parts(model: Any, inputs: Mapping[str, Any]) -> None:
    """Check that the parts together give the logits of the whole model.

    Raises:
        UnsupportedError: they do not: the model uses the images in another place too.
    """
    text = {n: v for n, v in inputs.items() if n not in ("input_ids", PIXELS, *_OF_IMAGES)}
    with torch.no_grad():
        wanted = model(**inputs).logits
        try:
            got = model(inputs_embeds=embed(model, inputs), **text, **_positions(model, inputs)).logits
        except Exception as error:
            first = " ".join(str(error).split())[:200]
            raise UnsupportedError(
                f"{type(model).__name__} cannot be split into a vision encoder and a decoder: {first}."
            ) from error
    off, largest = float((got - wanted).abs().max()), float(wanted.abs().max())
    if not off <= _MOST_EPS * torch.finfo(wanted.dtype).eps * largest:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be split into a vision encoder and a decoder: with the images' features as "
            f"embeddings its logits differ by {off:.3g} of {largest:.3g}, so it uses the images in another place too. "
            "Omit --with-past to export one graph with images, or omit the images."
        )
