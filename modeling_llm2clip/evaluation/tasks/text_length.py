"""Score retrieval by text length, and measure how much text a 77-token encoder truncates.

With images, each caption retrieves its image from all images. Without images, only the text encoder
is tested: each long caption is split near its middle, and its first part retrieves its second part
from the second parts of all captions.

Lengths in different models' tokens are not comparable, so all texts are measured with CLIP's
tokenizer, no matter which model is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..._extras import CLIP_TOKENS
from ..datasets.retrieval_dataset import RetrievalDataset
from ..encoders.encoder import EvaluationEncoder
from ..encoders.open_clip_models import import_open_clip
from ..metrics.ranking import Ranking, rank_retrieval
from ..metrics.scores import hits_at, mean_with_interval
from .retrieval import compute_chance, rank_pairs
from .task import BY_COSINE, Datasets, Task, TaskScores, count_texts, describe_interval

# 77 positions minus the begin and end tokens (arXiv:2103.00020).
CLIP_TEXT_TOKENS = 75
# Upper bounds of the buckets in CLIP tokens; a 77-token encoder sees everything up to the third.
BUCKET_BOUNDS = (20, 40, CLIP_TEXT_TOKENS, 110, 150, 200, 300)
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")
_WORD_END = re.compile(r"\s+")


def _run_length(encoder: EvaluationEncoder, datasets: Datasets) -> TaskScores:
    [dataset] = datasets
    assert isinstance(dataset, RetrievalDataset)
    if dataset.images:
        queries = list(dataset.captions)
        lengths = count_clip_tokens(queries)
        texts = encoder.encode_texts(queries)
        images = encoder.encode_images(dataset.images, names=dataset.image_names)
        ranking = rank_retrieval(
            images, texts.embeds, dataset.correspondence, device=encoder.ranking_device
        ).t2i
        clusters = dataset.number_groups()[dataset.correspondence.image_of_text]
    else:
        pairs = _split_captions(dataset)
        queries = [first for first, _ in pairs]
        lengths = count_clip_tokens(queries)
        texts = encoder.encode_texts([*queries, *(second for _, second in pairs)])
        ranking = rank_pairs(texts.embeds, device=encoder.ranking_device).i2t
        clusters = torch.arange(len(queries))
    counts = {
        "images": len(dataset.images),
        "captions": len(dataset.captions),
        "queries": len(queries),
        **count_texts(texts),
    }
    is_truncated = None if texts.is_truncated is None else texts.is_truncated[: len(queries)]
    return TaskScores(score_lengths(ranking, lengths, is_truncated, clusters), counts)


def count_clip_tokens(texts: Sequence[str]) -> list[int]:
    """Count the tokens of each text in CLIP's vocabulary, without the begin and end tokens."""
    tokenizer = import_open_clip(CLIP_TOKENS).SimpleTokenizer()
    # A text has no tokens if it is made of whitespace that Python does not recognize.
    return [max(1, len(tokenizer.encode(text))) for text in texts]


def _describe_data(datasets: Datasets) -> dict[str, str]:
    [dataset] = datasets
    if dataset.has_images:
        return {"queries": "every caption", "candidates": "all images"}
    return {
        "queries": "first part of every caption that can be split",
        "candidates": "second parts of the same captions",
        "split_at": "the end of a sentence, or else of a word, that is nearest to the middle",
    }


def _check_captions(datasets: Datasets) -> None:
    [dataset] = datasets
    assert isinstance(dataset, RetrievalDataset)
    if not dataset.images:
        _split_captions(dataset)


def _split_captions(dataset: RetrievalDataset) -> list[tuple[str, str]]:
    pairs = [parts for parts in map(split_in_half, dataset.captions) if parts is not None]
    if len(pairs) < 2:
        raise ValueError(
            f"{dataset.name}: {len(pairs)} of {len(dataset.captions)} captions can be split, but "
            "the length task needs at least two. Provide images or longer captions."
        )
    return pairs


def split_in_half(text: str) -> tuple[str, str] | None:
    """Split a text at the sentence end closest to its middle; without one, at a word end.

    Returns None for a single word.
    """
    for end in (_SENTENCE_END, _WORD_END):
        places = [m.end() for m in end.finditer(text) if text[: m.end()].strip()]
        places = [place for place in places if text[place:].strip()]
        if places:
            middle = min(places, key=lambda place: abs(place - len(text) / 2))
            return text[:middle].strip(), text[middle:].strip()
    return None


def score_lengths(
    ranking: Ranking, lengths: Sequence[int], is_truncated: Tensor | None, clusters: Tensor
) -> dict[str, Any]:
    """Compute the hit rate at 1 in each non-empty bucket of lengths, overall, and by chance."""
    hits = hits_at(ranking, k=1)
    tokens = torch.tensor(lengths)
    buckets = []
    for low, high in pairwise((0, *BUCKET_BOUNDS, None)):
        assert low is not None
        chosen = (tokens > low) & (tokens <= (tokens.max() if high is None else high))
        if chosen.any():
            scores = _score_bucket(hits, tokens, is_truncated, clusters, chosen)
            buckets.append({"from_clip_tokens": low + 1, "to_clip_tokens": high, **scores})
    everything = torch.ones_like(tokens, dtype=torch.bool)
    return {
        "all": _score_bucket(hits, tokens, is_truncated, clusters, everything),
        "buckets": buckets,
        "chance": compute_chance(ranking),
    }


def _score_bucket(
    hits: Tensor, tokens: Tensor, is_truncated: Tensor | None, clusters: Tensor, chosen: Tensor
) -> dict[str, Any]:
    beyond = (tokens[chosen] - CLIP_TEXT_TOKENS).clamp(min=0)
    return {
        "queries": int(chosen.sum()),
        "mean_clip_tokens": float(tokens[chosen].double().mean()),
        "hit_rate_at_1": mean_with_interval(hits[chosen], clusters=clusters[chosen]),
        "share_of_tokens_beyond_clip": int(beyond.sum()) / int(tokens[chosen].sum()),
        "share_truncated": None
        if is_truncated is None
        else float(is_truncated[chosen].double().mean()),
    }


LENGTH = Task(
    name="length",
    title="R@1 by text length",
    dataset_types=("retrieval", "captions"),
    protocol={
        **BY_COSINE,
        "length": "tokens of CLIP's vocabulary without begin and end",
        "buckets": list(BUCKET_BOUNDS),
        "beyond_clip": f"after the {CLIP_TEXT_TOKENS}th token of a query",
        "interval": describe_interval(
            "groups of images, or over queries where there are no images"
        ),
    },
    headline={
        "R@1": ("all", "hit_rate_at_1", "value"),
        "tokens beyond 77": ("all", "share_of_tokens_beyond_clip"),
        "texts truncated": ("all", "share_truncated"),
    },
    chance={"R@1": ("chance",)},
    run=_run_length,
    check=_check_captions,
    describe_data=_describe_data,
    needs=(CLIP_TOKENS,),
)
