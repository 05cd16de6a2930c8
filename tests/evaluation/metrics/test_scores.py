"""Scores of a ranking equal those of trec_eval and of a count by hand; intervals those of loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_llm2clip.evaluation.metrics import scores as metrics
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import Ranking, rank_retrieval
from modeling_llm2clip.evaluation.metrics.scores import (
    mean_with_interval,
    recalls_at,
    summarize,
)


@pytest.fixture
def ranking():
    """Two queries of six candidates: positives at 2 and 3 of the first, at 1, 4, 6 of the other."""
    return Ranking(6, torch.tensor([2, 3]), torch.tensor([2, 1]), torch.tensor([2, 3, 1, 4, 6]))


def test_the_median_of_an_even_number_of_queries_is_between_the_middle_ones(ranking):
    assert summarize(ranking)["median_rank"] == 1.5 == summarize(ranking)["mean_rank"]


def test_every_score_is_that_of_mteb_and_trec_eval_where_nothing_ties():
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores

    generator = torch.Generator().manual_seed(3)
    images, texts = (torch.randn(n, 16, generator=generator) for n in (20, 50))
    group_ids = torch.randint(9, (50,), generator=generator).tolist()
    correspondence = Correspondence.from_group_ids([i % 9 for i in range(20)], group_ids)
    found = rank_retrieval(images, texts, correspondence, all_positives=True)
    cosines = F.normalize(images.double(), dim=-1) @ F.normalize(texts.double(), dim=-1).T
    ks = (1, 3, 10)
    for side, scores, positives in (
        (found.i2t, cosines, correspondence.texts_of_images()),
        (found.t2i, cosines.T, correspondence.images_of_texts()),
    ):
        relevant = {
            str(q): {str(c): 1 for c in positives.of(q).tolist()} for q in range(len(scores))
        }
        run = {
            str(q): {str(c): score for c, score in enumerate(row)}
            for q, row in enumerate(scores.tolist())
        }
        result = calculate_retrieval_scores(run, relevant, list(ks))
        ours = summarize(side, ks=ks)
        for name, theirs in (
            ("ndcg", result.ndcg), ("map", result.map), ("recall", result.recall),
            ("hit_rate", result.hit_rate),
        ):  # fmt: skip
            for k in ks:
                value = next(v for key, v in theirs.items() if key.lower().endswith(f"@{k}"))
                assert ours[f"{name}_at_{k}"] == pytest.approx(value, abs=6e-6)  # rounded to five


def test_scores_of_all_positives_are_refused_when_only_the_best_were_ranked(ranking):
    best = Ranking(6, ranking.num_positives, ranking.best_ranks)
    with pytest.raises(ValueError, match="all_positives=True"):
        recalls_at(best, k=1)
    assert set(summarize(best, ks=[1])) == {"median_rank", "mean_rank", "hit_rate_at_1"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_an_interval_is_that_of_a_loop_over_resampled_clusters(monkeypatch):
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 4000)
    monkeypatch.setattr(metrics, "CONFIDENCE_LEVEL", 0.8)
    values, clusters = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]), torch.tensor([7, 7, 3, 3, 5])
    members = [[0.0], [1.0, 1.0], [1.0, 0.0]]  # in another order: samples are uniform
    samples = torch.randint(3, (4000, 3), generator=generator(1)).tolist()
    means = []
    for sample in samples:
        sampled = [value for cluster in sample for value in members[cluster]]
        means.append(sum(sampled) / len(sampled))
    interval = mean_with_interval(values, clusters=clusters)
    wanted = torch.tensor(means).quantile(torch.tensor([0.1, 0.9])).tolist()
    # The 27 possible means are far apart, so quantiles of 4,000 samples are the same ones.
    assert [interval["low"], interval["high"]] == pytest.approx(wanted, abs=1e-6)


def test_an_interval_covers_what_the_central_limit_says():
    values = (torch.rand(2000, generator=generator(4)) < 0.3).double()
    interval = mean_with_interval(values)
    assert mean_with_interval(values) == interval
    half = 1.96 * float(values.std()) / math.sqrt(2000)
    # An end is a quantile of 1,000 resamples: its standard error is 7 % of the half width.
    assert interval["low"] == pytest.approx(float(values.mean()) - half, abs=0.2 * half)
    assert interval["high"] == pytest.approx(float(values.mean()) + half, abs=0.2 * half)
