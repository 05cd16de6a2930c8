"""Caption retrieval accuracy: does a text encoder tell the captions of one image from others?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...data.caption_groups import CaptionGroup
from ..metrics.correspondence import Correspondence
from ..metrics.ranking import rank_retrieval
from ..metrics.scores import hit_rate_at


def measure_caption_retrieval(
    encode: Callable[[list[str]], Tensor], groups: Sequence[CaptionGroup]
) -> float:
    """Compute the caption retrieval accuracy (CRA) of a text encoder.

    The first caption of each image looks for the second one of the same image among the second
    captions of all images; the share that finds it at rank 1, by cosine, is the accuracy (paper,
    section 2; upstream's COCO evaluation). More images make it harder: name their number with
    the figure.

    Args:
        encode: texts to embeddings, (N, D) of any float dtype.
        groups: at least two images, each with two captions.
    """
    if len(groups) < 2:
        raise ValueError(f"Caption retrieval needs two images or more; got {len(groups)}.")
    group_ids = [group.group_id for group in groups]
    embeddings = encode([g.captions[0] for g in groups] + [g.captions[1] for g in groups])
    first, second = embeddings[: len(groups)], embeddings[len(groups) :]
    # First captions stand where images would.
    ranking = rank_retrieval(first, second, Correspondence.from_group_ids(group_ids, group_ids))
    return hit_rate_at(ranking.i2t, k=1)
