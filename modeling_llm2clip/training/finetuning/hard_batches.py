"""Which images have captions that a model still confuses: they make hard batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ...data.caption_groups import CaptionGroup

_ROWS_A_TILE = 1024


def find_nearest_groups(embeddings: Tensor, count: int) -> Tensor:
    """Find the most alike other rows of each row, by cosine, the nearest first.

    Args:
        embeddings: (N, D) of any float dtype; one row an image.
        count: how many; at most N - 1.
    Returns: (N, count) int64, row numbers, on the device of the embeddings.
    """
    units = F.normalize(embeddings.float(), dim=-1)
    nearest = []
    for start in range(0, len(units), _ROWS_A_TILE):
        rows = torch.arange(start, min(start + _ROWS_A_TILE, len(units)), device=units.device)
        scores = units[rows] @ units.T
        scores[rows - start, rows] = -torch.inf
        nearest.append(scores.topk(count, dim=1).indices)
    return torch.cat(nearest)


def encode_groups(encode: Callable[[list[str]], Tensor], groups: Sequence[CaptionGroup]) -> Tensor:
    """Compute one embedding an image, (N, D): the mean of its captions' unit embeddings."""
    units = F.normalize(encode([c for group in groups for c in group.captions]).float(), dim=-1)
    return torch.stack([part.mean(0) for part in units.split([len(g.captions) for g in groups])])


def encode_groups_together(
    encode: Callable[[list[str]], Tensor], groups: Sequence[CaptionGroup]
) -> Tensor:
    """Compute the same, each process an equal share: one alone would keep the others waiting.

    Args:
        groups: the same on every process, at least as many as there are processes.
    Returns: (N, D), all of it on every process and on its device.
    """
    state = PartialState()
    own = encode_groups(encode, groups[state.process_index :: state.num_processes])
    if state.num_processes == 1:
        return own.to(state.device)
    most = -(-len(groups) // state.num_processes)
    padded = torch.zeros(most, own.shape[1], device=state.device)
    padded[: len(own)] = own
    shares = [torch.empty_like(padded) for _ in range(state.num_processes)]
    dist.all_gather(shares, padded)
    return torch.stack(shares, dim=1).flatten(0, 1)[: len(groups)]


def write_alike(alike: Tensor, file: Path) -> None:
    """Keep what was found, so that a resumed run draws the same batches."""
    temporary = file.with_suffix(".writing")
    save_file({"alike": alike.contiguous()}, temporary)
    temporary.replace(file)


def read_alike(file: Path, groups: Sequence[CaptionGroup]) -> dict[str, list[str]]:
    """Read it back as group ids: each image's nearest ones, the nearest first."""
    group_ids = [group.group_id for group in groups]
    return {
        group_id: [group_ids[row] for row in rows]
        for group_id, rows in zip(group_ids, load_file(file)["alike"].tolist(), strict=True)
    }
