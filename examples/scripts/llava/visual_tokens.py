"""The tokens of a vision tower that LLaVA's classes use."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

# LLaVA-1.5 reads the layer before the last (arXiv:2304.08485, section 4.1).
LLAVA_LAYER = -2


@dataclass(frozen=True)
class VisualTokens:
    """The part of a tower that an MLLM like LLaVA uses: the states of one layer, a token per patch.

    Attributes:
        patch_size: Side of a patch in pixels.
        num_patches: Patches of an image, in the size that the image processor makes.
        num_prefix_tokens: Tokens before the patches: 1 for CLS, more with registers, or none.
        width: Width of a token.
    """

    patch_size: int
    num_patches: int
    num_prefix_tokens: int
    width: int

    @property
    def select_strategy(self) -> str:
        """LLaVA's `vision_feature_select_strategy`: "default" drops CLS; without one, "full"."""
        return "default" if self.num_prefix_tokens else "full"

    @property
    def num_tokens(self) -> int:
        """Tokens of an image among those of the text."""
        return self.num_patches + self.num_prefix_tokens - (self.num_prefix_tokens > 0)


@torch.inference_mode()
def find_visual_tokens(
    tower: PreTrainedModel, image_processor: Any, *, layer: int = LLAVA_LAYER
) -> VisualTokens:
    """Run a blank image through a tower, and describe the tokens that LLaVA's classes would take.

    Args:
        tower: Vision tower.
        image_processor: Its image processor.
        layer: Layer of the hidden states, counted as `vision_feature_layer` is: from 1, or from the
            last, which is -1.

    Raises:
        ValueError: These classes cannot use the tower: it has no sequence of hidden states
            (convolutional networks, everything in timm's wrapper), needs more than `pixel_values`,
            or its tokens are not its patches; or there is no such layer.
    """
    name = type(tower).__name__
    extra = [
        parameter
        for parameter in inspect.signature(tower.forward).parameters
        if parameter in ("spatial_shapes", "pixel_attention_mask")
    ]
    if extra:
        raise ValueError(
            f"{name} needs {' and '.join(extra)}, which LLaVA's classes do not pass to a vision "
            "tower. Take a SigLIP2 of one fixed resolution (model type siglip) instead."
        )
    blank = Image.new("RGB", (224, 224))  # of any size: the image processor makes its own of it
    pixels = image_processor(images=[blank], return_tensors="pt")["pixel_values"]
    pixels = pixels.to(device=tower.device, dtype=tower.dtype)
    states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    shape = tuple(states[-1].shape) if states else None
    if shape is None or len(shape) != 3:
        raise ValueError(
            f"{name} gives hidden states of shape {shape}, and LLaVA's classes need tokens "
            "(B, L, D). A convolutional network or a tower in timm's wrapper has none: take CLIP, "
            "SigLIP, DINOv2, DINOv3 or ViT. timm's transformers fit PerceptionLM's classes."
        )
    _require_layer(name, layer, num_layers=len(states) - 1)  # the first of them are the embeddings
    _, num_tokens, width = states[layer].shape
    patch_size = tower.config.patch_size
    patch_size = patch_size if isinstance(patch_size, int) else patch_size[0]
    num_patches = (pixels.shape[-2] // patch_size) * (pixels.shape[-1] // patch_size)
    if num_tokens < num_patches or width != tower.config.hidden_size:
        raise ValueError(
            f"{name} gives {num_tokens} tokens of width {width} for {num_patches} patches and a "
            f"hidden_size of {tower.config.hidden_size}; LLaVA's classes need one token per patch, "
            "of that width. Take CLIP, SigLIP, DINOv2, DINOv3 or ViT."
        )
    return VisualTokens(patch_size, num_patches, num_tokens - num_patches, width)


def _require_layer(name: str, layer: int, *, num_layers: int) -> None:
    # transformers takes 0 for "no hidden states" and fails at the first image.
    if layer not in (*range(-num_layers, 0), *range(1, num_layers + 1)):
        raise ValueError(
            f"layer={layer}, and {name} has {num_layers} layers. Give 1 to {num_layers}, or "
            f"-{num_layers} to -1, counted from the last."
        )
