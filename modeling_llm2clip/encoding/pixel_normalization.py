"""Moves the last steps of an image processor, rescaling and normalization, to the model's device.

Pixels are copied as uint8, a quarter of the size of float32. This applies only if the device
reproduces the processor's output, which is checked on two images before the first batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..processing_llm2clip import LLM2CLIPProcessor

_PIXELS = "pixel_values"
_SIZES = ((61, 97), (640, 480))  # smaller and larger than the input of most towers, on both sides
# Rounding error of a few float32 operations on values up to about 3.
_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class PixelNormalization:
    """Last steps of an image processor, and the processor that stops before them.

    Attributes:
        processor: Prepares images as uint8.
        mean: (3, 1, 1) float32, on the scale of uint8 pixels.
        std: As `mean`.
        pins: Whether prepared images are put in pinned memory, from which they are copied to a GPU
            asynchronously.
    """

    processor: LLM2CLIPProcessor
    mean: Tensor
    std: Tensor
    pins: bool

    def prepare(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check the output of `processor` and pin its memory, in the thread that prepared it."""
        if inputs and inputs[_PIXELS].dtype != torch.uint8:
            raise ValueError(
                f"The image processor returns {inputs[_PIXELS].dtype} for these images, but uint8 "
                "for others. Pass images as files or PIL images."
            )
        return {name: value.pin_memory() if self.pins else value for name, value in inputs.items()}

    def apply(self, pixel_values: Tensor) -> Tensor:
        """Normalize uint8 pixels, (B, 3, H, W), on their device; return other dtypes unchanged."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        return pixel_values.float().sub_(self.mean).div_(self.std)


def find_normalization(
    processor: LLM2CLIPProcessor, device: torch.device
) -> PixelNormalization | None:
    """Find the last steps of an image processor, if `PixelNormalization` reproduces its output.

    Returns None if the processor resizes in float32, pads, cuts images into patches, or has its own
    method of rescaling and normalizing.
    """
    whole = processor.image_processor
    normalizes = getattr(whole, "do_normalize", False)
    if not getattr(whole, "do_rescale", False) or (normalizes and not whole.image_mean):
        return None
    stopping = copy(processor)
    stopping.image_processor = copy(whole)
    stopping.image_processor.do_rescale = stopping.image_processor.do_normalize = False
    moments = (whole.image_mean, whole.image_std) if normalizes else ([0.0] * 3, [1.0] * 3)
    mean, std = (torch.tensor(values) / whole.rescale_factor for values in moments)
    checked = PixelNormalization(stopping, mean.view(-1, 1, 1), std.view(-1, 1, 1), pins=False)
    if not all(_is_reproduced(processor, checked, size) for size in _SIZES):
        return None
    mean, std = checked.mean.to(device), checked.std.to(device)
    return PixelNormalization(stopping, mean, std, pins=device.type == "cuda")


def _is_reproduced(
    processor: LLM2CLIPProcessor, normalization: PixelNormalization, size: tuple[int, int]
) -> bool:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = dict(processor(images=[image]))
    try:
        inputs = dict(normalization.processor(images=[image]))
    except (TypeError, ValueError):  # such as EfficientNet's, whose next step accepts only floats
        return False
    pixels = inputs[_PIXELS]
    is_image = pixels.dtype == torch.uint8 and pixels.ndim == expected[_PIXELS].ndim == 4
    if not is_image or pixels.shape != expected[_PIXELS].shape or inputs.keys() != expected.keys():
        return False
    inputs[_PIXELS] = normalization.apply(pixels)
    return all(
        torch.allclose(inputs[name].double(), expected[name].double(), rtol=0, atol=_TOLERANCE)
        for name in inputs
    )
