"""The parts of models that read images or sounds: together they are the model; a model that is more is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rmsnorm_deploy.models.calling.media_parts import (
    IMAGES,
    SOUNDS,
    FeaturesPart,
    Modality,
    check_parts,
    embed,
    first_one,
    media_record,
    modality_read,
)
from rmsnorm_deploy.models.calling.parts import part_of, parts_for
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from tests.helpers.models.media import (
    IMAGE,
    gemma3,
    gemma3_inputs,
    llava,
    llava_inputs,
    qwen2_5_vl,
    qwen3_vl,
    qwen_inputs,
    voxtral,
    voxtral_inputs,
)


@pytest.mark.parametrize(
    ("model", "inputs", "modality"),
    [
        (llava, llava_inputs, IMAGES),
        (qwen2_5_vl, qwen_inputs, IMAGES),
        (qwen3_vl, qwen_inputs, IMAGES),
        (gemma3, gemma3_inputs, IMAGES),
        (voxtral, voxtral_inputs, SOUNDS),
    ],
)
def test_the_parts_together_are_the_model(model: Any, inputs: Any, modality: Modality) -> None:
    whole, given = model(), inputs()
    assert modality_read(whole, given) is modality
    check_parts(whole, modality, given)
    embedded = embed(whole, modality, given)["inputs_embeds"]
    assert embedded.shape == (*given["input_ids"].shape, 32)
    text = given["input_ids"] != IMAGE
    assert torch.equal(embedded[text], whole.get_input_embeddings()(given["input_ids"])[text])


class ReadsThemTwice(nn.Module):
    """Adds the mean of the pixels to the logits, which no embedding has."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llava()
        self.config = self.model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, pixel_values: torch.Tensor | None = None, **more: Any) -> Any:
        result = self.model(pixel_values=pixel_values, **more)
        if pixel_values is not None:
            result.logits = result.logits + pixel_values.mean()
        return result


def test_a_model_that_is_more_than_its_parts_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"ReadsThemTwice cannot be split .* uses the images in another place too"
    ):
        check_parts(ReadsThemTwice(), IMAGES, llava_inputs())


def test_the_types_of_the_tokens_are_read_where_the_mask_follows_them() -> None:
    given = gemma3_inputs()
    assert "token_type_ids" in check_parts(gemma3(), IMAGES, given)
    with torch.no_grad():
        causal = gemma3()(**{name: value for name, value in given.items() if name != "token_type_ids"}).logits
        assert float((gemma3()(**given).logits - causal).abs().max()) > 0.1
    assert "mm_token_type_ids" not in check_parts(qwen2_5_vl(), IMAGES, qwen_inputs())


def test_the_first_image_and_how_many_there_are() -> None:
    image, sizes, number = first_one(IMAGES, llava_inputs(3))
    assert (tuple(image["pixel_values"].shape), sizes, number) == ((1, 3, 28, 28), {}, 3)
    image, sizes, number = first_one(IMAGES, qwen_inputs(2))
    assert (tuple(image["pixel_values"].shape), sizes, number) == ((16, 294), {"image_grid_thw": [[1, 4, 4]]}, 2)


def test_which_models_have_parts() -> None:
    whole = llava()
    assert parts_for(whole, llava_inputs()) == ("vision_encoder", "embedding", "decoder")
    assert parts_for(whole, {"input_ids": 1}) == ()
    assert parts_for(voxtral(), voxtral_inputs()) == ("audio_encoder", "embedding", "decoder")
    assert modality_read(nn.Linear(2, 2), {"pixel_values": 1}) is None
    assert (IMAGES.token(whole), IMAGES.token(nn.Linear(2, 2)), SOUNDS.token(whole)) == (IMAGE, None, None)
    with pytest.raises(UsageError, match=r"expected the name of one of its parts .*, got 'encoder'"):
        part_of(whole, "encoder")


def test_a_part_has_the_paths_of_the_model() -> None:
    whole = qwen2_5_vl()
    part = part_of(whole, "vision_encoder", {"image_grid_thw": [[1, 4, 4]]})
    assert isinstance(part, FeaturesPart)
    assert [site.path for site in find_norms(part).sites] == [site.path for site in find_norms(whole).sites]
    assert media_record(whole, qwen_inputs()) == {
        "image_token_id": IMAGE, "image_grid_thw": [[1, 4, 4]], "image_merge_size": 2,
    }  # fmt: skip


def test_tables_of_the_grid_change_nothing() -> None:
    whole, image = qwen2_5_vl(), first_one(IMAGES, qwen_inputs())[0]
    grid = {"image_grid_thw": [[1, 4, 4]]}
    plain, prepared = FeaturesPart(whole, IMAGES, grid), FeaturesPart(whole, IMAGES, grid).with_tables()
    assert "window_index" in prepared.__dict__["tables"]
    with torch.no_grad():
        assert torch.equal(plain(**image)["image_features"], prepared(**image)["image_features"])
