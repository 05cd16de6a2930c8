"""Compute scores from ranks: per query, their means, and bootstrap confidence intervals.

K is a rank, R a query's number of positives, r their ranks. All scores are between 0 and 1, except
for the ranks themselves. Functions named `…s_at` return one value per query, (Q,) float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from .ranking import Ranking

CONFIDENCE_LEVEL = 0.95
NUM_RESAMPLES = 1000


def hits_at(ranking: Ranking, *, k: int) -> Tensor:
    """Compute whether a positive ranks in the top K, 0 or 1: R@K in CLIP papers (arXiv:2103.00020).

    mteb calls the mean hit_rate_at_k. This score is not a recall if a query has several positives.
    """
    return (ranking.best_ranks <= k).double()


def recalls_at(ranking: Ranking, *, k: int) -> Tensor:
    """Compute the share of a query's positives in the top K: trec_eval's recall_K.

    |{r ≤ K}| / R; mteb calls the mean recall_at_k. With R > K, the recall cannot reach 1.
    """
    hits = (_require_all_ranks(ranking) <= k).double()
    return _sum_by_query(ranking, hits) / ranking.num_positives


def average_precisions_at(ranking: Ranking, *, k: int) -> Tensor:
    """Compute the average precision of the top K (trec_eval's map_cut_K).

    AP@K = 1/R · Σ_{r ≤ K} (positives up to rank r) / r; mAP@K is the mean.
    """
    ranks = _require_all_ranks(ranking)
    precisions = torch.where(ranks <= k, _count_up_to(ranking) / ranks.double(), 0.0)
    return _sum_by_query(ranking, precisions) / ranking.num_positives


def ndcgs_at(ranking: Ranking, *, k: int) -> Tensor:
    """Compute the discounted gain of the top K relative to the ideal ranking (ndcg_cut_K).

    NDCG@K = Σ_{r ≤ K} 1/log2(r + 1) / Σ_{i ≤ min(K, R)} 1/log2(i + 1) (Järvelin and Kekäläinen,
    2002, as trec_eval computes it).
    """
    gained, most = (
        _sum_by_query(ranking, torch.where(ranks <= k, 1 / (ranks.double() + 1).log2(), 0.0))
        for ranks in (_require_all_ranks(ranking), _count_up_to(ranking))
    )
    return gained / most


def hit_rate_at(ranking: Ranking, *, k: int) -> float:
    """Compute the share of queries with a positive in the top K: R@K in CLIP papers."""
    return float(hits_at(ranking, k=k).mean())


def summarize(ranking: Ranking, *, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Compute the usual scores of one direction, under the names that mteb uses, if any.

    Returns `median_rank`, `mean_rank` and, for each K, `hit_rate_at_K`. If all positives were
    ranked, also returns `recall_at_K`, `map_at_K` and `ndcg_at_K`.
    """
    ranks = ranking.best_ranks.double()
    # The lower of two middle ranks would flatter the model; quantile averages them.
    scores = {"median_rank": float(ranks.quantile(0.5)), "mean_rank": float(ranks.mean())}
    metrics = {"hit_rate": hits_at}
    if ranking.positive_ranks is not None:
        metrics |= {"recall": recalls_at, "map": average_precisions_at, "ndcg": ndcgs_at}
    for name, compute in metrics.items():
        scores |= {f"{name}_at_{k}": float(compute(ranking, k=k).mean()) for k in ks}
    return scores


def mean_with_interval(values: Tensor, *, clusters: Tensor | None = None) -> dict[str, float]:
    """Compute `value`, `low` and `high`: the mean over queries, and the mean's bootstrap interval.

    The interval is a percentile interval (Efron and Tibshirani, 1993, ch. 13). Clusters are
    resampled as a whole: a cluster is all queries with the same number in `clusters`, (Q,)
    integers, or without `clusters` a single query. An image's five captions succeed or fail
    together. If they were resampled separately, they would count as five independent trials, and
    the interval would be too narrow.
    """
    if clusters is None:
        clusters = torch.arange(len(values))
    return mean_of_means_with_interval([(values, clusters)])


def mean_of_means_with_interval(groups: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Average the means of several groups, such as languages; see `mean_with_interval`.

    All groups share each resample: an image that is drawn twice counts twice in every language.
    """
    numbers = torch.cat([clusters for _, clusters in groups]).unique(return_inverse=True)[1]
    num_clusters = int(numbers.max()) + 1
    sums, sizes = torch.zeros(2, num_clusters, len(groups), dtype=torch.float64)
    parts = numbers.split([len(values) for values, _ in groups])
    for group, ((values, _), rows) in enumerate(zip(groups, parts, strict=True)):
        sums[:, group].index_add_(0, rows, values.double().cpu())
        sizes[:, group] = torch.bincount(rows, minlength=num_clusters)
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(NUM_RESAMPLES):
        sampled = torch.randint(num_clusters, (num_clusters,), generator=generator)
        weights = torch.bincount(sampled, minlength=num_clusters).double()
        # A resample may miss a small group entirely; then the other groups are averaged.
        means.append((weights @ sums / (weights @ sizes)).nanmean())
    value = fmean(float(values.double().mean()) for values, _ in groups)
    tail = (1 - CONFIDENCE_LEVEL) / 2
    tails = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.stack(means).quantile(tails).tolist()
    return {"value": value, "low": low, "high": high}


def _require_all_ranks(ranking: Ranking) -> Tensor:
    if ranking.positive_ranks is None:
        raise ValueError(
            "This score needs the ranks of all positives. Call "
            "rank_retrieval(…, all_positives=True)."
        )
    return ranking.positive_ranks


def _count_up_to(ranking: Ranking) -> Tensor:
    """Number the positives of each query: 1, 2, …, R."""
    first = ranking.num_positives.cumsum(0) - ranking.num_positives
    places = torch.arange(int(ranking.num_positives.sum()))
    return 1 + places - first.repeat_interleave(ranking.num_positives)


def _sum_by_query(ranking: Ranking, values: Tensor) -> Tensor:
    queries = torch.arange(len(ranking.num_positives)).repeat_interleave(ranking.num_positives)
    sums = torch.zeros(len(ranking.num_positives), dtype=torch.float64)
    return sums.index_add_(0, queries, values)
