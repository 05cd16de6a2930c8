"""Caption retrieval accuracy (CRA): does a text encoder match the captions of one image?

The first caption of each image retrieves the second one of the same image from the second captions
of all images; the share that finds it at rank 1, by cosine, is the accuracy (paper, section 2;
upstream's COCO evaluation). More images make it harder, so a score needs their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...data.captions.caption_groups import CaptionGroup
from ..datasets.retrieval_dataset import RetrievalDataset
from ..encoders.encoder import Encoder
from ..metrics.correspondence import Correspondence
from ..metrics.ranking import TIE_RULE, RetrievalRanks, rank_retrieval
from ..metrics.scores import hit_rate_at, hits_at
from .task import INTERVAL_PROTOCOL, Datasets, Task, TaskScores, count_texts, mean_with_interval


def measure_caption_retrieval(
    encode: Callable[[list[str]], Tensor], groups: Sequence[CaptionGroup]
) -> float:
    """Compute the caption retrieval accuracy of a text encoder.

    Args:
        encode: Makes embeddings of texts, (N, D) of any float dtype.
        groups: At least two images, each with two captions.

    Raises:
        ValueError: There are fewer than two images.
    """
    if len(groups) < 2:
        raise ValueError(f"Caption retrieval needs two images or more; got {len(groups)}.")
    return hit_rate_at(_rank_captions(encode(_list_pairs(groups))).i2t, k=1)


def _list_pairs(groups: Sequence[CaptionGroup]) -> list[str]:
    """List the first captions of all images, then the second ones."""
    return [group.captions[number] for number in (0, 1) for group in groups]


def _rank_captions(embeds: Tensor) -> RetrievalRanks:
    """Rank second captions for first ones, which are in the place of images, and vice versa."""
    number = len(embeds) // 2
    own = Correspondence.from_image_of_text(range(number), number)
    return rank_retrieval(embeds[:number], embeds[number:], own)


def _run_cra(encoder: Encoder, datasets: Datasets) -> TaskScores:
    """Compute the accuracy, and that of the other direction."""
    groups = _require_pairs(datasets)
    texts = encoder.encode_texts(_list_pairs(groups))
    found = _rank_captions(texts.embeds)
    return TaskScores(
        {
            "cra": mean_with_interval(hits_at(found.i2t, k=1)),
            "second_to_first": mean_with_interval(hits_at(found.t2i, k=1)),
            "chance": 1 / len(groups),
        },
        {"images": len(groups), **count_texts(texts)},
    )


def _require_pairs(datasets: Datasets) -> list[CaptionGroup]:
    """Return the captions of each image; raise ValueError if one has a single caption."""
    [dataset] = datasets
    assert isinstance(dataset, RetrievalDataset)
    groups = dataset.group_captions()
    lonely = [group.group_id for group in groups if len(group.captions) < 2]
    if lonely or len(groups) < 2:
        raise ValueError(
            f"{dataset.name}: CRA needs two captions of every image, and two images. "
            f"{len(lonely)} of {len(groups)} have only one: {lonely[:5]}."
        )
    return groups


CRA = Task(
    name="cra",
    title="caption retrieval accuracy of a text encoder alone",
    dataset_types=("captions", "retrieval"),
    needs_images=False,
    all_languages=False,
    protocol={
        "similarity": "cosine",
        "ties": TIE_RULE,
        "queries": "first caption of every image",
        "candidates": "second caption of every image",
        "interval": INTERVAL_PROTOCOL,
    },
    headline={"CRA": ("cra", "value")},
    chance={"CRA": ("chance",)},
    run=_run_cra,
    check=_require_pairs,
)
