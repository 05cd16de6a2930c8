"""The sigmoid loss of SigLIP (arXiv:2303.15343, algorithm 1), without false negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pairs import Chunk, PairLoss


class SigmoidLoss(PairLoss):
    """Binary cross-entropy of each pair: whether this image and this text belong together.

    Every image is compared with the texts of all processes; the sum is divided by the number of
    images, as in the paper. The learned bias shifts all logits alike. It changes no ranking and no
    softmax, so that no model folder has it.

    Args:
        chunk_size: Images compared at a time; see `PairLoss`.
        logit_bias: Start of the bias, from which it is fitted with the temperature.
    """

    fitted_with_temperature = ("logit_bias",)

    def __init__(self, chunk_size: int | None = None, *, logit_bias: float = -10.0) -> None:
        super().__init__(chunk_size)
        self.logit_bias = nn.Parameter(torch.tensor([logit_bias]))

    def sum_rows(self, chunk: Chunk) -> Tensor:
        """Add up the losses of all pairs of the chunk's images."""
        logits = chunk.logits(chunk.image_rows, chunk.texts) + self.logit_bias  # (b, A)
        signs = torch.full_like(logits, -1.0).scatter_(1, chunk.labels[:, None], 1.0)
        return -F.logsigmoid(signs * logits).masked_fill(chunk.same, 0.0).sum()
