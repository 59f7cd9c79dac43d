"""Generation with images and sounds: the tokens are PyTorch's; images that do not fit are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.runtime.generation.api import generate
from rmsnorm_deploy.runtime.generation.positions import image_positions
from rmsnorm_deploy.runtime.validation.api import validate
from tests.helpers.extent import EVERY
from tests.helpers.models.media import (
    IMAGE,
    gemma3,
    gemma3_inputs,
    llava,
    llava_inputs,
    qwen3_vl,
    qwen_inputs,
    voxtral,
    voxtral_inputs,
)


def wanted(model: Any, inputs: dict[str, torch.Tensor]) -> list[int]:
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return list(map(int, ids[0, inputs["input_ids"].shape[1] :]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llava") / "out"
    export_model(llava(), place, inputs=llava_inputs(), with_past=True, target="ort")
    return place


def test_tokens_of_an_image_are_those_of_pytorch(folder: Path) -> None:
    inputs = llava_inputs(1)
    tokens = wanted(llava(), inputs)
    assert len(set(tokens)) > 3
    images = {"pixel_values": inputs["pixel_values"].numpy()}
    prompt = inputs["input_ids"][0].tolist()
    assert generate(folder, prompt, max_new_tokens=12, inputs=images).ids == tokens
    other = {"pixel_values": images["pixel_values"][:, :, ::-1].copy()}
    assert generate(folder, prompt, max_new_tokens=12, inputs=other).ids != tokens


def test_tokens_without_an_image_are_those_of_pytorch(folder: Path) -> None:
    ids = torch.tensor([[7, 12, 41, 66, 8]])
    tokens = wanted(llava(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert generate(folder, ids[0].tolist(), max_new_tokens=12).ids == tokens


def test_images_that_do_not_fit(folder: Path) -> None:
    prompt, pixels = llava_inputs(1)["input_ids"][0].tolist(), np.zeros((1, 3, 28, 28), np.float32)
    with pytest.raises(UsageError, match="the prompt has 16 image tokens, and there are no images"):
        generate(folder, prompt)
    with pytest.raises(UsageError, match=r"pixel_values: expected images of shape 1x3x28x28, .* got 1x3x14x28"):
        generate(folder, prompt, inputs={"pixel_values": pixels[:, :, :14]})
    with pytest.raises(UsageError, match="expected 32 image tokens for 2 images, got 16"):
        generate(folder, prompt, inputs={"pixel_values": np.concatenate([pixels, pixels])})


@pytest.mark.parametrize("part", ["vision_encoder", "embedding", "decoder"])
def test_every_part_agrees_with_pytorch(folder: Path, part: str) -> None:
    report = validate(folder / part, llava())
    assert (report.verdict, report.culprits) == ("pass", [])


@pytest.mark.parametrize(
    ("make", "make_inputs", "values", "part"),
    [
        # Positions in time, height and width; features of inner layers, which the first layers of the decoder add.
        (qwen3_vl, qwen_inputs, "pixel_values", "vision_encoder"),
        (voxtral, voxtral_inputs, "input_features", "audio_encoder"),
        # An attention mask that follows the types of the tokens.
        *([(gemma3, gemma3_inputs, "pixel_values", "vision_encoder")] if EVERY else []),
    ],
)
def test_parts_of_images_and_sounds_are_right(
    tmp_path: Path, make: Any, make_inputs: Any, values: str, part: str
) -> None:
    model, inputs = make(), make_inputs(1)
    result = export_model(model, tmp_path / "out", inputs=make_inputs(), with_past=True, target="ort")
    assert result.manifest["components"] == [part, "embedding", "decoder"]
    tokens = wanted(model, inputs)
    assert len(set(tokens)) > 3
    prompt, given = inputs["input_ids"][0].tolist(), {values: inputs[values].numpy()}
    assert generate(tmp_path / "out", prompt, max_new_tokens=12, inputs=given).ids == tokens
    other = {values: given[values][:, ::-1].copy()}
    assert generate(tmp_path / "out", prompt, max_new_tokens=12, inputs=other).ids != tokens
    if part == "audio_encoder" or EVERY:  # the tokens are those of all parts
        report = validate(tmp_path / "out", model)
        assert (report.verdict, report.culprits) == ("pass", [])


def test_positions_of_an_image_are_those_of_its_patches() -> None:
    found = image_positions([5, IMAGE, IMAGE, IMAGE, IMAGE, 6, 7], IMAGE, [1, 4, 4], 2)
    assert found.tolist() == [[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]]


def test_a_folder_of_one_model_reads_no_images(tmp_path: Path) -> None:
    model = llava()
    export_model(model, tmp_path / "text", with_past=True)
    with pytest.raises(UsageError, match="reads text only, got pixel_values too"):
        generate(tmp_path / "text", [5, 6], inputs={"pixel_values": np.zeros((1, 3, 28, 28), np.float32)})


def test_inputs_beside_text_are_not_dropped(tmp_path: Path) -> None:
    inputs = {**llava_inputs(), "speech": torch.zeros(2, 4)}
    inputs.pop("pixel_values")
    with pytest.raises(UnsupportedError, match=r"reads text only, and the inputs have speech too. Omit --with-past"):
        export_model(llava(), tmp_path / "out", inputs=inputs, with_past=True)
