"""STRUCTURE (arXiv:2506.16895): projected embeddings keep the neighbors that their towers gave."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loss import LossInputs, gather_rows, iterate_chunks

_TEMPERATURE = 0.07


class StructureLoss(nn.Module):
    """Jensen-Shannon divergence of the neighborhoods before and after the projections.

    The neighborhood of a row is the softmax of its similarities with the batch of all processes,
    after the mean is subtracted from embeddings of unit length; the loss is the mean of both sides.
    It is the first level of the paper's sum, as in the authors' settings (temperature 0.07). Their
    code computes the divergence with its arguments swapped; this one is that of the paper, between
    0 and ln 2.
    """

    def forward(self, inputs: LossInputs) -> Tensor:
        """Compute the mean over this process's rows, () float32."""
        assert inputs.vision_embeds is not None and inputs.caption_embeds is not None
        sides = (
            inputs.vision_embeds, inputs.image_embeds, inputs.caption_embeds, inputs.text_embeds,
        )  # fmt: skip
        gathered, first = gather_rows(inputs, *(F.normalize(side, dim=-1) for side in sides))
        centered = [embeds - embeds.mean(dim=0) for embeds in gathered]
        num_rows = len(inputs.image_embeds)
        total = torch.zeros((), device=inputs.image_embeds.device)
        for chunk in iterate_chunks(num_rows):
            rows = slice(first + chunk.start, first + chunk.stop)
            image, projected_image, text, projected_text = (
                F.log_softmax(side[rows] @ side.T / _TEMPERATURE, dim=-1) for side in centered
            )
            total = total + _sum_divergences(image, projected_image)
            total = total + _sum_divergences(text, projected_text)
        return total / (2 * num_rows)


def _sum_divergences(before: Tensor, after: Tensor) -> Tensor:
    """Add up the divergences of rows of log-probabilities, (b, A) each, to ()."""
    middle = torch.logaddexp(before, after) - math.log(2)
    return (before.exp() * (before - middle) + after.exp() * (after - middle)).sum() / 2
