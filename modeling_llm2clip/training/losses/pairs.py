"""CLIP's and SigLIP's losses, which compare all images and texts of all processes, in chunks.

Shapes: B rows of one process, A rows of all processes, P dimensions of the shared space.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...heads_llm2clip import LogitRule
from .loss import LossInputs, gather_ids, gather_rows, iterate_chunks


class Chunk(NamedTuple):
    """A chunk of b rows, out of a process's B rows, and all A rows to compare the chunk with.

    Attributes:
        image_rows: (b, P) float32, images of the chunk.
        text_rows: (b, P) float32, texts of the chunk.
        images: (A, P) float32, images of all processes.
        texts: (A, P) float32, texts of all processes.
        logits: Computes logits from image and text embeddings.
        labels: (b,) int64, index of each row among all A rows.
        same: (b, A) bool, True for other rows that are not negatives because they have the same
            group or an equal caption.
    """

    image_rows: Tensor
    text_rows: Tensor
    images: Tensor
    texts: Tensor
    logits: LogitRule
    labels: Tensor
    same: Tensor

    @property
    def is_whole(self) -> bool:
        """True if the chunk contains all rows."""
        return len(self.image_rows) == len(self.images)


class PairLoss(nn.Module):
    """Base class of losses that compare each image with each text, without false negatives.

    Rows of the same group are not negatives, because two images of one thing would otherwise push
    away each other's caption. Rows with equal captions are not negatives either, because the
    caption describes both images.

    Each process compares its own rows with the rows of all processes, gathered with their
    gradients. Distributed training averages loss and gradients over the processes, which gives
    exactly the result of one process with the whole batch.

    Args:
        chunk_size: Number of rows to compare at a time. Logits are recomputed in the backward pass,
            so memory holds (chunk, A) logits, never (B, A), with the same loss and gradients. None
            compares all rows at once or, if gradients are disabled, a few hundred at a time.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"

    def sum_rows(self, chunk: Chunk) -> Tensor:
        """Sum the loss of a chunk's rows compared with all rows, () float32."""
        raise NotImplementedError

    def forward(self, inputs: LossInputs) -> Tensor:
        """Compute the mean over this process's rows, () float32."""
        ids = _list_ids(inputs)
        image_embeds, text_embeds = inputs.image_embeds.float(), inputs.text_embeds.float()
        (images, texts), first = gather_rows(inputs, image_embeds, text_embeds)
        all_ids, num_rows = gather_ids(inputs, ids), len(ids)
        total = torch.zeros((), device=image_embeds.device)
        for rows in iterate_chunks(num_rows, self.chunk_size):
            arguments = (
                image_embeds[rows], text_embeds[rows], images, texts, inputs.logits,
                ids[rows], all_ids, first + rows.start,
            )  # fmt: skip
            if rows.stop - rows.start < num_rows:
                total = total + checkpoint(self._sum_rows, *arguments, use_reentrant=False)
            else:
                total = total + self._sum_rows(*arguments)
        return total / num_rows

    def _sum_rows(
        self,
        image_rows: Tensor,
        text_rows: Tensor,
        images: Tensor,
        texts: Tensor,
        logits: LogitRule,
        ids: Tensor,
        all_ids: Tensor,
        first: int,
    ) -> Tensor:
        """Sum the loss of a chunk with ids (b, columns), whose first row has index `first`."""
        labels = torch.arange(first, first + len(ids), device=ids.device)
        same = torch.zeros(len(ids), len(all_ids), dtype=torch.bool, device=ids.device)
        for column in range(ids.shape[1]):
            same |= ids[:, None, column] == all_ids[None, :, column]
        same[torch.arange(len(ids), device=ids.device), labels] = False
        return self.sum_rows(Chunk(image_rows, text_rows, images, texts, logits, labels, same))


def _list_ids(inputs: LossInputs) -> Tensor:
    """Return row ids, (B, 1 or 2) int64; rows that share an id in any column are not negatives."""
    columns = (
        [inputs.group_ids] if inputs.text_keys is None else [inputs.group_ids, inputs.text_keys]
    )
    image_embeds, text_embeds = inputs.image_embeds, inputs.text_embeds
    if image_embeds.shape != text_embeds.shape or {*map(len, columns)} != {len(image_embeds)}:
        raise ValueError(
            f"image_embeds {tuple(image_embeds.shape)}, text_embeds {tuple(text_embeds.shape)}, "
            f"group_ids and text_keys {[tuple(column.shape) for column in columns]} must have the "
            "same number of rows."
        )
    return torch.stack(columns, dim=1)


class ContrastiveLoss(PairLoss):
    """CLIP's loss: cross-entropy over texts for each image, and over images for each text.

    See arXiv:2103.00020, figure 3; here, false negatives are excluded. If all groups and captions
    differ, the loss equals `heads_llm2clip.contrastive_loss`.
    """

    def sum_rows(self, chunk: Chunk) -> Tensor:
        """Sum the loss over the rows, averaged over both directions."""
        per_image = chunk.logits(chunk.image_rows, chunk.texts)  # (b, A)
        # If the chunk has all rows, the transpose gives the other direction for free.
        per_text = per_image.T if chunk.is_whole else chunk.logits(chunk.text_rows, chunk.images)
        losses = [
            F.cross_entropy(
                logits.masked_fill(chunk.same, -torch.inf), chunk.labels, reduction="sum"
            )
            for logits in (per_image, per_text)
        ]
        return (losses[0] + losses[1]) / 2


class SigmoidLoss(PairLoss):
    """SigLIP's loss: binary cross-entropy for whether each image and text belong together.

    See arXiv:2303.15343, algorithm 1; here, false negatives are excluded.

    Every image is compared with the texts of all processes. As in the paper, the sum is divided by
    the number of images. The learned bias shifts all logits equally. The bias affects neither
    ranking nor softmax, so model folders do not include it.

    Args:
        chunk_size: Number of images to compare at a time; see `PairLoss`.
        logit_bias: Initial bias, which is then fitted together with the temperature.
    """

    fitted_with_temperature = ("logit_bias",)

    def __init__(self, chunk_size: int | None = None, *, logit_bias: float = -10.0) -> None:
        super().__init__(chunk_size)
        self.logit_bias = nn.Parameter(torch.tensor([logit_bias]))

    def sum_rows(self, chunk: Chunk) -> Tensor:
        """Sum the losses of all pairs of the chunk's images."""
        logits = chunk.logits(chunk.image_rows, chunk.texts) + self.logit_bias  # (b, A)
        signs = torch.full_like(logits, -1.0).scatter_(1, chunk.labels[:, None], 1.0)
        return -F.logsigmoid(signs * logits).masked_fill(chunk.same, 0.0).sum()
