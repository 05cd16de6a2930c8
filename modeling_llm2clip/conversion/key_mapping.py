"""Rules that turn the names and shapes of one code base into those of another; every key counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..model_folders.weights import LazyTensor

Make = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """Where the keys that match a pattern go.

    Attributes:
        pattern: Regular expression for a whole key.
        targets: Pairs of a name in the new model, with `\\1` for a group of the pattern, and what
            is made of the tensor. Several for a matrix that is split.
    """

    pattern: str
    targets: tuple[tuple[str, Make], ...]


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
    """What rules made of the weights of a source.

    Attributes:
        weights: By their names in the new model.
        origins: Name in the new model → key of the source that it was made from.
        dropped: Key of the source → why it is not needed.
    """

    weights: dict[str, LazyTensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def add(self, other: RenamedWeights) -> None:
        """Add what other rules made of another source.

        Args:
            other: Its weights.
        """
        self.weights |= other.weights
        self.origins |= other.origins
        self.dropped |= other.dropped


def keep(tensor: Tensor) -> Tensor:
    """Return the tensor itself: what most rules make of it.

    Args:
        tensor: A weight.
    """
    return tensor


def rename(pattern: str, target: str, make: Make = keep) -> Rule:
    """Return a rule with one target.

    Args:
        pattern: As in `Rule`.
        target: Name in the new model, with `\\1` for a group of the pattern.
        make: What is made of the tensor.
    """
    return Rule(pattern, ((target, make),))


def apply_rules(
    tensors: Mapping[str, LazyTensor],
    rules: Iterable[Rule],
    drops: Iterable[Drop],
    *,
    source: str,
) -> RenamedWeights:
    """Rename every tensor of a source.

    Args:
        tensors: Key → tensor.
        rules: The first that matches a key counts.
        drops: Keys to leave out; they win over rules.
        source: How errors name the source.

    Raises:
        ValueError: No rule and no drop matches a key, all of which are listed; or two keys would
            become one weight.
    """
    rules, drops, result = tuple(rules), tuple(drops), RenamedWeights()
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
            f"known to be unnecessary, so nothing is converted:\n  {listed}\nGive the checkpoint's "
            "own source format, or report these keys."
        )
    return result


def _apply(rule: Rule, key: str, tensor: LazyTensor, result: RenamedWeights, source: str) -> None:
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
