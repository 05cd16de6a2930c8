"""Caption retrieval accuracy (CRA): what a text encoder alone can be asked."""

from __future__ import annotations

from ...data.caption_groups import CaptionGroup
from ..datasets.schema import EvaluationSet, RetrievalDataset
from ..encoders.encoder import Encoder
from ..metrics.correspondence import Correspondence
from ..metrics.ranking import TIE_RULE, rank_retrieval
from ..metrics.scores import hits_at
from .task import INTERVAL_PROTOCOL, Task, TaskScores, count_texts, mean_with_interval


def run_cra(encoder: Encoder, sets: tuple[EvaluationSet, ...]) -> TaskScores:
    """The first caption of each image looks for the second among those of all images.

    As `evaluation.caption_retrieval.measure_caption_retrieval`, and in the other direction too.

    Raises: ValueError naming images with one caption only.
    """
    groups = group_in_pairs(sets)
    number = len(groups)
    texts = encoder.encode_texts([g.captions[i] for i in (0, 1) for g in groups])
    first, second = texts.embeds[:number], texts.embeds[number:]
    own = Correspondence.from_image_of_text(range(number), number)
    found = rank_retrieval(first, second, own)
    return TaskScores(
        {
            "cra": mean_with_interval(hits_at(found.i2t, k=1)),
            "second_to_first": mean_with_interval(hits_at(found.t2i, k=1)),
            "chance": 1 / number,
        },
        {"images": number, **count_texts(texts)},
    )


def group_in_pairs(sets: tuple[EvaluationSet, ...]) -> list[CaptionGroup]:
    """The captions of each image, of which there are at least two.

    Raises: ValueError naming images with one caption only.
    """
    (data,) = sets
    assert isinstance(data, RetrievalDataset)
    groups = data.group_captions()
    lonely = [group.group_id for group in groups if len(group.captions) < 2]
    if lonely or len(groups) < 2:
        raise ValueError(
            f"{data.name}: CRA needs two captions of every image, and two images. "
            f"{len(lonely)} of {len(groups)} have one only: {lonely[:5]}."
        )
    return groups


CRA = Task(
    name="cra",
    title="caption retrieval accuracy of a text encoder alone",
    kinds=("captions", "retrieval"),
    needs_images=False,
    languages=False,
    protocol={
        "similarity": "cosine",
        "ties": TIE_RULE,
        "queries": "first caption of every image",
        "candidates": "second caption of every image",
        "interval": INTERVAL_PROTOCOL,
    },
    headline={"CRA": ("cra", "value")},
    chance={"CRA": ("chance",)},
    run=run_cra,
    check=group_in_pairs,
)
