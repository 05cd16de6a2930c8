"""The images of converted models are those of the official transforms, at every size."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shared_models import fresh_processor
from tiny import draw_noise
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    SiglipImageProcessor,
)

from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.configs.source_format import SOURCE_FORMATS
from modeling_llm2clip.conversion.conversion_plan import make_image_processor

SIDE = 56  # a quarter of 224, so that a test takes little time
# Width and height of photographs; 640 x 427 is the commonest size of COCO. Then odd ones.
SIZES = [
    (640, 427), (427, 640), (640, 480), (480, 640), (500, 333), (333, 500), (500, 375), (612, 612),
    (1024, 683), (57, 56), (56, 59), (59, 56), (60, 59), (55, 63), (31, 47), (56, 163), (99, 101),
]  # fmt: skip


def transform_officially(image: Image.Image, side: int = SIDE) -> np.ndarray[Any, Any]:
    """Pixels by the transform that CLIP, EVA and open_clip evaluate with."""
    steps = [Resize(side, InterpolationMode.BICUBIC), CenterCrop(side), PILToTensor()]
    found: torch.Tensor = Compose(steps)(image)
    return found.numpy().astype(int)


def make_processor(image_processor: Any) -> LLM2CLIPProcessor:
    return LLM2CLIPProcessor(image_processor, fresh_processor().tokenizer)


def make_converted(kind: str, side: int = SIDE) -> LLM2CLIPProcessor:
    converted = make_image_processor(SOURCE_FORMATS["openai"], side)
    settings = {**converted.to_dict(), "do_normalize": False, "do_rescale": False}
    classes = {"torchvision": CLIPImageProcessor, "pillow": CLIPImageProcessorPil}
    return make_processor(classes[kind].from_dict(settings))


def read_pixels(processor: Any, image: Image.Image) -> np.ndarray[Any, Any]:
    pixels: np.ndarray[Any, Any] = processor(images=image)["pixel_values"][0].numpy()
    return pixels.astype(int)


@pytest.mark.parametrize("kind", ["torchvision", "pillow"])
@pytest.mark.parametrize("margin", range(12))
@pytest.mark.parametrize("is_wide", [False, True])
def test_the_crop_of_every_margin_is_torchvisions(margin: int, is_wide: bool, kind: str) -> None:
    """To the bit: nothing is resized, as the shorter side has the size."""
    height, width = (SIDE, SIDE + margin) if is_wide else (SIDE + margin, SIDE)
    image = draw_noise(height, width)
    found = read_pixels(make_converted(kind), image)
    assert np.array_equal(found, transform_officially(image))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_converted_models_are_those_of_the_official_transform(
    size: tuple[int, int],
) -> None:
    """With Pillow to the bit, which the official transform resizes with.

    torchvision rounds to 8 bits between the two passes of a resize, Pillow does not: two gray
    levels at most. A shift of one pixel changes noise by over 100.
    """
    image = draw_noise(size[1], size[0])
    wanted = transform_officially(image)
    assert np.array_equal(read_pixels(make_converted("pillow"), image), wanted)
    difference = np.abs(read_pixels(make_converted("torchvision"), image) - wanted)
    assert difference.max() <= 2 and difference.mean() < 0.5


@pytest.mark.parametrize("size", [(640, 427), (500, 333), (333, 500), (227, 224)], ids=str)
def test_images_at_the_official_size_are_those_of_open_clip(size: tuple[int, int]) -> None:
    open_clip = pytest.importorskip("open_clip")
    image = draw_noise(size[1], size[0])
    transform = open_clip.image_transform(
        224, is_train=False, interpolation="bicubic", resize_mode="shortest",
        mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    wanted = (transform(image) * 255).round().numpy().astype(int)
    assert np.array_equal(wanted, transform_officially(image, 224))
    found = read_pixels(make_converted("torchvision", 224), image)
    assert np.abs(found - wanted).max() <= 2


def test_the_crop_is_saved_loaded_and_pickled(tmp_path: Path) -> None:
    image = draw_noise(SIDE, SIDE + 3)
    processor = make_converted("torchvision")
    wanted = transform_officially(image)
    processor.save_pretrained(tmp_path)
    loaded = LLM2CLIPProcessor.from_pretrained(tmp_path)
    again = pickle.loads(pickle.dumps(loaded.image_processor))
    for one in (loaded, make_processor(again)):
        assert np.array_equal(read_pixels(one, image), wanted)
    saved = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    assert saved["image_processor_type"] == "CLIPImageProcessor"  # which every program knows
    assert saved["crop_rounding"] == "torchvision"
    assert "AutoImageProcessor" not in saved["auto_map"]
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CLIPImageProcessor


def test_an_image_processor_without_the_setting_stays_as_it_is() -> None:
    own = CLIPImageProcessor()
    assert make_processor(own).image_processor is own


@pytest.mark.parametrize(
    ("image_processor", "message"),
    [
        (SiglipImageProcessor(crop_rounding="torchvision"), "A SiglipImageProcessor cannot have"),
        (CLIPImageProcessor(crop_rounding="up"), "crop_rounding='up'"),
    ],
)
def test_a_rounding_that_cannot_be_is_refused(image_processor: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_processor(image_processor)


def test_the_script_without_torch_crops_alike() -> None:
    encode_onnx = pytest.importorskip("modeling_llm2clip.encoding.encode_onnx")
    how = make_image_processor(SOURCE_FORMATS["openai"], SIDE).to_dict()
    for margin in range(8):
        image = draw_noise(SIDE, SIDE + margin)
        found = encode_onnx.prepare_image(
            image, {**how, "image_mean": [0.0] * 3, "image_std": [1 / 255] * 3}
        )
        assert np.array_equal(found.round().astype(int), transform_officially(image))


def test_the_setting_is_part_of_what_a_source_format_gives() -> None:
    siglip2 = replace(SOURCE_FORMATS["siglip2"], preprocessing="half")
    for source_format in (SOURCE_FORMATS["openai-hub"], SOURCE_FORMATS["eva02"], siglip2):
        assert make_image_processor(source_format, 32).to_dict()["crop_rounding"] == "torchvision"
