"""What every layout says of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ...configs.source_format import SourceFormat
from ..key_mapping import Drop, Rule
from ..lazy_tensors import LazyTensor

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Layout:
    """A family's names.

    Attributes:
        name: one of `recipes.LAYOUTS`.
        marks: keys that this family has and no other.
        adapter_prefix: in front of the text adapter's own names.
        rules: of the vision tower and its projection.
        drops: keys left out, with the reason.
        make_vision_config: from weights, recipe and the checkpoint's own configuration, which is
            None where it has none.
        has_projection: False where the tower's embedding is the image's embedding; the projection
            then becomes the identity.
        projection_bias: whether the image projection has a bias.
        llm_prefix: in front of the LLM's names, where a checkpoint may hold it.
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
    """Count blocks by the keys `pattern.format(0)`, `pattern.format(1)`, …"""
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    return count


def square_side(num_patches: int) -> int:
    """Return the side of a square of patches.

    Raises: ValueError when they make no square.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"The vision tower has positions for {num_patches} patches, which make no square "
            "image. Only square ones are known of official checkpoints."
        )
    return side


def count_heads(width: int, recipe: SourceFormat) -> int:
    """Return the number of attention heads, which no weight tells.

    Raises: ValueError when the recipe's head width does not divide the tower's.
    """
    if width % recipe.head_width:
        raise ValueError(
            f"The vision tower is {width} wide, which heads of {recipe.head_width} do not divide. "
            "Give the head width that it was trained with."
        )
    return width // recipe.head_width


def share(part: int, whole: int) -> float:
    """Return a ratio from which `int(whole * ratio)` gives back `part`, whatever the rounding."""
    return (part + 0.5) / whole


def make_timm_config(architecture: str, model_args: dict[str, Any]) -> PreTrainedConfig:
    """Describe a timm network with every size stated, whatever the architecture's own are."""
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
