"""Rules that turn the names and shapes of one code base into those of another; every key counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .lazy_tensors import LazyTensor

Make = Callable[[Tensor], Tensor]


def keep(tensor: Tensor) -> Tensor:
    """Leave a tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Rule:
    """Where the keys that match go.

    Attributes:
        pattern: matches a whole key.
        targets: name in the new model, with `\\1` for a group of the pattern, and what is made of
            the tensor. Several for a matrix that is split.
    """

    pattern: str
    targets: tuple[tuple[str, Make], ...]


@dataclass(frozen=True)
class Drop:
    """Keys that are left out on purpose."""

    pattern: str
    reason: str


@dataclass
class Renamed:
    """What a set of rules made of a source.

    Attributes:
        weights: by their names in the new model.
        origins: key of the source that each was made from.
        dropped: key of the source → why it is not needed.
    """

    weights: dict[str, LazyTensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def add(self, other: Renamed) -> None:
        """Take in what other rules made of another source."""
        self.weights |= other.weights
        self.origins |= other.origins
        self.dropped |= other.dropped


def rename(pattern: str, target: str, make: Make = keep) -> Rule:
    """Write a rule with one target."""
    return Rule(pattern, ((target, make),))


def apply_rules(
    tensors: Mapping[str, LazyTensor],
    rules: Iterable[Rule],
    drops: Iterable[Drop],
    *,
    source: str,
) -> Renamed:
    """Rename every tensor of a source.

    Raises: ValueError listing in full the keys that no rule uses and no drop explains, or two
        keys that would become one weight.
    """
    rules, drops, result = tuple(rules), tuple(drops), Renamed()
    unaccounted = []
    for key, tensor in tensors.items():
        reason = next((drop.reason for drop in drops if re.fullmatch(drop.pattern, key)), None)
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, key)), None)
        if reason is not None:
            result.dropped[key] = reason
        elif rule is None:
            unaccounted.append(f"{key} {tensor.shape}")
        else:
            _apply(rule, key, tensor, result, source)
    if unaccounted:
        listed = "\n  ".join(sorted(unaccounted))
        raise ValueError(
            f"{source} has {len(unaccounted)} of {len(tensors)} keys that are neither used nor "
            f"known to be needless, so nothing is converted:\n  {listed}\nGive the checkpoint's "
            "own recipe, or report them."
        )
    return result


def _apply(rule: Rule, key: str, tensor: LazyTensor, result: Renamed, source: str) -> None:
    match = re.fullmatch(rule.pattern, key)
    assert match is not None
    for template, make in rule.targets:
        target = match.expand(template)
        if target in result.weights:
            raise ValueError(
                f"{source}: {result.origins[target]} and {key} would both become {target}. The "
                "file is a mixture of two layouts; remove the keys that are not the model's."
            )
        result.weights[target] = tensor.then(make)
        result.origins[target] = key
