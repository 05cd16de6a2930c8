"""Exact ranks of the positives in both directions of retrieval, from tiles of the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, linalg

from ...encoding.float32 import float32_as_such
from .correspondence import Correspondence, PositiveLists

# Equal inputs that a model encodes in different batches differ in the last bits of float32.
TIE_TOLERANCE = 1e-6
TIE_RULE = (
    "ties count against the model: a wrong candidate whose cosine is no more than "
    f"{TIE_TOLERANCE:g} below that of the right one is ranked before it"
)
_DEFAULT_MEMORY_MB = 256.0
_memory_mb = ContextVar("_memory_mb", default=_DEFAULT_MEMORY_MB)
# Their float64 rows should fit into the cache of a CPU.
_PAIRS_AT_A_TIME = 64
# A tile of float32 scores should fit into the cache of a CPU; a GPU works best on large ones.
_MAX_TEXTS_CPU = 512
_MAX_TEXTS_GPU = 2048
# A block of images is normalized once, the texts for every block anew.
_IMAGES_PER_TEXT = 4
_MB = 1e6
# Shorter embeddings keep their direction and get a length below 1, as in F.normalize.
_MIN_LENGTH = 1e-12


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranks of the positives of every query, in one direction of retrieval.

    Distractors, which have no positive, are candidates and not queries.

    Attributes:
        num_candidates: Number of rows that a query is compared with, distractors included.
        num_positives: (Q,) int64, number of right ones among them.
        best_ranks: (Q,) int64, rank of the best positive of each query; 1 is best.
        positive_ranks: (num_pairs,) int64, ranks of all positives of query 0, then of query 1, …,
            ascending within a query; None unless requested.
        queries: (Q,) int64, row of each query; None if every row is one.
    """

    num_candidates: int
    num_positives: Tensor
    best_ranks: Tensor
    positive_ranks: Tensor | None = None
    queries: Tensor | None = None

    def select(self, of_rows: Tensor) -> Tensor:
        return of_rows if self.queries is None else of_rows[self.queries]


@dataclass(frozen=True, eq=False)
class RetrievalRanks:
    """Ranks in both directions.

    In `i2t` queries are images and candidates are texts ("text retrieval" in older papers), in
    `t2i` the other way round ("image retrieval").
    """

    i2t: Ranking
    t2i: Ranking


@contextmanager
def ranking_memory(max_memory_mb: float) -> Iterator[None]:
    """Set the working memory of rankings inside, in 10^6 bytes; it changes no rank.

    It is beyond the embeddings and some numbers for each image, text and pair.
    """
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
) -> RetrievalRanks:
    """Rank the positives of every image and of every text by cosine, exactly, in one pass.

    Embeddings are (I, P) and (T, P), of any float dtype and length; a NaN is refused, and zeros
    score 0 with all. Ranks of all positives, not of the best alone, cost one more comparison of the
    scores for each further positive.

    The rank of a query's k-th best positive is k plus the number of candidates that are not its
    positives and score as high or higher. Ties count against the model, so that equal embeddings
    cannot make it look good; scores within `TIE_TOLERANCE` are ties, so that the last bits of an
    embedding decide nothing. The positives of one query do not lower each other's ranks.

    Positives are scored first, in float64. Then tiles of the score matrix are computed in float32,
    compared with the thresholds of both directions and dropped; the few scores that are too near to
    a threshold to trust float32 are computed again in float64. So the ranks are those of the whole
    matrix in float64, whatever the tiles and the device are.
    """
    _require_fit(image_embeds, text_embeds, correspondence)
    device = image_embeds.device
    shape = choose_tile_shape(
        image_embeds.shape[1], max_memory_mb=_memory_mb.get(), device_type=device.type
    )
    images = UnitRows("image_embeds", image_embeds, device=device, rows_at_a_time=shape.texts)
    texts = UnitRows("text_embeds", text_embeds, device=device, rows_at_a_time=shape.texts)
    # No TF32, no bfloat16, no autocast: with 10 bits of mantissa or fewer, candidates with nearly
    # equal scores would swap ranks, and the switches hold for the whole program.
    with torch.autocast(device.type, enabled=False), float32_as_such():
        pairs_at_a_time = min(shape.texts, _PAIRS_AT_A_TIME)
        rows = zip(
            correspondence.image_of_pair.split(pairs_at_a_time),
            correspondence.text_of_pair.split(pairs_at_a_time),
            strict=True,
        )
        cosines = [linalg.vecdot(images.take(image), texts.take(text)) for image, text in rows]
        scores = torch.cat(cosines).cpu()  # (num_pairs,) float64
        image_counts, text_counts = (
            _NegativeCounts(
                positives,
                scores,
                margin=bound_float32_error(image_embeds.shape[1]),
                all_levels=all_positives,
                device=device,
            )
            for positives in (correspondence.texts_of_images(), correspondence.images_of_texts())
        )
        for tile in score_tiles(images, texts, correspondence, shape):
            image_counts.add(tile)
            text_counts.add(tile.transpose())
    return RetrievalRanks(
        image_counts.to_ranking(len(text_embeds)), text_counts.to_ranking(len(image_embeds))
    )


def _require_fit(image_embeds: Tensor, text_embeds: Tensor, correspondence: Correspondence) -> None:
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
            raise ValueError(f"{name}_embeds are {embeds.dtype}; they must have a float dtype.")
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"Images have width {image_embeds.shape[1]}, texts {text_embeds.shape[1]}; they must "
            "come from one model."
        )


class _NegativeCounts:
    """Counts of negatives ranked before each positive, in one direction, summed over tiles.

    A query's positives are its levels, best first. Level k is compared for the queries that have
    one, so that a query with many positives costs the others nothing. `scores` are those of every
    pair, (num_pairs,) float64; a float32 score of a tile is off by `margin` at most, and those that
    are nearer to a threshold are computed again.
    """

    def __init__(
        self,
        positives: PositiveLists,
        scores: Tensor,
        *,
        margin: float,
        all_levels: bool,
        device: torch.device,
    ) -> None:
        is_query = positives.counts > 0
        levels = positives.counts if all_levels else is_query.long()
        self._is_query = is_query
        self._num_positives = positives.counts[is_query]
        self._all_levels = all_levels
        self._num_levels = levels
        self._first = levels.cumsum(0) - levels  # (rows,), position of the first level of a query
        # The scores of the positives of every query, best first; or of the best ones alone.
        by_pair = scores.cpu()[positives.pairs]
        queries = torch.arange(len(positives.counts)).repeat_interleave(positives.counts)
        by_score = by_pair.argsort(descending=True, stable=True)
        ordered = by_pair[by_score[queries[by_score].argsort(stable=True)]]
        if not all_levels:
            ordered = ordered[positives.offsets[:-1][is_query]]
        self._thresholds = (ordered - TIE_TOLERANCE).to(device)
        self._margin = margin
        self._counts = torch.zeros(len(ordered), dtype=torch.int64, device=device)
        self._queries_of_level = [
            (levels > level).nonzero().flatten() for level in range(int(levels.max()))
        ]

    def add(self, tile: Tile) -> None:
        """Count the negatives of a tile that are ranked before each level of its queries."""
        start, stop = tile.query_start, tile.query_start + len(tile.scores)
        best_negatives = tile.scores.amax(dim=1)
        for level, queries in enumerate(self._queries_of_level):
            low, high = torch.searchsorted(queries, torch.tensor([start, stop])).tolist()
            if low < high:
                self._add_level(tile, queries[low:high], best_negatives, level=level)

    def to_ranking(self, num_candidates: int) -> Ranking:
        levels = torch.arange(len(self._counts)) - self._first.repeat_interleave(self._num_levels)
        ranks = 1 + levels + self._counts.cpu()
        return Ranking(
            num_candidates=num_candidates,
            num_positives=self._num_positives,
            best_ranks=ranks[self._first[self._is_query]],
            positive_ranks=ranks if self._all_levels else None,
            queries=None if self._is_query.all() else self._is_query.nonzero().flatten(),
        )

    def _add_level(
        self, tile: Tile, queries: Tensor, best_negatives: Tensor, *, level: int
    ) -> None:
        device = tile.scores.device
        rows, places = (queries - tile.query_start).to(device), self._first[queries].to(device)
        lowest = (self._thresholds[places + level] - self._margin).float()
        # For most queries, no negative of a tile comes near to their positive.
        concerned = best_negatives[rows] >= lowest
        rows, places = rows[concerned], places[concerned] + level
        if len(rows):
            scores = _select_rows(tile.scores, rows)
            self._counts[places] += self._count(tile, rows, scores, self._thresholds[places, None])

    def _count(self, tile: Tile, rows: Tensor, scores: Tensor, thresholds: Tensor) -> Tensor:
        """Count the scores of some rows of a tile that reach the thresholds, (q,) int64."""
        lowest, highest = (thresholds - self._margin).float(), (thresholds + self._margin).float()
        counts = _count_above(scores, highest, tile.memory)
        unsure = (_count_above(scores, lowest, tile.memory) > counts).nonzero().flatten()
        if len(unsure):
            near = _select_rows(scores, unsure)
            near = (near >= lowest[unsure]) & (near < highest[unsure])
            columns = near.any(dim=0).nonzero().flatten()
            exact = tile.score_exactly(
                tile.query_start + rows[unsure], tile.candidate_start + columns
            )
            before = (exact >= thresholds[unsure]) & near[:, columns]
            counts[unsure] += before.sum(dim=1)
        return counts


def _select_rows(scores: Tensor, rows: Tensor) -> Tensor:
    if len(rows) == len(scores):
        return scores
    if scores.is_contiguous():
        return scores.index_select(0, rows)
    # In the transpose of a tile rows are columns; this way they are read line by line.
    return scores.T.index_select(1, rows).T


def _count_above(scores: Tensor, thresholds: Tensor, memory: Tensor) -> Tensor:
    # Ones in float32 are added faster than booleans, and exactly up to 2^24, more than a tile has.
    above = memory.as_strided(scores.shape, scores.stride())
    torch.ge(scores, thresholds, out=above)
    return above.sum(dim=1).long()


class TileShape(NamedTuple):
    """Most images and texts of a tile."""

    images: int
    texts: int


def choose_tile_shape(width: int, *, max_memory_mb: float, device_type: str = "cpu") -> TileShape:
    """Choose as many rows as the memory holds, but no more than is fast."""
    # Bytes per score: itself and its comparison, both once more for some queries, and, if all were
    # too near to a threshold, selection, masks and float64. Bytes per row: float32 and as it is
    # stored, and, in that case, as it is stored and float64 twice.
    per_score, per_row = 40, 28 * width
    squared, linear = per_score * _IMAGES_PER_TEXT, per_row * (1 + _IMAGES_PER_TEXT)
    root = math.sqrt(linear**2 + 4 * squared * max_memory_mb * _MB)
    texts = int((root - linear) / (2 * squared))
    if texts < 1:
        raise ValueError(
            f"max_memory_mb={max_memory_mb:g} is too little for a tile of {_IMAGES_PER_TEXT} "
            f"images and a text of width {width}, which takes {(squared + linear) / _MB:.2g}."
        )
    texts = min(texts, _MAX_TEXTS_CPU if device_type == "cpu" else _MAX_TEXTS_GPU)
    return TileShape(_IMAGES_PER_TEXT * texts, texts)


class UnitRows:
    """Rows of embeddings in unit length, without a second copy of all of them.

    Takes (N, P) of any float dtype, on any device; `rows_at_a_time` are held in float64 while
    lengths are computed. A row with a NaN or an infinity raises ValueError, by its number.
    """

    def __init__(
        self, name: str, embeds: Tensor, *, device: torch.device, rows_at_a_time: int
    ) -> None:
        self.width = embeds.shape[1]
        self._embeds = embeds
        self.device = device
        inverses = []
        for start in range(0, len(embeds), rows_at_a_time):
            rows = embeds[start : start + rows_at_a_time]
            lengths = linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            if not lengths.isfinite().all():
                row = start + int((~lengths.isfinite()).long().argmax())
                raise ValueError(
                    f"{name} row {row} has a NaN or an infinity. Find out which input it comes "
                    "from before anything is ranked."
                )
            inverses.append(lengths.clamp(min=_MIN_LENGTH).reciprocal())
        self._inverse_lengths = torch.cat(inverses).to(device)  # (N,) float64

    def write(self, start: int, buffer: Tensor) -> Tensor:
        """Write rows into a (n, P) float32 buffer, as many as fit; return the part with them."""
        stop = min(start + len(buffer), len(self._embeds))
        rows = self._embeds[start:stop].to(self.device)
        scales = self._inverse_lengths[start:stop, None].float()
        return torch.mul(rows, scales, out=buffer[: stop - start])

    def take(self, rows: Tensor) -> Tensor:
        taken = self._embeds[rows.to(self._embeds.device)].to(self.device, torch.float64)
        return taken.mul_(self._inverse_lengths[rows.to(self.device), None])


@dataclass(frozen=True, eq=False)
class Tile:
    """Scores of some queries with some candidates, (n, m) float32; positives have minus infinity.

    `memory` has room for n · m float32 and may be written over. `score_exactly` computes (q, c)
    float64 scores of rows of queries and rows of candidates.
    """

    query_start: int
    candidate_start: int
    scores: Tensor
    memory: Tensor
    score_exactly: Callable[[Tensor, Tensor], Tensor]

    def transpose(self) -> Tile:
        """Return the tile in which the candidates are the queries."""

        def score_exactly(queries: Tensor, candidates: Tensor) -> Tensor:
            return self.score_exactly(candidates, queries).T

        start, other = self.candidate_start, self.query_start
        return Tile(start, other, self.scores.T, self.memory, score_exactly)


def score_tiles(
    images: UnitRows, texts: UnitRows, correspondence: Correspondence, shape: TileShape
) -> Iterator[Tile]:
    """Score all images with all texts, tile after tile in the same memory.

    Images are the queries, pairs of the correspondence get minus infinity, and a tile is valid
    until the next.
    """
    tiles_per_block = math.ceil(correspondence.num_texts / shape.texts)
    image, text = correspondence.image_of_pair, correspondence.text_of_pair
    numbers = image // shape.images * tiles_per_block + text // shape.texts
    tile_of_pair, order = numbers.sort()
    device = images.device
    image_in_tile = (image % shape.images)[order].to(device)
    text_in_tile = (text % shape.texts)[order].to(device)
    sizes = [shape.images * images.width, shape.texts * texts.width] + [math.prod(shape)] * 2
    image_buffer, text_buffer, score_buffer, memory = (
        torch.empty(size, dtype=torch.float32, device=device) for size in sizes
    )

    def score_exactly(image_rows: Tensor, text_rows: Tensor) -> Tensor:
        return images.take(image_rows) @ texts.take(text_rows).T

    for block in range(math.ceil(correspondence.num_images / shape.images)):
        image_rows = images.write(block * shape.images, image_buffer.view(shape.images, -1))
        for place in range(tiles_per_block):
            text_rows = texts.write(place * shape.texts, text_buffer.view(shape.texts, -1))
            size = len(image_rows), len(text_rows)
            scores = score_buffer[: math.prod(size)].view(size)
            torch.mm(image_rows, text_rows.T, out=scores)
            bounds = torch.tensor([0, 1]) + block * tiles_per_block + place
            low, high = torch.searchsorted(tile_of_pair, bounds).tolist()
            scores[image_in_tile[low:high], text_in_tile[low:high]] = -torch.inf
            starts = block * shape.images, place * shape.texts
            yield Tile(*starts, scores, memory, score_exactly)


def bound_float32_error(width: int) -> float:
    """Bound the difference between a float32 cosine and the exact one.

    The rounding error of a sum grows with the root of its length with all but certain probability
    (Higham and Mary, 2019, doi:10.1137/18M1226312). Three roots, and four roundings for the
    embeddings themselves; the most that was measured is 1.6 roots, for embeddings that begin with a
    large number (widths 8 to 4,096, tiles of several shapes).
    """
    return (3 * math.sqrt(width) + 4) * 2**-24
