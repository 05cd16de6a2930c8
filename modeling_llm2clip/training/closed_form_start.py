"""Starts both projections where a linear fit puts them, so that training begins half way.

Canonical correlation analysis of the stored vectors: the directions in which captions and pictures
agree most, found without a step of training. It takes a second for vectors of a thousand elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoding.devices import to_float64
from ..modeling_llm2clip import LLM2CLIPModel


@torch.no_grad()
def start_from_canonical_correlation(
    model: LLM2CLIPModel, caption_embeds: Tensor, vision_embeds: Tensor, *, shrinkage: float = 0.1
) -> None:
    """Set both projections in place; the adapter's blocks start as the identity.

    Args:
        model: its picture projection needs a bias, which takes the mean away.
        caption_embeds, vision_embeds: (N, D) and (N, D') float32; rows belong together.
        shrinkage: added to every variance, as a share of the mean one; keeps directions with
            hardly any variance from deciding.
    Raises: ValueError without `visual_projection_bias`, or for fewer pairs than two.
    """
    if model.visual_projection.bias is None:
        raise ValueError(
            "The start needs a bias in the picture projection. Build the model with "
            "visual_projection_bias=True."
        )
    if len(caption_embeds) != len(vision_embeds) or len(caption_embeds) < 2:
        raise ValueError(
            f"{len(caption_embeds)} captions and {len(vision_embeds)} pictures; correlation needs "
            "pairs, and two at least."
        )
    for block in model.text_adapter.blocks:
        block.down.weight.zero_()
    device = model.text_projection.weight.device
    text = to_float64(model.text_adapter(caption_embeds.to(device)))
    vision = to_float64(vision_embeds.to(device))
    text_weight, vision_weight = _correlate(
        text - text.mean(0), vision - vision.mean(0), model.config.projection_dim, shrinkage
    )
    for projection, weight, mean in (
        (model.text_projection, text_weight, text.mean(0)),
        (model.visual_projection, vision_weight, vision.mean(0)),
    ):
        projection.weight.zero_()  # where the space is wider than there are directions
        projection.weight[: len(weight)] = weight.to(projection.weight)
        projection.bias.zero_()
        projection.bias[: len(weight)] = -(weight @ mean).to(projection.bias)


def _correlate(
    text: Tensor, vision: Tensor, num_directions: int, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """Return the weights (directions, D) of both sides; each direction weighs as it correlates."""
    text_whitening = _whiten(text, shrinkage)
    vision_whitening = _whiten(vision, shrinkage)
    cross = text_whitening @ (text.T @ vision / len(text)) @ vision_whitening
    left, correlations, right = torch.linalg.svd(cross, full_matrices=False)
    weights = correlations[:num_directions]
    text_weight = (text_whitening @ left[:, :num_directions]) * weights
    vision_weight = (vision_whitening @ right[:num_directions].T) * weights
    return text_weight.T, vision_weight.T


def _whiten(centred: Tensor, shrinkage: float) -> Tensor:
    """Inverse square root of the shrunk covariance, (D, D)."""
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    variances = variances.clamp(min=0) + shrinkage * variances.mean()
    whitening: Tensor = directions @ torch.diag(variances.rsqrt()) @ directions.T
    return whitening
