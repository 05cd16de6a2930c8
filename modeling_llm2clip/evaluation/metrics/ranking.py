"""Retrieval metrics: vectors and correspondence in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rank_best_positive(
    query_embeds: Tensor,
    candidate_embeds: Tensor,
    query_keys: Sequence[str],
    candidate_keys: Sequence[str],
    *,
    tile_size: int = 1024,
) -> Tensor:
    """Rank, for each query, its best positive candidate by cosine; 1 is best.

    Ties count against the query: a candidate that scores as high as the best positive and is not
    a positive stands before it. So equal vectors cannot make a model look good.

    Args:
        query_embeds, candidate_embeds: (Q, P), (C, P) of any float dtype; compared in float32.
        query_keys, candidate_keys: a candidate is a positive of a query with the same key.
        tile_size: queries compared at a time.
    Returns: (Q,) int64.
    Raises: ValueError for other counts, widths, NaN, or a query without a positive.
    """
    _check(query_embeds, candidate_embeds, query_keys, candidate_keys)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(candidate_keys))}
    candidates = torch.tensor([numbers[key] for key in candidate_keys])
    queries = torch.tensor([numbers[key] for key in query_keys])
    candidate_embeds = F.normalize(candidate_embeds.float(), dim=-1)
    query_embeds = F.normalize(query_embeds.float(), dim=-1)
    ranks = []
    for start in range(0, len(queries), tile_size):
        scores = query_embeds[start : start + tile_size] @ candidate_embeds.T  # (tile, C)
        positive = queries[start : start + tile_size, None] == candidates
        best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~positive).sum(dim=1))
    return torch.cat(ranks)


def recall_at(ranks: Tensor, *, k: int) -> float:
    """Share of queries whose best positive is among the first k (hit rate, as CLIP papers)."""
    return float((ranks <= k).float().mean())


def _check(
    query_embeds: Tensor,
    candidate_embeds: Tensor,
    query_keys: Sequence[str],
    candidate_keys: Sequence[str],
) -> None:
    for name, embeds, keys in (
        ("query", query_embeds, query_keys),
        ("candidate", candidate_embeds, candidate_keys),
    ):
        if embeds.ndim != 2 or len(embeds) != len(keys) or not len(keys):
            raise ValueError(
                f"{name}_embeds {tuple(embeds.shape)} must have one row for each of the "
                f"{len(keys)} {name}_keys, and at least one."
            )
        if not embeds.isfinite().all():
            row = int((~embeds.isfinite()).any(dim=1).long().argmax())
            raise ValueError(f"{name}_embeds row {row} has a NaN or an infinity.")
    if query_embeds.shape[1] != candidate_embeds.shape[1]:
        raise ValueError(
            f"Queries have width {query_embeds.shape[1]}, candidates {candidate_embeds.shape[1]}; "
            "they must come from one model."
        )
    lonely = sorted(set(query_keys) - set(candidate_keys))
    if lonely:
        raise ValueError(f"{len(lonely)} query keys have no candidate: {lonely[:5]}.")
