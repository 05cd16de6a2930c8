"""Tests from the outside whether a vision tower gives an image the same embedding each time."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from ..model_folders.golden_embeddings import render_golden_images
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor

# Equal runs may add up in another order; what is drawn at random moves far more.
_MOST_DIFFERENCE = 0.02


# What a model hands to a tower.
_GIVEN = {"self", "pixel_values", "pixel_attention_mask", "spatial_shapes"}
# What a tower raises that takes images in another form.
_TOWER_ERRORS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError)


def require_pixels_alone(vision_model: PreTrainedModel) -> None:
    """Raise ValueError for a tower that needs more than pixels, as those inside some MLLMs do."""
    parameters = inspect.signature(vision_model.forward).parameters.values()
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in _GIVEN
    ]
    if needed:
        raise ValueError(
            f"The {vision_model.config.model_type!r} tower needs {' and '.join(needed)}, which its "
            "MLLM computes for it, and gives no embedding of the whole image. LLM2CLIP gives a "
            "tower pixel_values alone. Take CLIP, SigLIP, SigLIP2, DINOv2, DINOv3, ViT or a timm "
            "network."
        )


@torch.inference_mode()
def require_deterministic(model: LLM2CLIPModel, processor: LLM2CLIPProcessor) -> None:
    """Raise ValueError when a second run over an image gives another embedding.

    Masked autoencoders, for one, hide patches at random when they encode too.
    """
    inputs = processor(images=render_golden_images()[:1]).to(model.device)
    try:
        first, second = (model.get_image_features(**inputs).pooler_output for _ in range(2))
    except _TOWER_ERRORS as error:
        raise ValueError(
            f"The {model.config.vision_config.model_type!r} tower cannot be used as it is built "
            f"here: its forward pass fails ({type(error).__name__}: {error}). Choose another "
            "vision pooling, or take another vision tower."
        ) from error
    assert first is not None and second is not None
    difference = float((first - second).norm() / first.norm())
    if not difference <= _MOST_DIFFERENCE:
        raise ValueError(
            f"The {model.config.vision_config.model_type!r} tower gives one image another "
            "embedding "
            f"each time (they differ by {difference:.0%}): it draws at random when it encodes, or "
            "gives no numbers at all. Take another vision tower."
        )
