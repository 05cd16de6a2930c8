"""The contrastive loss of CLIP, grouped, chunked, and over processes.

B rows of one process, A rows of all processes, P width of the shared space.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...heads_llm2clip import LogitRule
from .loss import LossInputs

_ROWS_WITHOUT_GRADIENT = 512


class ContrastiveLoss(nn.Module):
    """Symmetric cross-entropy without false negatives.

    These are rows of one group, where two images of one thing would push each other's caption away,
    and rows of equal captions, which describe both images. If all groups and captions differ, the
    loss equals `heads_llm2clip.contrastive_loss`.

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

    def forward(self, inputs: LossInputs) -> Tensor:
        """Compute the mean over this process's rows and both directions, () float32."""
        ids = _list_ids(inputs)
        image_embeds, text_embeds = inputs.image_embeds.float(), inputs.text_embeds.float()
        num_rows, first = len(ids), 0
        images, texts, all_ids = image_embeds, text_embeds, ids
        if not inputs.is_whole and dist.is_initialized() and dist.get_world_size() > 1:
            # One collective for both, so that their order cannot differ between processes.
            both = gather_with_gradient(torch.cat([image_embeds, text_embeds], dim=1))
            images, texts = both.chunk(2, dim=1)
            gathered = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, ids)
            all_ids = torch.cat(gathered)
            first = dist.get_rank() * num_rows
        total = torch.zeros((), device=image_embeds.device)
        size = self.chunk_size or (num_rows if torch.is_grad_enabled() else _ROWS_WITHOUT_GRADIENT)
        for start in range(0, num_rows, size):
            rows = slice(start, min(start + size, num_rows))
            arguments = (
                image_embeds[rows], text_embeds[rows], images, texts, inputs.logits,
                ids[rows], all_ids, first + start,
            )  # fmt: skip
            if size < num_rows:
                total = total + checkpoint(_sum_of_rows, *arguments, use_reentrant=False)
            else:
                total = total + _sum_of_rows(*arguments)
        return total / (2 * num_rows)


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


def _sum_of_rows(
    image_rows: Tensor,
    text_rows: Tensor,
    images: Tensor,
    texts: Tensor,
    compare: LogitRule,
    ids: Tensor,
    all_ids: Tensor,
    first: int,
) -> Tensor:
    """Add up the cross-entropy of a chunk's rows against all, both directions.

    The chunk has b rows, (b, P) and (b, columns) of ids; its first one is number `first` of all A.
    """
    labels = torch.arange(first, first + len(ids), device=ids.device)
    own = labels[:, None] == torch.arange(len(all_ids), device=ids.device)[None, :]
    same = torch.zeros_like(own)
    for column in range(ids.shape[1]):
        same |= ids[:, None, column] == all_ids[None, :, column]
    same &= ~own
    per_image = compare(image_rows, texts)  # (b, A)
    # If all rows are here, the other direction is the transpose and is not computed again.
    per_text = per_image.T if len(ids) == len(all_ids) else compare(text_rows, images)
    losses = [
        F.cross_entropy(logits.masked_fill(same, -torch.inf), labels, reduction="sum")
        for logits in (per_image, per_text)
    ]
    return losses[0] + losses[1]


class _GatherWithGradient(torch.autograd.Function):
    """Forward: rows of all processes. Backward: the sum of all processes' gradients for our rows.

    `torch.distributed.nn.functional.all_gather` gives the same gradients, and is deprecated in
    favor of a private function that torch 2.6 lacks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.num_rows
        return total[start : start + ctx.num_rows]


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks, differentiably."""
    gathered: Tensor = _GatherWithGradient.apply(rows)  # type: ignore[no-untyped-call]
    return gathered
