"""A timm network gets the images that timm itself would give it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_llm2clip.building.vision_towers import image_processor_from_timm

SETTINGS: dict[str, Any] = {
    "input_size": (3, 44, 44),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
}
FOLLOWED: dict[str, dict[str, Any]] = {
    "center, 48.9 rounded down": {"crop_pct": 0.9, "crop_mode": "center"},
    "center, all": {"crop_pct": 1.0, "input_size": (3, 48, 48)},
    "squash": {"crop_pct": 0.9, "crop_mode": "squash"},
    "squash, all": {"crop_pct": 1.0, "crop_mode": "squash"},
    "squash, not square": {"crop_pct": 1.0, "crop_mode": "squash", "input_size": (3, 24, 40)},
    "bilinear": {"crop_pct": 0.9, "interpolation": "bilinear"},
}


def draw(height: int, width: int) -> Image.Image:
    """A smooth image without symmetry, in which a shift of one pixel moves the numbers."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def require_timms_images(pretrained_cfg: dict[str, Any]) -> None:
    from timm.data import create_transform, resolve_data_config

    settings = resolve_data_config(pretrained_cfg=pretrained_cfg)
    transform = create_transform(**settings, is_training=False)
    processor = image_processor_from_timm(pretrained_cfg)
    # Sides that leave an even rest to cut off: of an odd one timm takes a pixel on another side.
    for image in (draw(96, 120), draw(120, 96)):
        wanted = transform(image)
        found = processor(image, return_tensors="pt")["pixel_values"][0]
        assert found.shape == wanted.shape
        # torchvision rounds between the two passes of a resize, Pillow to finer steps: two of 255.
        two_steps = 2 / 255 / min(pretrained_cfg["std"]) + 1e-6
        torch.testing.assert_close(found, wanted, atol=two_steps, rtol=0)


@pytest.mark.parametrize("name", FOLLOWED)
def test_images_are_those_of_timms_own_transform(name: str) -> None:
    pytest.importorskip("timm")
    require_timms_images({**SETTINGS, **FOLLOWED[name]})


def test_a_published_network_that_squashes_gets_the_whole_image() -> None:
    timm = pytest.importorskip("timm")
    published = timm.get_pretrained_cfg("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k")
    assert published.crop_mode == "squash"
    require_timms_images(published.to_dict())
    assert image_processor_from_timm(published.to_dict()).size == {"height": 448, "width": 448}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_mode": "border"}, r"crop_mode='border' must be one of \('center', 'squash'\)"),
        ({"input_size": (3, 24, 40)}, "needs a square input, not 24 × 40"),
        ({"interpolation": "random"}, "interpolation='random' must be one of"),
    ],
)
def test_settings_that_no_image_processor_follows_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        image_processor_from_timm({**SETTINGS, **settings})
