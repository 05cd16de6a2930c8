"""Matryoshka representation learning (arXiv:2205.13147): embeddings that can be cut short."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loss import Loss, LossInputs


class MatryoshkaLoss(nn.Module):
    """Mean of a loss over all dimensions, and over the first ones alone.

    The paper weights all sizes alike, too; a mean keeps the scale of the loss.

    Args:
        loss: A loss of embeddings.
        dims: Numbers of first dimensions, each below that of the embeddings.
    """

    def __init__(self, loss: Loss, dims: Sequence[int]) -> None:
        super().__init__()
        self.loss = loss
        self.dims = tuple(dims)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"

    def forward(self, inputs: LossInputs) -> Tensor:
        """Compute the mean, () float32."""
        require_dims(self.dims, width=inputs.image_embeds.shape[1])
        losses = [self.loss(inputs), *(self.loss(_cut(inputs, size)) for size in self.dims)]
        return torch.stack(losses).mean()


def require_dims(dims: Sequence[int], *, width: float) -> None:
    """Refuse sizes that embeddings of a width cannot be cut to."""
    if too_wide := [size for size in dims if size >= width]:
        raise ValueError(
            f"matryoshka_dims {too_wide} must be below the model's projection_dim, {width}."
        )


def _cut(inputs: LossInputs, size: int) -> LossInputs:
    """Keep the first dimensions of the embeddings, at unit length."""
    return inputs._replace(
        image_embeds=F.normalize(inputs.image_embeds[:, :size], dim=-1),
        text_embeds=F.normalize(inputs.text_embeds[:, :size], dim=-1),
    )
