"""Groups whose captions a model still confuses share a batch: hard negatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from ...data.atomic_files import write_atomically
from ...data.caption_groups import CaptionGroup

_ROWS_PER_TILE = 1024
_NEAREST = "nearest"


def find_nearest_groups(embeddings: Tensor, top_k: int) -> Tensor:
    """Find the nearest other rows of each row by cosine.

    Args:
        embeddings: (N, D) of any float dtype, one row per group.
        top_k: How many; at most N - 1.

    Returns:
        (N, top_k) int64, row numbers, the nearest first, on the device of the embeddings.
    """
    units = F.normalize(embeddings.float(), dim=-1)
    nearest = []
    for start in range(0, len(units), _ROWS_PER_TILE):
        rows = torch.arange(start, min(start + _ROWS_PER_TILE, len(units)), device=units.device)
        scores = units[rows] @ units.T
        scores[rows - start, rows] = -torch.inf
        nearest.append(scores.topk(top_k, dim=1).indices)
    return torch.cat(nearest)


def encode_groups(encode: Callable[[list[str]], Tensor], groups: Sequence[CaptionGroup]) -> Tensor:
    """Compute one embedding per group: the mean of its captions' unit embeddings.

    Args:
        encode: Texts to embeddings, (N, D).
        groups: At least one.

    Returns:
        (groups, D) float32.
    """
    units = F.normalize(encode([c for group in groups for c in group.captions]).float(), dim=-1)
    return torch.stack([part.mean(0) for part in units.split([len(g.captions) for g in groups])])


def encode_groups_together(
    encode: Callable[[list[str]], Tensor], groups: Sequence[CaptionGroup]
) -> Tensor:
    """Compute `encode_groups` by all processes, an equal share each.

    Args:
        encode: Texts to embeddings, (N, D).
        groups: The same on every process, at least as many as there are processes.

    Returns:
        (groups, D) float32, all rows on every process and on its device.
    """
    state = PartialState()
    own = encode_groups(encode, groups[state.process_index :: state.num_processes])
    if state.num_processes == 1:
        return own.to(state.device)
    longest = -(-len(groups) // state.num_processes)
    padded = torch.zeros(longest, own.shape[1], device=state.device)
    padded[: len(own)] = own
    shares = [torch.empty_like(padded) for _ in range(state.num_processes)]
    dist.all_gather(shares, padded)
    return torch.stack(shares, dim=1).flatten(0, 1)[: len(groups)]


def write_nearest_groups(nearest: Tensor, file: Path) -> None:
    """Write what was found, so that a resumed run samples the same batches.

    Args:
        nearest: (N, K) int64, as `find_nearest_groups` returns it.
        file: Target, replaced if it exists.
    """
    write_atomically(file, save({_NEAREST: nearest.contiguous()}))


def read_nearest_groups(file: Path, groups: Sequence[CaptionGroup]) -> dict[str, list[str]]:
    """Read the nearest groups of each group.

    Args:
        file: As `write_nearest_groups` wrote it.
        groups: The groups that it was made for, in the same order.

    Returns:
        Group id → ids of the nearest groups, the nearest first.
    """
    group_ids = [group.group_id for group in groups]
    return {
        group_id: [group_ids[row] for row in rows]
        for group_id, rows in zip(group_ids, load_file(file)[_NEAREST].tolist(), strict=True)
    }
