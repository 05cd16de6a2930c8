"""STRUCTURE (arXiv:2506.16895): projected embeddings keep the neighbors that their towers gave."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gathering import gather_rows
from .loss import LossInputs

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
        rows = slice(first, first + len(inputs.image_embeds))
        image, projected_image, text, projected_text = (
            _list_neighbors(embeds, rows) for embeds in gathered
        )
        return (_diverge(image, projected_image) + _diverge(text, projected_text)) / 2


def _list_neighbors(embeds: Tensor, rows: slice) -> Tensor:
    """Return the logarithm of some rows' neighborhoods among all, (B, A)."""
    centered = embeds - embeds.mean(dim=0)
    return F.log_softmax(centered[rows] @ centered.T / _TEMPERATURE, dim=-1)


def _diverge(one: Tensor, other: Tensor) -> Tensor:
    """Compute the mean divergence of rows of log-probabilities, ()."""
    middle = torch.logaddexp(one, other) - math.log(2)
    of_rows = (one.exp() * (one - middle) + other.exp() * (other - middle)).sum(dim=-1)
    return of_rows.mean() / 2
