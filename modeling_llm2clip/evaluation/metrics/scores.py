"""Scores of a ranking: one value a query, and their means.

K is a rank, R the number of a query's positives, r their ranks. All scores are between 0 and 1 but
the ranks themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ranking import Ranking


def hits_at(ranking: Ranking, *, k: int) -> Tensor:
    """Whether some positive is among the first K: what CLIP papers call R@K (arXiv:2103.00020).

    mteb calls its mean hit_rate_at_k. Not a recall where a query has several positives.

    Returns: (Q,) float64, 0 or 1.
    """
    _require_rank(k)
    return (ranking.best_ranks <= k).double()


def recalls_at(ranking: Ranking, *, k: int) -> Tensor:
    """Share of a query's positives among the first K: |{r ≤ K}| / R (trec_eval's recall_K).

    mteb calls its mean recall_at_k. With R > K it cannot reach 1.

    Returns: (Q,) float64.
    Raises: ValueError for a ranking without the ranks of all positives.
    """
    found = (_all_ranks(ranking, k) <= k).double()
    return _sum_by_query(ranking, found) / ranking.num_positives


def average_precisions_at(ranking: Ranking, *, k: int) -> Tensor:
    """Precision at each positive among the first K, summed over R (trec_eval's map_cut_K).

    AP@K = 1/R · Σ_{r ≤ K} (positives up to rank r) / r; mAP@K is the mean.

    Returns: (Q,) float64.
    Raises: ValueError for a ranking without the ranks of all positives.
    """
    ranks = _all_ranks(ranking, k)
    precisions = torch.where(ranks <= k, _position_in_query(ranking) / ranks.double(), 0.0)
    return _sum_by_query(ranking, precisions) / ranking.num_positives


def ndcgs_at(ranking: Ranking, *, k: int) -> Tensor:
    """Discounted gain of the positives among the first K over the most possible (ndcg_cut_K).

    NDCG@K = Σ_{r ≤ K} 1/log2(r + 1) / Σ_{i ≤ min(K, R)} 1/log2(i + 1) (Järvelin and Kekäläinen,
    2002, as trec_eval computes it).

    Returns: (Q,) float64.
    Raises: ValueError for a ranking without the ranks of all positives.
    """
    gained, most = (
        _sum_by_query(ranking, torch.where(ranks <= k, 1 / (ranks.double() + 1).log2(), 0.0))
        for ranks in (_all_ranks(ranking, k), _position_in_query(ranking))
    )
    return gained / most


def hit_rate_at(ranking: Ranking, *, k: int) -> float:
    """Share of queries with a positive among the first K: R@K as CLIP papers count it."""
    return float(hits_at(ranking, k=k).mean())


def summarize(ranking: Ranking, *, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Name the usual scores of one direction, as mteb names them where it has them.

    Recall, mAP and NDCG are there when the ranks of all positives are.
    """
    ranks = ranking.best_ranks.double()
    # The smaller of the two middle ranks would flatter; quantile takes their mean.
    scores = {"median_rank": float(ranks.quantile(0.5)), "mean_rank": float(ranks.mean())}
    kinds = {"hit_rate": hits_at}
    if ranking.positive_ranks is not None:
        kinds |= {"recall": recalls_at, "map": average_precisions_at, "ndcg": ndcgs_at}
    for name, values_at in kinds.items():
        scores |= {f"{name}_at_{k}": float(values_at(ranking, k=k).mean()) for k in ks}
    return scores


def _all_ranks(ranking: Ranking, k: int) -> Tensor:
    _require_rank(k)
    if ranking.positive_ranks is None:
        raise ValueError(
            "This score needs the ranks of all positives: rank_retrieval(…, all_positives=True)."
        )
    return ranking.positive_ranks


def _require_rank(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k}; the first rank is 1.")


def _queries_of_ranks(ranking: Ranking) -> Tensor:
    return torch.arange(len(ranking.num_positives)).repeat_interleave(ranking.num_positives)


def _position_in_query(ranking: Ranking) -> Tensor:
    """For every positive, how many of its query stand up to it: 1, 2, …, R."""
    first = ranking.num_positives.cumsum(0) - ranking.num_positives
    places = torch.arange(int(ranking.num_positives.sum()))
    return 1 + places - first.repeat_interleave(ranking.num_positives)


def _sum_by_query(ranking: Ranking, values: Tensor) -> Tensor:
    sums = torch.zeros(len(ranking.num_positives), dtype=torch.float64)
    return sums.index_add_(0, _queries_of_ranks(ranking), values)
