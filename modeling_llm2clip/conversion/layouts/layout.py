"""What a layout describes, and what the layouts share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ...configs.source_format import SourceFormat
from ...model_folders.weights import LazyTensor
from ..key_mapping import Drop, Rule

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Layout:
    """How a family of checkpoints names its weights.

    Attributes:
        name: As a source format calls it.
        marks: Keys that this family has and no other.
        adapter_prefix: What the keys of the text adapter begin with.
        rules: For the vision tower and its projection.
        drops: Keys left out, with the reason.
        make_vision_config: Makes the tower's configuration of weights, source format and the
            checkpoint's own configuration, which is None where it has none.
        has_projection: False where the tower's embedding is the image's embedding; the projection
            then becomes the identity.
        projection_bias: Whether the image projection has a bias.
        llm_prefix: What the keys of the LLM begin with, where a checkpoint may hold it.
    """

    name: str
    marks: tuple[str, ...]
    adapter_prefix: str
    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...]
    make_vision_config: Callable[[Tensors, SourceFormat, PreTrainedConfig | None], PreTrainedConfig]
    has_projection: bool = True
    projection_bias: bool = False
    llm_prefix: str | None = None


def count_blocks(tensors: Tensors, pattern: str) -> int:
    """Count blocks by the keys `pattern.format(0)`, `pattern.format(1)`, …

    Args:
        tensors: The checkpoint's weights.
        pattern: Key of one weight of a block, with `{}` for its number.
    """
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    return count


def square_side(num_patches: int) -> int:
    """Return the side of a square of patches.

    Args:
        num_patches: Number of patches.

    Raises:
        ValueError: They do not make a square.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"The vision tower has positions for {num_patches} patches, which do not make a square "
            "image. Official checkpoints have square ones only."
        )
    return side


def count_heads(width: int, source_format: SourceFormat) -> int:
    """Return the number of attention heads, which no weight shows.

    Args:
        width: Width of the vision tower.
        source_format: States the width of a head.

    Raises:
        ValueError: The width of a head does not divide the tower's.
    """
    if width % source_format.head_width:
        raise ValueError(
            f"The vision tower is {width} wide, which heads of {source_format.head_width} do not "
            "divide. Give the head width that it was trained with."
        )
    return width // source_format.head_width


def find_ratio(part: int, whole: int) -> float:
    """Return a ratio from which `int(whole * ratio)` gives back `part`, whatever the rounding.

    Args:
        part: Width of a layer.
        whole: Width of the tower.
    """
    return (part + 0.5) / whole


def make_timm_config(architecture: str, model_args: dict[str, Any]) -> PreTrainedConfig:
    """Describe a timm network with every size stated, whatever the architecture's own are.

    Args:
        architecture: timm's name of it.
        model_args: What differs from it.
    """
    from transformers import TimmWrapperConfig  # needs timm

    config: PreTrainedConfig = TimmWrapperConfig.from_dict(
        {
            "architecture": architecture,
            "model_args": model_args,
            "num_classes": 0,
            "label_names": [],
        }
    )
    return config
