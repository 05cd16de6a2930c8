"""Losses that compare every image with every text of all processes, in chunks: CLIP's and SigLIP's.

B rows of one process, A rows of all processes, P width of the shared space.
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
    """Some rows of a process, b of its B, and those of all processes, with which they are compared.

    Attributes:
        image_rows: (b, P) float32, images of the rows.
        text_rows: (b, P) float32, their texts.
        images: (A, P) float32, those of all processes.
        texts: (A, P) float32, those of all processes.
        logits: Turns embeddings of images and texts into logits.
        labels: (b,) int64, number of each row among all.
        same: (b, A) bool, pairs of other rows that are no negatives: of one group, or of equal
            captions.
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
        """True if the rows are all that there are."""
        return len(self.image_rows) == len(self.images)


class PairLoss(nn.Module):
    """Base of losses that compare each image with each text, without false negatives.

    These are rows of one group, where two images of one thing would push each other's caption away,
    and rows of equal captions, which describe both images.

    Of several processes each compares its own rows with those of all, and embeddings are gathered
    with their gradients. The mean over the processes of loss and gradients, which distributed
    training takes, is then exactly that of one process with the whole batch.

    Args:
        chunk_size: Rows compared at a time, and computed again in the backward pass, so that
            memory holds (chunk, A) numbers, never (B, A); the same loss and gradients. None
            compares all at once, but some hundred at a time where no gradient is wanted.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"

    def sum_rows(self, chunk: Chunk) -> Tensor:
        """Add up the loss of a chunk's rows against all, () float32."""
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
        """Add up a chunk whose first row is number `first` of all, and its ids (b, columns)."""
        labels = torch.arange(first, first + len(ids), device=ids.device)
        same = torch.zeros(len(ids), len(all_ids), dtype=torch.bool, device=ids.device)
        for column in range(ids.shape[1]):
            same |= ids[:, None, column] == all_ids[None, :, column]
        same[torch.arange(len(ids), device=ids.device), labels] = False
        return self.sum_rows(Chunk(image_rows, text_rows, images, texts, logits, labels, same))


def _list_ids(inputs: LossInputs) -> Tensor:
    """Return (B, 1 or 2) int64: rows with an equal id in a column are no negatives."""
    columns = (
        [inputs.group_ids] if inputs.text_keys is None else [inputs.group_ids, inputs.text_keys]
    )
    image_embeds, text_embeds = inputs.image_embeds, inputs.text_embeds
    if image_embeds.shape != text_embeds.shape or {*map(len, columns)} != {len(image_embeds)}:
        raise ValueError(
            f"image_embeds {tuple(image_embeds.shape)}, text_embeds {tuple(text_embeds.shape)}, "
            f"group_ids and text_keys {[tuple(column.shape) for column in columns]} must pair row "
            "by row."
        )
    return torch.stack(columns, dim=1)


class ContrastiveLoss(PairLoss):
    """Symmetric cross-entropy: each image chooses its text among all, and each text its image.

    The loss of CLIP (arXiv:2103.00020, figure 3), without false negatives.

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


class SigmoidLoss(PairLoss):
    """Binary cross-entropy of each pair: whether this image and this text belong together.

    The loss of SigLIP (arXiv:2303.15343, algorithm 1), without false negatives.

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
