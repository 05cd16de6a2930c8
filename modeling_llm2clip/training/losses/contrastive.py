"""The contrastive loss of CLIP (arXiv:2103.00020, figure 3), without false negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import Chunk, PairLoss


class ContrastiveLoss(PairLoss):
    """Symmetric cross-entropy: each image chooses its text among all, and each text its image.

    If all groups and captions differ, it equals `heads_llm2clip.contrastive_loss`.
    """

    def sum_rows(self, chunk: Chunk) -> Tensor:
        """Add up the mean of both directions."""
        per_image = chunk.logits(chunk.image_rows, chunk.texts)  # (b, A)
        # If all rows are here, the other direction is the transpose and is not computed again.
        per_text = per_image.T if chunk.is_whole else chunk.logits(chunk.text_rows, chunk.images)
        losses = [
            F.cross_entropy(
                logits.masked_fill(chunk.same, -torch.inf), chunk.labels, reduction="sum"
            )
            for logits in (per_image, per_text)
        ]
        return (losses[0] + losses[1]) / 2
