"""Whether the images of an index are unlike those that its model was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..model_folders.training_images import ImageTally, read_training_images
from .index_about import About, StoredTally

_DIGITS = 4  # of a sum of numbers below 1 over all images


def describe_far_index(about: About, folder: Path) -> str | None:
    """Describe the images of an index, if they are far from those that its model was trained on."""
    training_images = read_training_images(folder)
    if training_images is None:
        return None
    return training_images.describe_far(restore_tally(about))


def restore_tally(about: About) -> ImageTally:
    """Restore the tally of the images that were encoded into an index."""
    stored = about.tally
    if stored is None:
        return ImageTally()
    return ImageTally(stored.num_images, np.asarray(stored.total))


def store_tally(tally: ImageTally) -> StoredTally | None:
    """Return a tally as an index holds it."""
    if not tally.num_images:
        return None
    return StoredTally(num_images=tally.num_images, total=np.round(tally.total, _DIGITS).tolist())
