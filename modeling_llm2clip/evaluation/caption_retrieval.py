"""Caption retrieval accuracy: does a text encoder tell the captions of one picture from others?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..data.caption_groups import CaptionGroup
from .metrics.correspondence import Correspondence
from .metrics.ranking import rank_both_ways
from .metrics.scores import hit_rate_at


def measure_caption_retrieval(
    encode: Callable[[list[str]], Tensor], groups: Sequence[CaptionGroup]
) -> float:
    """Compute the caption retrieval accuracy (CRA) of a text encoder.

    The first caption of each picture looks for the second one of the same picture among the second
    captions of all pictures; the share that finds it at rank 1, by cosine, is the accuracy (paper,
    section 2; upstream's COCO evaluation). More pictures make it harder: name their number with
    the figure.

    Args:
        encode: texts to vectors, (N, D) of any float dtype.
        groups: at least two pictures, each with two captions.
    """
    if len(groups) < 2:
        raise ValueError(f"Caption retrieval needs two pictures or more; got {len(groups)}.")
    keys = [group.key for group in groups]
    vectors = encode([g.captions[0] for g in groups] + [g.captions[1] for g in groups])
    first, second = vectors[: len(groups)], vectors[len(groups) :]
    # First captions stand where pictures would.
    ranking = rank_both_ways(first, second, Correspondence.from_keys(keys, keys))
    return hit_rate_at(ranking.image_to_text, k=1)
