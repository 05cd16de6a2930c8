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
from shared_models import fresh_processor, shared_model
from tiny import draw_noise
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    CLIPImageProcessor,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.building.vision_towers import image_processor_from_timm
from modeling_llm2clip.conversion.convert_checkpoint import make_image_processor
from modeling_llm2clip.conversion.layouts import LAYOUTS
from modeling_llm2clip.image_cropping_llm2clip import (
    LLM2CLIPImageProcessor,
    LLM2CLIPImageProcessorPil,
)
from modeling_llm2clip.publishing.onnx_export import _write_image_settings

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


def make_converted(kind: str, side: int = SIDE) -> LLM2CLIPProcessor:
    converted = make_image_processor(LAYOUTS["openai"].source_format, side)
    settings = {**converted.to_dict(), "do_normalize": False, "do_rescale": False}
    classes = {"torchvision": LLM2CLIPImageProcessor, "pillow": LLM2CLIPImageProcessorPil}
    return LLM2CLIPProcessor(classes[kind].from_dict(settings), fresh_processor().tokenizer)


def read_pixels(processor: Any, image: Image.Image) -> np.ndarray[Any, Any]:
    pixels: np.ndarray[Any, Any] = processor(images=image)["pixel_values"][0].numpy()
    return pixels.astype(int)


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_converted("torchvision").save_pretrained(tmp_path)
    return tmp_path


def test_every_loader_of_a_folder_crops_like_torchvision(folder: Path) -> None:
    image = draw_noise(SIDE, SIDE + 3)
    wanted = transform_officially(image)
    processor = AutoProcessor.from_pretrained(folder)
    again = pickle.loads(pickle.dumps(processor.image_processor))
    loaded = [AutoImageProcessor.from_pretrained(folder, backend=b) for b in ("torchvision", "pil")]
    for one in (processor, again, *loaded):
        pixels = one(images=image, return_tensors="pt")["pixel_values"][0].numpy()
        assert np.array_equal(pixels.astype(int), wanted)


def test_a_program_that_lacks_the_code_refuses_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own class would crop otherwise without a word."""
    monkeypatch.setattr(IMAGE_PROCESSOR_MAPPING, "_extra_content", {})  # as if never registered
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def test_a_processor_that_would_ignore_the_crop_is_refused(folder: Path) -> None:
    """Only `encode.py` of an ONNX folder reads the file; without the other one, all loaders do."""
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    _write_image_settings(processor, folder)
    (folder / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="would ignore crop_rounding='torchvision'"):
        LLM2CLIPProcessor(
            AutoImageProcessor.from_pretrained(folder), processor.tokenizer, max_text_length=32
        )


def test_the_class_is_the_default_of_no_configuration(folder: Path) -> None:
    """A folder whose class got lost is still refused, not cropped by guess."""
    shared_model()[0].config.save_pretrained(folder)
    file = folder / "processor_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["image_processor"]["image_processor_type"], content["image_processor"]["auto_map"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="Unrecognized image processor"):
        AutoImageProcessor.from_pretrained(folder)


def test_timm_networks_without_a_crop_get_a_class_that_every_program_knows() -> None:
    settings = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    made = {
        (mode, share): image_processor_from_timm({**settings, "crop_mode": mode, "crop_pct": share})
        for mode in ("center", "squash")
        for share in (0.9, 1.0)
    }
    plain = [key for key, one in made.items() if type(one) is CLIPImageProcessor]
    assert plain == [("squash", 1.0)]


def test_the_script_without_torch_crops_equally(tmp_path: Path) -> None:
    encode_onnx = pytest.importorskip("modeling_llm2clip.encoding.encode_onnx")
    processor = make_converted("torchvision")
    _write_image_settings(processor, tmp_path)
    how = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert how["image_processor_type"] == "CLIPImageProcessor"  # which transformers.js knows
    for margin in range(8):
        image = draw_noise(SIDE, SIDE + margin)
        found = encode_onnx.prepare_image(
            image, {**how, "image_mean": [0.0] * 3, "image_std": [1 / 255] * 3}
        )
        assert np.array_equal(found.round().astype(int), transform_officially(image))


def test_every_source_format_gets_the_crop() -> None:
    siglip2 = replace(LAYOUTS["siglip2"].source_format, preprocessing="half")
    for source_format in (
        LAYOUTS["openai-hub"].source_format,
        LAYOUTS["eva02"].source_format,
        siglip2,
    ):
        assert type(make_image_processor(source_format, 32)) is LLM2CLIPImageProcessor
