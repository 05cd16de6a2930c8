"""The sigmoid loss of SigLIP (arXiv:2303.15343, algorithm 1), without false negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loss import LossInputs
from .pairs import Chunk, PairLoss

_LARGEST_BIAS = 128.0  # beyond that of any temperature, since logits are at most 100
_HALVINGS = 24


class SigmoidLoss(PairLoss):
    """Binary cross-entropy of each pair: whether this image and this text belong together.

    Every image is compared with the texts of all processes; the sum is divided by the number of
    images, as in the paper. The learned bias shifts all logits alike. It changes no ranking and no
    softmax, so that no model folder has it.

    Args:
        chunk_size: Images compared at a time; see `PairLoss`.
        logit_bias: Start of the bias; `fit` sets it where pairs are known.
    """

    def __init__(self, chunk_size: int | None = None, *, logit_bias: float = -10.0) -> None:
        super().__init__(chunk_size)
        self.logit_bias = nn.Parameter(torch.tensor([logit_bias]))

    def sum_rows(self, chunk: Chunk) -> Tensor:
        """Add up the losses of all pairs of the chunk's images."""
        logits = chunk.logits(chunk.image_rows, chunk.texts) + self.logit_bias  # (b, A)
        signs = torch.full_like(logits, -1.0).scatter_(1, chunk.labels[:, None], 1.0)
        return -F.logsigmoid(signs * logits).masked_fill(chunk.same, 0.0).sum()

    def fit(self, inputs: LossInputs) -> None:
        """Set the bias where the loss of some pairs is lowest, by bisection: the loss is convex.

        Args:
            inputs: The pairs, at their temperature.
        """
        inputs = inputs.to(self.logit_bias.device)
        low, high = -_LARGEST_BIAS, _LARGEST_BIAS
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            with torch.no_grad():
                self.logit_bias.fill_(middle)
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(self(inputs), self.logit_bias)
            low, high = (low, middle) if slope > 0 else (middle, high)
