"""Contrastive losses.

B rows of one process, A rows of all processes, P width of the shared space.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def grouped_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    group_ids: Tensor,
    *,
    chunk_size: int | None = None,
    over_processes: bool = False,
) -> Tensor:
    """Symmetric cross-entropy in which rows of the same group are never each other's negatives.

    Two images of one thing in one batch would otherwise push their own caption away.

    Over several processes each compares its own rows with those of all, and embeddings are gathered
    with their gradients. The mean over the processes of loss and gradients, which is what
    distributed training takes, is then exactly that of one process with the whole batch.

    Args:
        image_embeds, text_embeds: (B, P) float32, unit length; row i belongs to row i. Equally
            many on every process.
        logit_scale: (1,) float32, the inverse temperature.
        group_ids: (B,) int64, what each row shows; the same numbers on every process.
        chunk_size: compare so many rows at a time and compute them again in the backward pass,
            so that memory holds (chunk, A) numbers, never (B, A). The same loss and gradients.
        over_processes: compare with the rows of all processes of the default group.
    Returns: () float32, the mean over this process's rows; equal to
        `heads_llm2clip.contrastive_loss` on one process when all group ids differ.
    Raises: ValueError when the shapes differ.
    """
    if image_embeds.shape != text_embeds.shape or len(group_ids) != len(image_embeds):
        raise ValueError(
            f"image_embeds {tuple(image_embeds.shape)}, text_embeds {tuple(text_embeds.shape)} "
            f"and group_ids {tuple(group_ids.shape)} must pair row by row."
        )
    # Whatever a wrapper of the model made of them; half-precision logits have no second digit.
    image_embeds, text_embeds = image_embeds.float(), text_embeds.float()
    logit_scale = logit_scale.float()
    num_rows, first = len(group_ids), 0
    images, texts, all_group_ids = image_embeds, text_embeds, group_ids
    if over_processes and dist.is_initialized() and dist.get_world_size() > 1:
        # One collective for both, so that their order cannot differ between processes.
        both = gather_with_gradient(torch.cat([image_embeds, text_embeds], dim=1))
        images, texts = both.chunk(2, dim=1)
        all_group_ids = gather_group_ids(group_ids)
        first = dist.get_rank() * num_rows
    total = torch.zeros((), device=image_embeds.device)
    size = chunk_size or num_rows
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        inputs = (
            image_embeds[rows], text_embeds[rows], images, texts, logit_scale, group_ids[rows],
            all_group_ids, first + start,
        )  # fmt: skip
        if size < num_rows:
            total = total + checkpoint(_sum_of_rows, *inputs, use_reentrant=False)
        else:
            total = total + _sum_of_rows(*inputs)
    return total / (2 * num_rows)


def _sum_of_rows(
    image_rows: Tensor,
    text_rows: Tensor,
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    group_ids: Tensor,
    all_group_ids: Tensor,
    first: int,
) -> Tensor:
    """Cross-entropy of some rows against all, both directions, summed.

    Args:
        first: where the first of these rows stands among all.
    """
    labels = torch.arange(first, first + len(group_ids), device=group_ids.device)
    own = labels[:, None] == torch.arange(len(all_group_ids), device=group_ids.device)[None, :]
    same = (group_ids[:, None] == all_group_ids[None, :]) & ~own
    # Half-precision products of unit embeddings times 100 would be wrong in the second digit.
    with torch.autocast(image_rows.device.type, enabled=False):
        per_image = logit_scale * image_rows @ texts.T  # (B, A)
        # With all rows at hand the other direction is the transpose, and need not be computed.
        whole = len(group_ids) == len(all_group_ids)
        per_text = per_image.T if whole else logit_scale * text_rows @ images.T
        losses = [
            F.cross_entropy(logits.masked_fill(same, -torch.inf), labels, reduction="sum")
            for logits in (per_image, per_text)
        ]
    return losses[0] + losses[1]


class _GatherWithGradient(torch.autograd.Function):
    """All processes' rows forward; backward, the sum of all processes' gradients for our rows."""

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
    """Concatenate the rows of all processes, (B, …) each, in order of rank, differentiably."""
    gathered: Tensor = _GatherWithGradient.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def gather_group_ids(group_ids: Tensor) -> Tensor:
    """Concatenate the group ids of all processes, (B,) each, in order of rank."""
    gathered = [torch.empty_like(group_ids) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, group_ids.contiguous())
    return torch.cat(gathered)
