"""How much of a test a model was trained on: of the package's own emoji, where it is known."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ..data.trained_emoji import TrainedEmoji, match_emoji
from .datasets.schema import EvaluationSet, RetrievalDataset

FIELD = "trained_on"


def state_training(
    protocol: dict[str, Any], sets: Sequence[EvaluationSet], trained: TrainedEmoji | None
) -> None:
    """Write into the protocol of each set of emoji how many of its images the model has seen.

    Args:
        protocol: as `results.build_protocol` makes it; its `data` is added to.
        trained: what the model's folder says; None where it says nothing.
    """
    for data in sets:
        counted = count_trained(data, trained)
        if counted is not None:
            of_data = protocol["data"]
            of_data = of_data["languages"][data.lang] if "languages" in of_data else of_data
            of_data[FIELD] = counted


def count_trained(data: EvaluationSet, trained: TrainedEmoji | None) -> dict[str, Any] | None:
    """How many images of a set show what was trained on; None for a set without emoji.

    Returns: `images`, null where nothing is known; `of`, all images of the set; `is_complete`,
        whether the training may have seen more.
    """
    if not isinstance(data, RetrievalDataset):
        return None
    texts = data.correspondence.texts_of_images()
    names = zip(data.image_group_ids or data.image_names, data.image_names, strict=True)
    group_ids = [
        match_emoji(called, [data.captions[row] for row in texts.of(image).tolist()])
        for image, called in enumerate(names)
    ]
    if not any(group_ids):
        return None
    seen = None if trained is None else sum(group_id in trained.keys for group_id in group_ids)
    is_complete = trained is not None and trained.is_complete
    return {"images": seen, "of": len(group_ids), "is_complete": is_complete}


def warn_of_training(model: str, set_name: str, protocol: dict[str, Any]) -> None:
    """Warn when a model was trained on a part of a set."""
    data = protocol["data"]
    for part in data.get("languages", {"": data}).values():
        counted = part.get(FIELD)
        if counted and counted["images"]:
            warnings.warn(
                f"{model} was trained on {write_trained(counted)} images of {set_name}: its "
                "scores there are no test of what it has not seen.",
                stacklevel=4,  # where `evaluate` is called
            )
            return


def write_trained(counted: dict[str, Any] | None) -> str:
    """In words, as in `249 of 300`."""
    if counted is None:
        return "–"
    if counted["images"] is None:
        return "unknown"
    least = "" if counted["is_complete"] else "at least "
    return f"{least}{counted['images']} of {counted['of']}"
