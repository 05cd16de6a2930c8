"""Rows of all processes, through which gradients flow back to each.

The mean over the processes of a loss that is computed so, and of its gradients, which distributed
training takes, is exactly that of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .loss import LossInputs

_ROWS_WITHOUT_GRADIENT = 512


def iterate_chunks(num_rows: int, size: int | None = None) -> Iterator[slice]:
    """Yield the rows that a loss compares at a time: by default all, or some without gradients."""
    size = size or (num_rows if torch.is_grad_enabled() else _ROWS_WITHOUT_GRADIENT)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def gather_rows(inputs: LossInputs, *parts: Tensor) -> tuple[list[Tensor], int]:
    """Return each part of a batch, (B, width), with the rows of all processes, (A, width).

    Also returned is the number of this process's first row among them. All parts go in one
    collective, so that their order cannot differ between processes.
    """
    if not _is_shared(inputs):
        return list(parts), 0
    gathered = gather_with_gradient(torch.cat(parts, dim=1))
    widths = [part.shape[1] for part in parts]
    return list(gathered.split(widths, dim=1)), dist.get_rank() * len(parts[0])


def gather_ids(inputs: LossInputs, ids: Tensor) -> Tensor:
    """Return the ids of all processes' rows, (A, columns) int64."""
    return _gather(ids) if _is_shared(inputs) else ids


def _gather(rows: Tensor) -> Tensor:
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def _is_shared(inputs: LossInputs) -> bool:
    return not inputs.is_whole and dist.is_initialized() and dist.get_world_size() > 1


class _GatherWithGradient(torch.autograd.Function):
    """Forward: rows of all processes. Backward: the sum of all processes' gradients for our rows.

    `torch.distributed.nn.functional.all_gather` gives the same gradients, and is deprecated in
    favor of a private function that torch 2.6 lacks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return _gather(rows)

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
