"""Tests from the outside whether a vision tower gives a picture the same vector each time."""

from __future__ import annotations

import torch

from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .golden import draw_golden_pictures

# Equal runs may add up in another order; what is drawn at random moves far more.
_MOST_DIFFERENCE = 0.02


@torch.inference_mode()
def require_repeatable(model: LLM2CLIPModel, processor: LLM2CLIPProcessor) -> None:
    """Raise ValueError when a second run over a picture gives another vector.

    Masked autoencoders, for one, hide patches at random when they encode too.
    """
    inputs = processor(images=draw_golden_pictures()[:1]).to(model.device)
    first, second = (model.get_image_features(**inputs).pooler_output for _ in range(2))
    assert first is not None and second is not None
    difference = float((first - second).norm() / first.norm())
    if not difference <= _MOST_DIFFERENCE:
        raise ValueError(
            f"The {model.config.vision_config.model_type!r} tower gives one picture another vector "
            f"each time (they differ by {difference:.0%}): it draws at random when it encodes, or "
            "gives no numbers at all. Take another vision tower."
        )
