"""Which pictures have captions that a model still confuses: they make hard batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..data.caption_groups import CaptionGroup

_ROWS_A_TILE = 1024


def find_alike(vectors: Tensor, count: int) -> Tensor:
    """Find the most alike other rows of each row, by cosine, the nearest first.

    Args:
        vectors: (N, D) of any float dtype; one row a picture.
        count: how many; at most N - 1.
    Returns: (N, count) int64, row numbers.
    """
    units = F.normalize(vectors.float(), dim=-1)
    nearest = []
    for start in range(0, len(units), _ROWS_A_TILE):
        rows = torch.arange(start, min(start + _ROWS_A_TILE, len(units)))
        scores = units[rows] @ units.T
        scores[torch.arange(len(rows)), rows] = -torch.inf
        nearest.append(scores.topk(count, dim=1).indices)
    return torch.cat(nearest)


def encode_groups(encode: Callable[[list[str]], Tensor], groups: Sequence[CaptionGroup]) -> Tensor:
    """Compute one vector a picture, (N, D): the mean of its captions' unit vectors."""
    units = F.normalize(encode([c for group in groups for c in group.captions]).float(), dim=-1)
    return torch.stack([part.mean(0) for part in units.split([len(g.captions) for g in groups])])


def write_alike(alike: Tensor, file: Path) -> None:
    """Keep what was found, so that a resumed run draws the same batches."""
    temporary = file.with_suffix(".writing")
    save_file({"alike": alike.contiguous()}, temporary)
    temporary.replace(file)


def read_alike(file: Path, groups: Sequence[CaptionGroup]) -> dict[str, list[str]]:
    """Read it back as keys: each picture's most alike ones, the nearest first."""
    keys = [group.key for group in groups]
    return {
        key: [keys[row] for row in rows]
        for key, rows in zip(keys, load_file(file)["alike"].tolist(), strict=True)
    }
