"""Laws of images that are copied as bytes, and normalized where the model computes."""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import tiny_model

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.encoding.batches import PreparedImages, prepare_images
from modeling_llm2clip.encoding.encode import TorchEncoder
from modeling_llm2clip.encoding.pixel_normalization import find_normalization
from modeling_llm2clip.image_cropping_llm2clip import (
    LLM2CLIPImageProcessor,
    LLM2CLIPImageProcessorPil,
)

CPU = torch.device("cpu")
_OWN: dict[str, Any] = {
    "LLM2CLIPImageProcessor": LLM2CLIPImageProcessor,
    "LLM2CLIPImageProcessorPil": LLM2CLIPImageProcessorPil,
}
_EXACT = (
    *_OWN, "CLIPImageProcessor", "CLIPImageProcessorPil", "SiglipImageProcessor",
    "SiglipImageProcessorPil", "BitImageProcessor", "ViTImageProcessor", "BlipImageProcessor",
    "ConvNextImageProcessor", "ChineseCLIPImageProcessor",
)  # fmt: skip
# They resize floats, cut patches, or normalize twice.
_OTHERS = (
    "DINOv3ViTImageProcessor", "Siglip2ImageProcessor", "Siglip2ImageProcessorPil",
    "EfficientNetImageProcessor", "EfficientNetImageProcessorPil",
)  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    return tiny_model()


def with_image_processor(processor: LLM2CLIPProcessor, name: str, **options: Any) -> Any:
    changed = copy(processor)
    kind = _OWN.get(name) or getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    changed.image_processor = kind(**options)
    return changed


def make_images() -> list[Image.Image]:
    """Smooth, of noise, black and white ones, in sizes that no other part of the code knows."""
    random = np.random.default_rng(1)
    ramp = np.linspace(0, 255, 173 * 251 * 3).reshape(173, 251, 3).astype(np.uint8)
    noise = random.integers(0, 256, (301, 119, 3), dtype=np.uint8)
    return [
        *map(Image.fromarray, (ramp, noise)),
        Image.new("RGB", (230, 225)),
        Image.new("RGB", (500, 90), "white"),
    ]


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize("name", _EXACT)
def test_normalized_pixels_are_those_of_the_processor(
    pair: Any, name: str, normalizes: bool
) -> None:
    options = {} if normalizes else {"do_normalize": False}
    processor = with_image_processor(pair[1], name, **options)
    normalization = find_normalization(processor, CPU)
    assert normalization is not None
    for image in make_images():
        stopped = normalization.processor(images=[image])["pixel_values"]
        expected = processor(images=[image])["pixel_values"]
        assert stopped.dtype == torch.uint8 and expected.dtype == torch.float32
        # The same operations, of Pillow's and torchvision's classes in another order.
        torch.testing.assert_close(normalization.apply(stopped), expected, rtol=0, atol=1e-6)
        assert torch.equal(normalization.apply(expected), expected)


def test_prepared_pixels_are_pinned_for_a_gpu_and_are_bytes(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = find_normalization(pair[1], CPU)
    assert plain is not None and not plain.pins
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    inputs = {"pixel_values": torch.zeros(1, 3, 2, 2, dtype=torch.uint8)}
    for pins in (False, True):
        prepared = replace(plain, pins=pins).prepare(inputs)["pixel_values"]
        assert (prepared == pins).all()
    with pytest.raises(ValueError, match=r"returns torch.float32 for these images, but uint8"):
        plain.prepare({"pixel_values": torch.zeros(1, 3, 2, 2)})


def test_last_steps_that_are_others_in_one_size_by_little_are_not_taken(pair: Any) -> None:
    changed = copy(pair[1])
    kind: Any = type(changed.image_processor)

    class Near(kind):  # type: ignore[misc]
        def preprocess(self, images: Any, *args: Any, **options: Any) -> Any:
            prepared = super().preprocess(images, *args, **options)
            if self.do_rescale and max(images[0].size) > 200:
                prepared["pixel_values"] = prepared["pixel_values"] + 1e-5
            return prepared

    changed.image_processor = copy(changed.image_processor)
    assert find_normalization(changed, CPU) is not None
    changed.image_processor.__class__ = Near
    assert find_normalization(changed, CPU) is None


def test_images_beside_one_that_a_processor_refuses_are_bytes_too(pair: Any) -> None:
    changed = copy(pair[1])
    kind: Any = type(changed.image_processor)

    class Refusing(kind):  # type: ignore[misc]
        def preprocess(self, images: Any, *args: Any, **options: Any) -> Any:
            if any(image.width > 400 for image in images):
                raise ValueError("too wide")
            return super().preprocess(images, *args, **options)

    changed.image_processor = copy(changed.image_processor)
    changed.image_processor.__class__ = Refusing
    normalization = find_normalization(pair[1], CPU)
    assert normalization is not None
    normalization.processor.image_processor.__class__ = Refusing
    prepared = prepare_images(
        changed, make_images(), on_error=lambda _, error: str(error), normalization=normalization
    )
    assert (prepared.places, prepared.errors) == ([0, 1, 2], {3: "too wide"})
    assert prepared.inputs["pixel_values"].dtype == torch.uint8


@pytest.mark.parametrize("name", _OTHERS)
def test_other_processors_run_to_their_end(pair: Any, name: str) -> None:
    assert find_normalization(with_image_processor(pair[1], name), CPU) is None


def test_an_encoder_gives_the_same_embeddings_from_bytes(pair: Any, tmp_path: Any) -> None:
    model, processor = pair
    plain, encoder = TorchEncoder(model, processor), TorchEncoder(model, processor)
    assert plain.normalization is None  # on a CPU nothing is copied
    elsewhere = TorchEncoder(deepcopy(model).to("meta"), processor).normalization
    assert elsewhere is not None and elsewhere.mean.is_meta
    encoder.normalization = find_normalization(processor, CPU)
    images = make_images()
    prepared, expected = encoder.prepare_images(images), plain.prepare_images(images)
    sizes = [part.inputs["pixel_values"].nbytes for part in (prepared, expected)]
    assert 4 * sizes[0] == sizes[1]
    embeds = plain.encode_images(images)
    torch.testing.assert_close(encoder.encode_images(images), embeds, rtol=0, atol=1e-5)
    (tmp_path / "broken.png").write_bytes(b"no image")
    errors = [
        [batch.errors for batch in which.iterate_images(
            [tmp_path / "broken.png", images[0]], [[0], [1]], on_error=lambda _, e: str(e)
        )]
        for which in (encoder, plain)
    ]  # fmt: skip
    assert errors[0] == errors[1] and list(errors[0][0]) == [0]
    assert isinstance(prepared, PreparedImages) and processor.image_processor.do_rescale


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_are_taken_or_refused_alike(pair: Any, dtype: Any) -> None:
    """Pixels of unknown range are refused before either way of preparing images."""
    pixels = np.random.default_rng(2).integers(0, 256, (50, 60, 3)).astype(dtype)
    encoders = [TorchEncoder(*pair), TorchEncoder(*pair)]
    encoders[1].normalization = find_normalization(pair[1], CPU)
    if dtype == np.float32:
        for encoder in encoders:
            with pytest.raises(ValueError, match="float32 pixels, whose range is unknown"):
                encoder.encode_images([pixels])
    else:
        plain, normalized = (encoder.encode_images([pixels]) for encoder in encoders)
        torch.testing.assert_close(normalized, plain, rtol=0, atol=1e-5)
