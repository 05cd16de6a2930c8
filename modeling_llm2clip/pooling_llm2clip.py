"""Methods of text pooling, for padded and packed texts, and their names in other libraries.

The configuration reads these names, so this module does not import torch. Uploaded with the
weights. Shapes: B is the batch size, L the number of tokens, D the width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class TextPooling(NamedTuple):
    """One way to pool the hidden states of a text's tokens.

    Attributes:
        padded: Pools states (B, L, D), with a mask (B, L) of the tokens to pool, to (B, D) float32.
        packed: Pools the states (L, D) of one text's tokens to (D,).
        description: Name of the pooling in messages.
        pools_prompt: Whether the prompt's prefix is also pooled.
        sentence_transformers: Name of the pooling in sentence-transformers (`pooling_mode`).
        llm2vec: Names of the pooling in LLM2Vec (`pooling_mode`), up to two.
    """

    padded: Callable[[Tensor, Tensor], Tensor]
    packed: Callable[[Tensor], Tensor]
    description: str
    pools_prompt: bool = False
    sentence_transformers: str | None = None
    llm2vec: tuple[str, ...] = ()


def _take(states: Tensor, places: Tensor) -> Tensor:
    """Take the state of one token per text: (B, L, D) at positions (B,) to (B, D)."""
    places = places[:, None, None].expand(-1, 1, states.shape[2])
    return states.gather(1, places).squeeze(1).float()


def _average(states: Tensor, weights: Tensor) -> Tensor:
    # One matrix product per row computes the weighted sum without a (B, L, D) float32 copy.
    summed = weights.unsqueeze(1).bmm(states.float()).squeeze(1)
    return summed / weights.sum(dim=1, keepdim=True)


def _average_by_position(states: Tensor) -> Tensor:
    weights = states.new_ones(len(states)).cumsum(0)
    return weights @ states / weights.sum()


# Models built on an LLM use the first two; embedders use the others.
TEXT_POOLINGS = {
    "mean": TextPooling(
        lambda states, mask: _average(states, mask.float()),
        lambda states: states.mean(dim=0),
        "the mean",
        llm2vec=("mean",),
    ),
    "last_token": TextPooling(
        lambda states, mask: _take(states, mask.shape[1] - 1 - mask.flip(1).long().argmax(dim=1)),
        lambda states: states[-1],
        "the last token",
        sentence_transformers="lasttoken",
        llm2vec=("eos_token", "last_token"),
    ),
    "cls": TextPooling(
        lambda states, mask: _take(states, mask.long().argmax(dim=1)),
        lambda states: states[0],
        "the first token",
        pools_prompt=True,
        sentence_transformers="cls",
    ),
    "full_mean": TextPooling(
        lambda states, mask: _average(states, mask.float()),
        lambda states: states.mean(dim=0),
        "the mean",
        pools_prompt=True,
        sentence_transformers="mean",
    ),
    "weighted_mean": TextPooling(
        lambda states, mask: _average(states, mask.float() * mask.float().cumsum(dim=1)),
        _average_by_position,
        "the weighted mean",
        pools_prompt=True,
        sentence_transformers="weightedmean",
    ),
}
