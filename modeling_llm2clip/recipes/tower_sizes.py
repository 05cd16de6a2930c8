"""Sizes of towers, as far as their files state them without being loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError

from ..building.pretrained_towers import EMBEDDED, PretrainedTower, find_tower
from ..data.safetensors_files import read_shapes
from ..model_folders.model_folder import explain_missing, fetch_hub_file, is_hub_id

# Where the configuration says neither image nor patch size, as of a convolutional network.
_DEFAULT_TOKENS_PER_IMAGE = 200
_VISION_PREFIX = "vision_model."


@dataclass(frozen=True)
class TowerSize:
    """Numbers of a tower.

    Attributes:
        num_parameters: Weights; None where they cannot be counted.
        width: Of its embeddings; None where its configuration does not say it.
        tokens_per_image: Patches of an image, or what a convolutional network is about worth.
    """

    num_parameters: int | None = None
    width: int | None = None
    tokens_per_image: int = _DEFAULT_TOKENS_PER_IMAGE

    def __str__(self) -> str:
        """Return the number of weights in millions or billions."""
        if self.num_parameters is None:
            return "?"
        if self.num_parameters < 1e9:
            return f"{self.num_parameters / 1e6:,.0f}M"
        return f"{self.num_parameters / 1e9:,.1f}B"


def measure_tower(source: str, *, embedded: PretrainedTower) -> TowerSize:
    """Read the size of a tower from its configuration and the headers of its weight files."""
    folder = find_tower(embedded) if source == EMBEDDED else Path(source)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        shapes = {name: shape for file in files for name, shape in read_shapes(file).items()}
        return _read_config(folder / "config.json", _count_parameters(shapes))
    if folder.exists() or not is_hub_id(source) or explain_missing(source):
        return TowerSize()
    try:
        files_metadata = get_safetensors_metadata(source).files_metadata.values()
        tensors = {name: info for file in files_metadata for name, info in file.tensors.items()}
        counted = _count_parameters({name: info.shape for name, info in tensors.items()})
    except (OSError, ValueError, NotASafetensorsRepoError):  # no Hub, no such repository or files
        counted = None
    config = fetch_hub_file(source, "config.json")
    return TowerSize(counted) if config is None else _read_config(config, counted)


def _count_parameters(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Count weights by name; of a dual encoder only those of its vision tower."""
    of_tower = {name: shape for name, shape in shapes.items() if name.startswith(_VISION_PREFIX)}
    return sum(map(math.prod, (of_tower or shapes).values())) or None


def _read_config(file: Path, num_parameters: int | None) -> TowerSize:
    config: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    config = {**config, **(config.get("vision_config") or {})}
    width = config.get("hidden_size") or config.get("num_features")
    image, patch = config.get("image_size"), config.get("patch_size")
    tokens = _DEFAULT_TOKENS_PER_IMAGE
    if isinstance(image, int) and isinstance(patch, int):
        tokens = (image // patch) ** 2 + 1
    return TowerSize(num_parameters, width if isinstance(width, int) else None, tokens)
