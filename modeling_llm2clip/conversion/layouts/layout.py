"""Defines what a layout is, and the functions that several layouts share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from ...configs.export_config import SourceFormat

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from ...model_folders.weights import LazyTensor

    Tensors: TypeAlias = Mapping[str, LazyTensor]
    Make: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """A pattern of keys, and new names for the matching weights.

    Attributes:
        pattern: Regular expression for a whole key.
        targets: Pairs of a name in the new model and a function that transforms the tensor, or
            None. The name may refer to groups of the pattern (such as a backslash and 1). A matrix
            that is split has several pairs.
    """

    pattern: str
    targets: tuple[tuple[str, Make | None], ...]


@dataclass(frozen=True)
class Drop:
    """Keys that are dropped on purpose.

    Attributes:
        pattern: Regular expression for a whole key.
        reason: Why the model does not need these keys.
    """

    pattern: str
    reason: str


@dataclass
class RenamedWeights:
    """The weights of a source after applying its rules.

    Attributes:
        weights: Weights by their names in the new model.
        origins: Name in the new model → key in the source.
        dropped: Key in the source → reason for dropping it.
    """

    weights: dict[str, LazyTensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A family of checkpoints: the keys, and properties that the keys do not reveal.

    Attributes:
        choice: Name of the family's source format for users.
        source_options: Fields of `source_format`; the field `layout` has the family's name.
        marks: Keys that only this family has.
        adapter_prefix: Prefix of the text adapter's keys.
        rules: Rules for the vision tower and its projection.
        make_vision_config: Function that makes the tower's configuration from the weights, the
            source format and the checkpoint's own configuration (None if there is none).
        drops: Keys to drop, with the reasons.
        options: Fields of `SourceFormat` that apply to this family, but not to every family.
        activations: Activation functions that the family's vision towers may have.
        needs_timm: Whether the vision tower is a timm network.
        has_projection: False if the tower's output is the image embedding; the projection is then
            the identity.
        projection_bias: Whether the image projection has a bias.
        llm_prefix: Prefix of the LLM's keys, if a checkpoint can contain the LLM.
    """

    choice: str
    source_options: Mapping[str, Any]
    marks: tuple[str, ...]
    adapter_prefix: str
    rules: tuple[Rule, ...]
    make_vision_config: Callable[[Tensors, SourceFormat, PreTrainedConfig | None], PreTrainedConfig]
    drops: tuple[Drop, ...] = ()
    options: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("quick_gelu", "gelu", "silu")
    needs_timm: bool = False
    has_projection: bool = True
    projection_bias: bool = False
    llm_prefix: str | None = None

    @cached_property
    def source_format(self) -> SourceFormat:
        """Source format of the official checkpoints; lazy, because it imports pydantic."""
        return SourceFormat(**self.source_options)

    @property
    def name(self) -> str:
        """Name of the family."""
        return str(self.source_options["layout"])


def rename(pattern: str, target: str, make: Make | None = None) -> Rule:
    return Rule(pattern, ((target, make),))


def apply_rules(
    tensors: Mapping[str, LazyTensor], rules: Iterable[Rule], drops: Iterable[Drop], *, source: str
) -> RenamedWeights:
    """Rename every tensor of a source by the first matching rule; drops take precedence."""
    rules, drops, result = tuple(rules), tuple(drops), RenamedWeights()
    unaccounted = []
    for key, tensor in tensors.items():
        reason = next((drop.reason for drop in drops if re.fullmatch(drop.pattern, key)), None)
        if reason is not None:
            result.dropped[key] = reason
            continue
        matches = ((match, rule) for rule in rules if (match := re.fullmatch(rule.pattern, key)))
        match, rule = next(matches, (None, None))
        if match is None or rule is None:
            unaccounted.append(f"{key} {tensor.shape}")
            continue
        for name, make in ((match.expand(target), make) for target, make in rule.targets):
            if name in result.weights:
                raise ValueError(
                    f"{source}: {result.origins[name]} and {key} would both become {name}. The "
                    "file mixes two layouts; remove the keys that do not belong to the model."
                )
            result.weights[name] = tensor if make is None else tensor.then(make)
            result.origins[name] = key
    if unaccounted:
        listed = "\n  ".join(sorted(unaccounted))
        raise ValueError(
            f"{source} has {len(unaccounted)} of {len(tensors)} keys that are neither used nor "
            f"known to be unnecessary, so nothing is converted:\n  {listed}\nChoose the "
            "checkpoint's own source format, or report these keys."
        )
    return result


def count_blocks(tensors: Tensors, pattern: str) -> int:
    """Count the blocks whose keys are `pattern.format(0)`, `pattern.format(1)`, …"""
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    return count


def square_side(num_patches: int) -> int:
    """Return the number of patches per side of a square image."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"The vision tower has positions for {num_patches} patches, which do not form a square "
            "image. Official checkpoints only take square images."
        )
    return side


def count_heads(width: int, source_format: SourceFormat) -> int:
    """Return the number of attention heads, which the weights do not reveal."""
    if width % source_format.head_width:
        raise ValueError(
            f"head_width={source_format.head_width} does not divide the vision tower's width of "
            f"{width}. Use the head width that it was trained with."
        )
    return width // source_format.head_width


def find_ratio(part: int, whole: int) -> float:
    """Return a ratio for which `int(whole * ratio)` is `part` despite rounding."""
    return (part + 0.5) / whole


def make_timm_config(architecture: str, model_args: dict[str, Any]) -> PreTrainedConfig:
    """Make a timm network's configuration that sets every size, so no default applies."""
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
