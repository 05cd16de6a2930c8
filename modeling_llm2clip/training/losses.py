"""Contrastive losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def keyed_contrastive_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, keys: Tensor
) -> Tensor:
    """Symmetric cross-entropy in which rows with the same key are never each other's negatives.

    Two pictures of one thing in one batch would otherwise push their own caption away.

    Args:
        image_embeds, text_embeds: (B, P) float32, unit length; row i belongs to row i.
        logit_scale: (1,) float32, the inverse temperature.
        keys: (B,) int64, what each row shows.
    Returns: () float32; equal to `modeling_llm2clip.contrastive_loss` when all keys differ.
    Raises: ValueError when the shapes differ.
    """
    if image_embeds.shape != text_embeds.shape or len(keys) != len(image_embeds):
        raise ValueError(
            f"image_embeds {tuple(image_embeds.shape)}, text_embeds {tuple(text_embeds.shape)} "
            f"and keys {tuple(keys.shape)} must pair row by row."
        )
    logits = logit_scale * image_embeds @ text_embeds.T  # (B, B)
    own = torch.eye(len(keys), dtype=torch.bool, device=logits.device)
    same = (keys[:, None] == keys[None, :]) & ~own
    logits = logits.masked_fill(same, -torch.inf)
    labels = torch.arange(len(keys), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
