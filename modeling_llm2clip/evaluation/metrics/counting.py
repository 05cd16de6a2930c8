"""For every positive: how many negatives of its query stand before it, summed over tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from .correspondence import PositiveLists
from .tiles import Tile


class NegativeCounts:
    """Counts of one direction of retrieval.

    A query's positives are its levels, best first. Level k is compared for the queries that have
    one, so that a query with many positives costs the others nothing.

    Args:
        positives: of every query.
        scores: (num_pairs,) float64, of every pair of the correspondence.
        tolerance: a negative that scores no more than this below a positive stands before it.
        margin: how far a float32 score of a tile may be from the exact one; what is nearer to a
            threshold is scored again.
        all_levels: count for every positive, or for the best one of each query alone.
        device: where the tiles are computed.
    """

    def __init__(
        self,
        positives: PositiveLists,
        scores: Tensor,
        *,
        tolerance: float,
        margin: float,
        all_levels: bool,
        device: torch.device,
    ) -> None:
        levels = positives.counts if all_levels else torch.ones_like(positives.counts)
        self.num_positives = positives.counts
        self._num_levels = levels
        self._first = levels.cumsum(0) - levels  # (Q,), where the levels of a query begin
        ordered = _order_levels(positives, scores, all_levels=all_levels)
        self._thresholds = (ordered - tolerance).to(device)
        self._margin = margin
        self.counts = torch.zeros(len(ordered), dtype=torch.int64, device=device)
        # Level 0 is every query's.
        self._queries_of_level = [
            (levels > level).nonzero().flatten() for level in range(1, int(levels.max()))
        ]

    def add(self, tile: Tile) -> None:
        """Count the negatives of a tile that stand before each level of its queries."""
        start, stop = tile.query_start, tile.query_start + len(tile.scores)
        best_negatives = tile.scores.amax(dim=1)
        self._add_level(tile, torch.arange(start, stop), best_negatives, level=0)
        for level, queries in enumerate(self._queries_of_level, start=1):
            low, high = torch.searchsorted(queries, torch.tensor([start, stop])).tolist()
            if low < high:
                self._add_level(tile, queries[low:high], best_negatives, level=level)

    def all_ranks(self) -> Tensor:
        """Rank of every level, query after query, int64 on the CPU; 1 is best."""
        levels = torch.arange(len(self.counts)) - self._first.repeat_interleave(self._num_levels)
        return 1 + levels + self.counts.cpu()

    def best_ranks(self) -> Tensor:
        """(Q,) int64 on the CPU, rank of the best positive of each query; 1 is best."""
        return 1 + self.counts.cpu()[self._first]

    def _add_level(
        self, tile: Tile, queries: Tensor, best_negatives: Tensor, *, level: int
    ) -> None:
        """Count for one level of some queries of a tile.

        Args:
            queries: (q,) on the CPU, ascending.
            best_negatives: (n,) for every query of the tile.
        """
        device = tile.scores.device
        rows, places = (queries - tile.query_start).to(device), self._first[queries].to(device)
        lowest = (self._thresholds[places + level] - self._margin).float()
        # Most queries have nothing in a tile that could stand before their positive.
        concerned = best_negatives[rows] >= lowest
        rows, places = rows[concerned], places[concerned] + level
        if len(rows):
            scores = _select_rows(tile.scores, rows)
            self.counts[places] += self._count(tile, rows, scores, self._thresholds[places, None])

    def _count(self, tile: Tile, rows: Tensor, scores: Tensor, thresholds: Tensor) -> Tensor:
        """Count the scores of some rows of a tile that reach the thresholds, (q,) int64."""
        lowest, highest = (thresholds - self._margin).float(), (thresholds + self._margin).float()
        counts = _count_above(scores, highest, tile.memory)
        unsure = (_count_above(scores, lowest, tile.memory) > counts).nonzero().flatten()
        if len(unsure):
            near = _select_rows(scores, unsure)
            near = (near >= lowest[unsure]) & (near < highest[unsure])
            columns = near.any(dim=0).nonzero().flatten()
            exact = tile.score_exactly(
                tile.query_start + rows[unsure], tile.candidate_start + columns
            )
            before = (exact >= thresholds[unsure]) & near[:, columns]
            counts[unsure] += before.sum(dim=1)
        return counts


def _select_rows(scores: Tensor, rows: Tensor) -> Tensor:
    if len(rows) == len(scores):
        return scores
    if scores.is_contiguous():
        return scores.index_select(0, rows)
    # In the transpose of a tile rows are columns; this way they are read line by line.
    return scores.T.index_select(1, rows).T


def _count_above(scores: Tensor, thresholds: Tensor, memory: Tensor) -> Tensor:
    """Count the scores of every row that reach its threshold."""
    # Ones in float32 are added faster than booleans, and exactly up to 2^24, more than a tile has.
    above = memory.as_strided(scores.shape, scores.stride())
    torch.ge(scores, thresholds, out=above)
    return above.sum(dim=1).long()


def _order_levels(positives: PositiveLists, scores: Tensor, *, all_levels: bool) -> Tensor:
    """Scores of the positives of every query, best first; or of the best ones alone."""
    scores = scores.cpu()[positives.pairs]
    queries = torch.arange(len(positives.counts)).repeat_interleave(positives.counts)
    by_score = scores.argsort(descending=True, stable=True)
    ordered = scores[by_score[queries[by_score].argsort(stable=True)]]
    return ordered if all_levels else ordered[positives.offsets[:-1]]
