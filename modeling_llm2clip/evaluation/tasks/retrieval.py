"""Score retrieval between images and captions, in one or all languages, and among captions.

With several languages, the captions of each language are compared only with that language's images.

Caption retrieval accuracy (CRA) measures a text encoder. The first caption of each image retrieves
the second caption of the same image, by cosine, from the second captions of all images. The
accuracy is the share of second captions found at rank 1 (paper, section 2; upstream's COCO
evaluation). More images make the task harder, so a score is meaningful only with the number of
images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...data.captions.caption_groups import CaptionGroup
from ..datasets.retrieval_dataset import RetrievalDataset
from ..encoders.encoder import EvaluationEncoder
from ..metrics.correspondence import Correspondence
from ..metrics.ranking import Ranking, RetrievalRanks, rank_retrieval
from ..metrics.scores import (
    hit_rate_at,
    hits_at,
    mean_of_means_with_interval,
    mean_with_interval,
    summarize,
)
from .task import BY_COSINE, Datasets, Task, TaskScores, count_texts, describe_interval

_KS = (1, 5, 10)
_PROTOCOL = {
    **BY_COSINE,
    "hit_rate_at_k": "a positive is among the first k: R@K of CLIP papers",
    "recall_at_k": "share of the positives among the first k",
    "interval": describe_interval("groups of images that share their captions"),
}
# The ranking of each direction, and the group of each query. Images that share captions succeed and
# fail together, as do the captions of an image, so confidence intervals resample whole groups.
_Directions: TypeAlias = Mapping[str, tuple[Ranking, Tensor]]


def _run_retrieval(encoder: EvaluationEncoder, datasets: Datasets) -> TaskScores:
    [dataset] = datasets
    assert isinstance(dataset, RetrievalDataset)
    directions, counts = _rank(encoder, dataset)
    return TaskScores(_score(directions), counts)


def _run_cross_lingual(encoder: EvaluationEncoder, datasets: Datasets) -> TaskScores:
    scores: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    hits: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for dataset in datasets:
        assert isinstance(dataset, RetrievalDataset)
        directions, counts[dataset.lang] = _rank(encoder, dataset)
        scores[dataset.lang] = _score(directions)
        # A group has the same number in all languages.
        of_groups = [numbers.setdefault(g, len(numbers)) for g in dict.fromkeys(dataset.group_ids)]
        for name, (ranking, groups) in directions.items():
            numbered = torch.tensor(of_groups)[groups]
            for k in _KS:
                hits.setdefault((name, k), []).append((hits_at(ranking, k=k), numbered))
    mean = {direction: _average(scores, direction) for direction in directions}
    for direction, of_mean in mean.items():
        of_mean["intervals"] = {
            f"hit_rate_at_{k}": mean_of_means_with_interval(hits[direction, k]) for k in _KS
        }
    return TaskScores({"mean": mean, "languages": scores}, {"languages": counts})


def compute_chance(ranking: Ranking) -> float:
    """Compute the hit rate at 1 of random embeddings."""
    return float((ranking.num_positives.double() / ranking.num_candidates).mean())


def _rank(
    encoder: EvaluationEncoder, dataset: RetrievalDataset
) -> tuple[_Directions, dict[str, Any]]:
    correspondence = dataset.correspondence
    texts = encoder.encode_texts(dataset.captions)
    images = encoder.encode_images(dataset.images, names=dataset.image_names)
    ranks = rank_retrieval(
        images, texts.embeds, correspondence, all_positives=True, device=encoder.ranking_device
    )
    counts: dict[str, Any] = {"images": len(images), **count_texts(texts)}
    groups = dataset.number_groups()
    directions = {
        "t2i": (ranks.t2i, groups[correspondence.image_of_text]),
        "i2t": (ranks.i2t, groups),
    }
    return directions, counts


def _score(directions: _Directions) -> dict[str, Any]:
    return {
        name: {
            **summarize(ranking, ks=_KS),
            "chance_hit_rate_at_1": compute_chance(ranking),
            "intervals": {
                f"hit_rate_at_{k}": mean_with_interval(hits_at(ranking, k=k), clusters=groups)
                for k in _KS
            },
        }
        for name, (ranking, groups) in directions.items()
    }


def _average(scores: Mapping[str, Any], direction: str) -> dict[str, Any]:
    of_languages = [of_language[direction] for of_language in scores.values()]
    names = [name for name, value in of_languages[0].items() if isinstance(value, float)]
    return {name: fmean(numbers[name] for numbers in of_languages) for name in names}


_COLUMNS = {"text to image R@1": "t2i", "image to text R@1": "i2t"}

RETRIEVAL = Task(
    name="retrieval",
    title="images by caption, and captions by image",
    dataset_types=("retrieval",),
    needs_images=True,
    protocol=_PROTOCOL,
    headline={title: (name, "hit_rate_at_1") for title, name in _COLUMNS.items()},
    chance={title: (name, "chance_hit_rate_at_1") for title, name in _COLUMNS.items()},
    run=_run_retrieval,
)

CROSS_LINGUAL = Task(
    name="cross-lingual",
    title="retrieval in every language of a dataset, and the mean",
    dataset_types=("retrieval",),
    needs_images=True,
    all_languages=True,
    protocol={**_PROTOCOL, "mean": "over languages, each with the same weight"},
    headline={title: ("mean", name, "hit_rate_at_1") for title, name in _COLUMNS.items()},
    chance={title: ("mean", name, "chance_hit_rate_at_1") for title, name in _COLUMNS.items()},
    run=_run_cross_lingual,
)


def measure_caption_retrieval(
    encode: Callable[[list[str]], Tensor], groups: Sequence[CaptionGroup]
) -> float:
    """Compute the CRA of `encode`, which maps N texts to (N, D), on two or more images."""
    if len(groups) < 2:
        raise ValueError(f"Caption retrieval needs at least two images, but got {len(groups)}.")
    return hit_rate_at(rank_pairs(encode(_list_pairs(groups))).i2t, k=1)


def _list_pairs(groups: Sequence[CaptionGroup]) -> list[str]:
    return [group.captions[number] for number in (0, 1) for group in groups]


def rank_pairs(embeds: Tensor, *, device: torch.device | None = None) -> RetrievalRanks:
    """Rank the second texts for each first text, which takes the place of an image, and vice versa.

    `embeds` is (2N, D): all first texts, then all second texts. `device` defaults to the device of
    `embeds`.
    """
    num_pairs = len(embeds) // 2
    pairs = Correspondence.from_image_of_text(range(num_pairs), num_pairs)
    return rank_retrieval(embeds[:num_pairs], embeds[num_pairs:], pairs, device=device)


def _run_cra(encoder: EvaluationEncoder, datasets: Datasets) -> TaskScores:
    groups = _require_pairs(datasets)
    texts = encoder.encode_texts(_list_pairs(groups))
    ranks = rank_pairs(texts.embeds, device=encoder.ranking_device)
    return TaskScores(
        {
            "cra": mean_with_interval(hits_at(ranks.i2t, k=1)),
            "second_to_first": mean_with_interval(hits_at(ranks.t2i, k=1)),
            "chance": 1 / len(groups),
        },
        {"images": len(groups), **count_texts(texts)},
    )


def _require_pairs(datasets: Datasets) -> list[CaptionGroup]:
    """Return the captions of each image; raise ValueError if an image has only one caption."""
    [dataset] = datasets
    assert isinstance(dataset, RetrievalDataset)
    groups = dataset.group_captions()
    single = [group.group_id for group in groups if len(group.captions) < 2]
    if single or len(groups) < 2:
        raise ValueError(
            f"{dataset.name}: CRA needs at least two images, each with two captions. "
            f"{len(single)} of {len(groups)} images have only one caption: {single[:5]}."
        )
    return groups


CRA = Task(
    name="cra",
    title="caption retrieval accuracy of the text encoder",
    dataset_types=("captions", "retrieval"),
    needs_images=False,
    protocol={
        **BY_COSINE,
        "queries": "first caption of every image",
        "candidates": "second caption of every image",
        "interval": describe_interval("images"),
    },
    headline={"CRA": ("cra", "value")},
    chance={"CRA": ("chance",)},
    run=_run_cra,
    check=_require_pairs,
)
