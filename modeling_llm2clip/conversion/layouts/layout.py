"""The description of a layout, and functions that several layouts share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from ...configs.source_format import SourceFormat

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from ...model_folders.weights import LazyTensor

    Tensors: TypeAlias = Mapping[str, LazyTensor]
    Make: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """A pattern of keys and the names that they get.

    Attributes:
        pattern: Regular expression for a whole key.
        targets: Pairs of a name in the new model, with a backslash and a number for a group of the
            pattern, and a function that changes the tensor, or None. Several for a matrix that is
            split.
    """

    pattern: str
    targets: tuple[tuple[str, Make | None], ...]


@dataclass(frozen=True)
class Drop:
    """Keys that are left out on purpose.

    Attributes:
        pattern: Regular expression for a whole key.
        reason: Why the model does not need them.
    """

    pattern: str
    reason: str


@dataclass
class RenamedWeights:
    """The weights of a source after its rules.

    Attributes:
        weights: Weights by their names in the new model.
        origins: Name in the new model → key of the source that it was made from.
        dropped: Key of the source → why it is not needed.
    """

    weights: dict[str, LazyTensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A family of checkpoints: its keys, and the facts that no key shows.

    Attributes:
        choice: Name of its source format, as users choose it.
        source_options: Options of `source_format`; its `layout` names the family.
        marks: Keys that this family has and no other.
        adapter_prefix: Prefix of the keys of the text adapter.
        rules: Rules for the vision tower and its projection.
        make_vision_config: Makes the tower's configuration of weights, source format and the
            checkpoint's own configuration, which is None where it has none.
        drops: Keys left out, with the reason.
        options: Fields of `SourceFormat` that this family has and others may not have.
        activations: Activations that its vision towers may have.
        needs_timm: Its vision tower is a network of timm.
        has_projection: False where the tower's embedding is the image's embedding; the projection
            then becomes the identity.
        projection_bias: The image projection has a bias.
        llm_prefix: Prefix of the keys of the LLM, where a checkpoint may hold it.
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
        """Source format of the official checkpoints, made when it is used: it imports pydantic."""
        return SourceFormat(**self.source_options)

    @property
    def name(self) -> str:
        """Name of the family."""
        return str(self.source_options["layout"])


def rename(pattern: str, target: str, make: Make | None = None) -> Rule:
    """Return a rule with one target."""
    return Rule(pattern, ((target, make),))


def apply_rules(
    tensors: Mapping[str, LazyTensor], rules: Iterable[Rule], drops: Iterable[Drop], *, source: str
) -> RenamedWeights:
    """Rename every tensor of a source; the first rule that matches a key counts, drops win."""
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
                    "file is a mixture of two layouts; remove the keys that are not the model's."
                )
            result.weights[name] = tensor if make is None else tensor.then(make)
            result.origins[name] = key
    if unaccounted:
        listed = "\n  ".join(sorted(unaccounted))
        raise ValueError(
            f"{source} has {len(unaccounted)} of {len(tensors)} keys that are neither used nor "
            f"known to be unnecessary, so nothing is converted:\n  {listed}\nGive the checkpoint's "
            "own source format, or report these keys."
        )
    return result


def count_blocks(tensors: Tensors, pattern: str) -> int:
    """Count blocks by the keys `pattern.format(0)`, `pattern.format(1)`, …"""
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    return count


def square_side(num_patches: int) -> int:
    """Return the side of a square of patches."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"The vision tower has positions for {num_patches} patches, which do not make a square "
            "image. Official checkpoints have square ones only."
        )
    return side


def count_heads(width: int, source_format: SourceFormat) -> int:
    """Return the number of attention heads, which no weight shows."""
    if width % source_format.head_width:
        raise ValueError(
            f"The vision tower is {width} wide, which heads of {source_format.head_width} do not "
            "divide. Give the head width that it was trained with."
        )
    return width // source_format.head_width


def find_ratio(part: int, whole: int) -> float:
    """Return a ratio for which `int(whole * ratio)` is `part` in spite of rounding."""
    return (part + 0.5) / whole


def make_timm_config(architecture: str, model_args: dict[str, Any]) -> PreTrainedConfig:
    """Describe a timm network with every size stated, so that no default of its architecture
    counts."""
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
