"""Labeled images: a folder per color."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from aligning import COLORS
from PIL import Image


def write_classes(folder: Path) -> Path:
    """Images of one color each, in a folder per color."""
    for number, (name, color) in enumerate(COLORS.items()):
        for shade in range(3):
            file = folder / name / f"{number}-{shade}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(np.array(color) + 9 * shade, 0, 255).astype(np.uint8)
            Image.fromarray(np.broadcast_to(pixels, (32, 32, 3)).copy()).save(file)
    return folder
