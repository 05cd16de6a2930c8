"""A score against the length of the text, and how much of it a 77-token encoder never sees.

With images, each caption looks for its image among all images. Without, each long caption is
cut in two near its middle and the first half looks for the second among the second halves of all:
a question to a text encoder alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..._extras import CLIP_TOKENS
from ..datasets.schema import EvaluationSet, RetrievalDataset
from ..encoders.encoder import EncodedTexts, Encoder
from ..metrics.correspondence import Correspondence
from ..metrics.ranking import TIE_RULE, Ranking, rank_retrieval
from ..metrics.scores import hits_at
from .clip_tokens import CLIP_TEXT_TOKENS, count_clip_tokens, share_beyond_clip
from .retrieval import chance_of
from .task import INTERVAL_PROTOCOL, Task, TaskScores, count_texts, mean_with_interval

# Upper ends of the buckets, in CLIP's tokens; the third is what a 77-token encoder sees.
EDGES = (20, 40, CLIP_TEXT_TOKENS, 110, 150, 200, 300)
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")
_WORD_END = re.compile(r"\s+")


def run_lengths(encoder: Encoder, sets: tuple[EvaluationSet, ...]) -> TaskScores:
    """Score each bucket of lengths, and all texts together."""
    (data,) = sets
    assert isinstance(data, RetrievalDataset)
    if data.images:
        queries = list(data.captions)
        lengths = count_clip_tokens(queries)
        texts = encoder.encode_texts(queries)
        images = encoder.encode_images(data.images, names=data.image_names)
        ranking = rank_retrieval(images, texts.embeds, data.correspondence).t2i
    else:
        halves = _split_captions(data)
        queries = [first for first, _ in halves]
        lengths = count_clip_tokens(queries)
        texts = encoder.encode_texts([*queries, *(second for _, second in halves)])
        ranking = _rank_halves(texts.embeds)
    counts = {
        "images": len(data.images),
        "captions": len(data.captions),
        "queries": len(queries),
        **count_texts(texts),
    }
    return TaskScores(score_lengths(ranking, lengths, _cut_queries(texts, len(queries))), counts)


def _say_what_is_asked(sets: tuple[EvaluationSet, ...]) -> dict[str, str]:
    (data,) = sets
    assert isinstance(data, RetrievalDataset)
    if data.images:
        return {"queries": "every caption", "candidates": "all images"}
    return {
        "queries": "first half of every caption that can be cut",
        "candidates": "second halves of the same captions",
        "cut": "at the end of a sentence, else of a word, that is nearest to the middle",
    }


def _check_lengths(sets: tuple[EvaluationSet, ...]) -> None:
    (data,) = sets
    assert isinstance(data, RetrievalDataset)
    if not data.images:
        _split_captions(data)


def _split_captions(data: RetrievalDataset) -> list[tuple[str, str]]:
    halves = [half for half in map(split_in_half, data.captions) if half is not None]
    if len(halves) < 2:
        raise ValueError(
            f"{data.name}: {len(halves)} of {len(data.captions)} captions can be cut in two, and "
            "the task length needs two or more. Give it images, or longer captions."
        )
    return halves


def split_in_half(text: str) -> tuple[str, str] | None:
    """Cut a text at the end of a sentence, or else of a word, that is nearest to its middle.

    Returns: None for a text of one word.
    """
    for end in (_SENTENCE_END, _WORD_END):
        places = [m.end() for m in end.finditer(text) if text[: m.end()].strip()]
        places = [place for place in places if text[place:].strip()]
        if places:
            middle = min(places, key=lambda place: abs(place - len(text) / 2))
            return text[:middle].strip(), text[middle:].strip()
    return None


def score_lengths(
    ranking: Ranking, lengths: Sequence[int], is_truncated: Tensor | None
) -> dict[str, Any]:
    """Hit rate at 1 of every bucket that has queries.

    Args:
        ranking: of the queries.
        lengths: of each query in CLIP's tokens.
        is_truncated: (Q,) bool, which queries the evaluated encoder cut; None if that is not known.
    Returns: `all` and `buckets`, each with `queries`, `mean_clip_tokens`, `hit_rate_at_1`
        (value, low, high), `share_of_tokens_beyond_clip` and `share_cut_by_this_encoder`.
    """
    hits = hits_at(ranking, k=1)
    tokens = torch.tensor(lengths)
    bounds = (0, *EDGES, None)
    buckets = []
    for low, high in pairwise(bounds):
        assert low is not None
        chosen = (tokens > low) & (tokens <= (tokens.max() if high is None else high))
        if chosen.any():
            scores = _score_bucket(hits, tokens, is_truncated, chosen)
            buckets.append({"from_clip_tokens": low + 1, "to_clip_tokens": high, **scores})
    everything = torch.ones_like(tokens, dtype=torch.bool)
    return {
        "all": _score_bucket(hits, tokens, is_truncated, everything),
        "buckets": buckets,
        "chance": chance_of(ranking),
    }


def _score_bucket(
    hits: Tensor, tokens: Tensor, is_truncated: Tensor | None, chosen: Tensor
) -> dict[str, Any]:
    return {
        "queries": int(chosen.sum()),
        "mean_clip_tokens": float(tokens[chosen].double().mean()),
        "hit_rate_at_1": mean_with_interval(hits[chosen]),
        "share_of_tokens_beyond_clip": share_beyond_clip(tokens[chosen].tolist()),
        "share_cut_by_this_encoder": None
        if is_truncated is None
        else float(is_truncated[chosen].double().mean()),
    }


def _rank_halves(embeds: Tensor) -> Ranking:
    number = len(embeds) // 2
    own = Correspondence.from_image_of_text(range(number), number)
    return rank_retrieval(embeds[:number], embeds[number:], own).i2t


def _cut_queries(texts: EncodedTexts, number: int) -> Tensor | None:
    return None if texts.is_truncated is None else texts.is_truncated[:number]


LENGTHS = Task(
    name="length",
    title="R@1 against the length of the text",
    kinds=("retrieval", "captions"),
    needs_images=None,
    languages=False,
    protocol={
        "similarity": "cosine",
        "ties": TIE_RULE,
        "length": "tokens of CLIP's vocabulary without begin and end",
        "buckets": list(EDGES),
        "beyond_clip": f"behind the {CLIP_TEXT_TOKENS}th token of a query",
        "interval": INTERVAL_PROTOCOL.replace("images", "queries"),
    },
    headline={
        "R@1": ("all", "hit_rate_at_1", "value"),
        "tokens beyond 77": ("all", "share_of_tokens_beyond_clip"),
        "texts it cut": ("all", "share_cut_by_this_encoder"),
    },
    chance={"R@1": ("chance",)},
    run=run_lengths,
    check=_check_lengths,
    protocol_of=_say_what_is_asked,
    needs=(CLIP_TOKENS,),
)
