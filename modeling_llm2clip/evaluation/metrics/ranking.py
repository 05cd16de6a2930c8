"""Exact ranks of the positives in both directions of retrieval, out of tiles of the scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .correspondence import Correspondence
from .counting import NegativeCounts
from .score_precision import bound_float32_error, full_float32
from .tiles import TileScorer, choose_tile_shape
from .unit_rows import UnitRows

# Equal inputs that a model has encoded in other batches differ in the last bits of float32.
TIE_TOLERANCE = 1e-6
TIE_RULE = (
    "ties count against the model: a wrong candidate whose cosine is no more than "
    f"{TIE_TOLERANCE:g} below that of the right one stands before it"
)
DEFAULT_MEMORY_MB = 256.0
_memory_mb = ContextVar("_memory_mb", default=DEFAULT_MEMORY_MB)
# Their float64 rows should stay in a processor's cache.
_PAIRS_AT_A_TIME = 64


@dataclass(frozen=True, eq=False)
class Ranking:
    """Where the positives of every query stand, in one direction of retrieval.

    Attributes:
        num_candidates: how many rows a query is compared with.
        num_positives: (Q,) int64, how many of them are right.
        best_ranks: (Q,) int64, rank of the best positive of each query; 1 is best.
        positive_ranks: (num_pairs,) int64, ranks of all positives of query 0, then of query 1, …,
            ascending within a query; None when they were not asked for.
    """

    num_candidates: int
    num_positives: Tensor
    best_ranks: Tensor
    positive_ranks: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RetrievalRanks:
    """Ranks in both directions.

    Attributes:
        i2t: queries are images, candidates texts ("text retrieval" in older papers).
        t2i: queries are texts, candidates images ("image retrieval").
    """

    i2t: Ranking
    t2i: Ranking


@contextmanager
def ranking_memory(max_memory_mb: float) -> Iterator[None]:
    """Let every ranking inside that names no memory have this one; it moves no rank.

    Raises: ValueError unless it is above 0.
    """
    if not max_memory_mb > 0:
        raise ValueError(f"max_memory_mb={max_memory_mb:g} must be above 0.")
    token = _memory_mb.set(max_memory_mb)
    try:
        yield
    finally:
        _memory_mb.reset(token)


@torch.no_grad()
def rank_retrieval(
    image_embeds: Tensor,
    text_embeds: Tensor,
    correspondence: Correspondence,
    *,
    all_positives: bool = False,
    max_memory_mb: float | None = None,
    device: torch.device | str | None = None,
    over_processes: bool = False,
) -> RetrievalRanks:
    """Rank the positives of every image and of every text by cosine, exactly, in one pass.

    The rank of a query's k-th best positive is k plus the number of candidates that are not its
    positives and score as high or higher. Ties thus count against the model, so that equal
    embeddings cannot make it look good; scores within `TIE_TOLERANCE` are ties, so that the last
    bits of a embedding do not decide. The positives of one query do not push each other down.

    Positives are scored first, in float64. Then tiles of the score matrix are computed in float32,
    compared with both sides' thresholds and forgotten; the few scores too near to a threshold to
    trust float32 are computed again in float64. So the ranks are those of the whole matrix in
    float64, and tiles, devices and processes do not move them.

    Args:
        image_embeds, text_embeds: (I, P), (T, P) of any float dtype and length; compared as unit
            embeddings. An embedding of zeros scores 0 with all.
        correspondence: which rows belong together.
        all_positives: rank all positives of a query, not its best alone. Costs one more comparison
            of the scores for each further positive.
        max_memory_mb: working memory in 10^6 bytes, beyond the embeddings and some numbers for each
            image, text and pair; None for that of `ranking_memory`, or else 256.
        device: where tiles are computed; where the images' embeddings are unless given.
        over_processes: share the tiles among the processes of the default group; each must come
            with the same embeddings and gets all ranks. NCCL needs a GPU as device.
    Raises: ValueError for other counts or widths, a dtype that is no float, NaN (the row is
        named), too little memory for one row, or processes that come with different embeddings.
    """
    _check(image_embeds, text_embeds, correspondence)
    device = torch.device(device) if device is not None else image_embeds.device
    max_memory_mb = _memory_mb.get() if max_memory_mb is None else max_memory_mb
    shape = choose_tile_shape(
        image_embeds.shape[1], max_memory_mb=max_memory_mb, device_type=device.type
    )
    images = UnitRows("image_embeds", image_embeds, device=device, rows_at_a_time=shape.texts)
    texts = UnitRows("text_embeds", text_embeds, device=device, rows_at_a_time=shape.texts)
    over_processes = over_processes and dist.is_initialized() and dist.get_world_size() > 1
    with full_float32(device.type):
        scores = _score_pairs(images, texts, correspondence, min(shape.texts, _PAIRS_AT_A_TIME))
        if over_processes:
            _require_equal_scores(scores, device)
        image_counts, text_counts = (
            NegativeCounts(
                positives,
                scores,
                tolerance=TIE_TOLERANCE,
                margin=bound_float32_error(image_embeds.shape[1]),
                all_levels=all_positives,
                device=device,
            )
            for positives in (correspondence.texts_of_images(), correspondence.images_of_texts())
        )
        tiles = TileScorer(images, texts, correspondence, shape, device)
        for tile in tiles.score_all(over_processes=over_processes):
            image_counts.add(tile)
            text_counts.add(tile.transpose())
    if over_processes:
        dist.all_reduce(image_counts.counts)
        dist.all_reduce(text_counts.counts)
    i2t, t2i = (
        Ranking(
            num_candidates=num_candidates,
            num_positives=counts.num_positives,
            best_ranks=counts.best_ranks(),
            positive_ranks=counts.all_ranks() if all_positives else None,
        )
        for counts, num_candidates in (
            (image_counts, len(text_embeds)), (text_counts, len(image_embeds)),
        )
    )  # fmt: skip
    return RetrievalRanks(i2t, t2i)


def _score_pairs(
    images: UnitRows, texts: UnitRows, correspondence: Correspondence, pairs_at_a_time: int
) -> Tensor:
    """Cosine of every pair, (num_pairs,) float64 on the CPU."""
    rows = zip(
        correspondence.image_of_pair.split(pairs_at_a_time),
        correspondence.text_of_pair.split(pairs_at_a_time),
        strict=True,
    )
    scores = [torch.linalg.vecdot(images.take(image), texts.take(text)) for image, text in rows]
    return torch.cat(scores).cpu()


def _check(image_embeds: Tensor, text_embeds: Tensor, correspondence: Correspondence) -> None:
    for name, embeds, num_rows in (
        ("image", image_embeds, correspondence.num_images),
        ("text", text_embeds, correspondence.num_texts),
    ):
        if embeds.ndim != 2 or len(embeds) != num_rows:
            raise ValueError(
                f"{name}_embeds {tuple(embeds.shape)} must have one row for each of the "
                f"{num_rows} {name}s of the correspondence."
            )
        if not embeds.dtype.is_floating_point:
            raise ValueError(f"{name}_embeds are {embeds.dtype}; embeddings are of a float dtype.")
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"Images have width {image_embeds.shape[1]}, texts {text_embeds.shape[1]}; they must "
            "come from one model."
        )


def _require_equal_scores(scores: Tensor, device: torch.device) -> None:
    """Refuse to add counts of different embeddings; their positives would hardly score the same."""
    weights = torch.linspace(0, 1, len(scores), dtype=torch.float64)
    mine = torch.stack([scores.sum(dtype=torch.float64), (weights * scores).sum()]).to(device)
    all_sums = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_sums, mine)
    # The same embeddings computed on two machines may differ in their last bits.
    different = [
        rank
        for rank, sums in enumerate(all_sums)
        if not torch.allclose(sums, all_sums[0], rtol=0, atol=TIE_TOLERANCE * len(scores))
    ]
    if different:
        raise ValueError(
            f"Processes {different} came with other embeddings than process 0. Each must have the "
            "embeddings of all images and texts: gather them first."
        )
