"""Compute exact ranks of the positives in both retrieval directions, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, linalg

from ...encoding.devices import has_room
from ...encoding.precision import float32_as_such
from .correspondence import Correspondence, PositiveLists

# A model that encodes the same input in two batches returns slightly different float32 values.
TIE_TOLERANCE = 1e-6
TIE_RULE = (
    "ties count against the model: a wrong candidate whose cosine is no more than "
    f"{TIE_TOLERANCE:g} below the right candidate's is ranked before it"
)
# Their float64 rows should fit in a CPU's cache.
_PAIRS_AT_A_TIME = 64
# Shorter embeddings are scaled to a length below 1, as in F.normalize.
_MIN_LENGTH = 1e-12


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranks of every query's positives in one retrieval direction.

    Attributes:
        num_candidates: Number of rows each query is compared with.
        num_positives: (Q,) int64, number of positives of each query.
        best_ranks: (Q,) int64, rank of each query's best positive; 1 is best.
        positive_ranks: (num_pairs,) int64, ranks of all positives of query 0, then of query 1, …,
            ascending within a query. None unless requested.
    """

    num_candidates: int
    num_positives: Tensor
    best_ranks: Tensor
    positive_ranks: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RetrievalRanks:
    """Ranks in both directions.

    In `i2t`, queries are images and candidates are texts ("text retrieval" in older papers). `t2i`
    is the reverse ("image retrieval").
    """

    i2t: Ranking
    t2i: Ranking


class TileShape(NamedTuple):
    """Maximum number of images and texts in a tile of the score matrix."""

    images: int
    texts: int


# A tile of float32 scores should fit in a CPU's cache; a GPU prefers large tiles. Each block of
# images is normalized once, while the texts are normalized again for every block.
TILE_OF_CPU = TileShape(2048, 512)
_TILE_OF_GPU = TileShape(8192, 4096)


@torch.no_grad()
def rank_retrieval(
    image_embeds: Tensor,
    text_embeds: Tensor,
    correspondence: Correspondence,
    *,
    all_positives: bool = False,
    device: torch.device | None = None,
    shape: TileShape | None = None,
    defers: bool | None = None,
) -> RetrievalRanks:
    """Rank the positives of every image and every text by exact cosine, in one pass.

    Embeddings are (I, P) and (T, P), of any float dtype and length. NaNs raise ValueError, and
    all-zero rows have cosine 0 with everything. `all_positives` ranks all positives instead of only
    the best one, which compares the scores with one more threshold per additional positive.

    The rank of a query's k-th best positive is k plus the number of non-positive candidates that
    score at least as high. Ties count against the model, so a model that gives all inputs the same
    embedding does not look good. Scores within `TIE_TOLERANCE` are ties, so rounding does not
    affect ranks. The positives of one query do not lower each other's ranks.

    Positives are scored first, in float64. Then each tile of the score matrix is computed in
    float32, compared with the thresholds of both directions, and dropped. The few scores too close
    to a threshold for float32 are recomputed in float64. The ranks therefore equal those of the
    full float64 matrix, on any device and with any tile `shape`; the default shape is fast on the
    device. Working memory does not grow with the number of rows, except for a few numbers per row
    and pair and, on a GPU, the embeddings themselves if they fit in half of its memory.

    A CPU recomputes close scores within each tile. On a GPU that would force a synchronization, so
    close scores are deferred (`defers`): affected queries are counted again after the last tile.

    `device` runs the computation and defaults to the images' device.
    """
    _require_fit(image_embeds, text_embeds, correspondence)
    device = device or image_embeds.device
    defers = device.type != "cpu" if defers is None else defers
    shape = shape or (_TILE_OF_GPU if defers else TILE_OF_CPU)
    # No TF32, bfloat16 or autocast, even if the program enabled them: with 10 or fewer mantissa
    # bits, candidates with nearly equal scores would swap ranks.
    with torch.autocast(device.type, enabled=False), float32_as_such():
        sides = [
            UnitRows(name, embeds, device=device, rows_at_a_time=shape.texts)
            for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds))
        ]
        counts = _count_negatives(sides, correspondence, all_positives, shape, defers=defers)
        for side, queries in enumerate(each.list_unsure() for each in counts):
            if len(queries):
                chosen = list(sides)
                chosen[side] = sides[side].select(queries)
                pairs = _select_pairs(correspondence, side, queries)
                again = _count_negatives(chosen, pairs, all_positives, shape, defers=False)
                counts[side].replace(queries, again[side])
    i2t, t2i = counts
    return RetrievalRanks(i2t.to_ranking(len(text_embeds)), t2i.to_ranking(len(image_embeds)))


def _count_negatives(
    sides: Sequence[UnitRows],
    correspondence: Correspondence,
    all_positives: bool,
    shape: TileShape,
    *,
    defers: bool,
) -> list[_NegativeCounts]:
    """Count the negatives before each positive, for images and for texts as queries."""
    images, texts = sides
    pairs_at_a_time = shape.texts if defers else min(shape.texts, _PAIRS_AT_A_TIME)
    rows = zip(
        correspondence.image_of_pair.to(images.device).split(pairs_at_a_time),
        correspondence.text_of_pair.to(images.device).split(pairs_at_a_time),
        strict=True,
    )
    cosines = [linalg.vecdot(images.take(image), texts.take(text)) for image, text in rows]
    scores = torch.cat(cosines).cpu()  # (num_pairs,) float64
    counts = [
        _NegativeCounts(
            positives,
            scores,
            margin=bound_float32_error(images.width),
            all_positives=all_positives,
            device=images.device,
            defers=defers,
        )
        for positives in (correspondence.texts_of_images(), correspondence.images_of_texts())
    ]
    for tile in score_tiles(images, texts, correspondence, shape):
        counts[0].add(tile)
        counts[1].add(tile.transpose())
    return counts


def _select_pairs(correspondence: Correspondence, side: int, queries: Tensor) -> Correspondence:
    """Keep the pairs of the given images (side 0) or texts (side 1), renumbered in order."""
    pairs = [correspondence.image_of_pair, correspondence.text_of_pair]
    sizes = [correspondence.num_images, correspondence.num_texts]
    places = torch.full((sizes[side],), -1)
    places[queries] = torch.arange(len(queries))
    is_kept = places[pairs[side]] >= 0
    pairs[side], sizes[side] = places[pairs[side]], len(queries)
    image, text = (rows[is_kept] for rows in pairs)
    num_images, num_texts = sizes
    return Correspondence(num_images, num_texts, image, text, is_part=True)


def _require_fit(image_embeds: Tensor, text_embeds: Tensor, correspondence: Correspondence) -> None:
    for name, embeds, num_rows in (
        ("image", image_embeds, correspondence.num_images),
        ("text", text_embeds, correspondence.num_texts),
    ):
        if not embeds.dtype.is_floating_point or embeds.shape != (num_rows, image_embeds.shape[-1]):
            raise ValueError(
                f"{name}_embeds are {embeds.dtype} {tuple(embeds.shape)}; they must have a float "
                f"dtype, one row for each of the {num_rows} {name}s in the correspondence, and the "
                "same width as the other side."
            )


class _NegativeCounts:
    """Count the negatives ranked before each positive, in one direction, summed over tiles.

    `scores` holds the score of every pair, (num_pairs,) float64. The score of each query's best
    positive is a threshold; with `all_positives`, so are all others. A tile's float32 scores are
    off by at most `margin`. Scores within `margin` of a threshold are recomputed. With `defers`,
    such scores are only counted, which avoids reading from the device.
    """

    def __init__(
        self,
        positives: PositiveLists,
        scores: Tensor,
        *,
        margin: float,
        all_positives: bool,
        device: torch.device,
        defers: bool,
    ) -> None:
        queries = torch.arange(len(positives.counts)).repeat_interleave(positives.counts)
        by_pair = scores[positives.pairs]
        by_score = by_pair.argsort(descending=True, stable=True)
        ordered = by_pair[by_score[queries[by_score].argsort(stable=True)]]
        if not all_positives:
            first = positives.offsets[:-1][positives.counts > 0]
            ordered, queries = ordered[first], queries[first]
        self._positives, self._all_positives, self._margin = positives, all_positives, margin
        self._queries = queries  # (thresholds,) ascending, on the CPU
        self._rows = queries.to(device)
        self._thresholds = (ordered - TIE_TOLERANCE).to(device)  # best first within a query
        self._counts = torch.zeros(len(ordered), dtype=torch.int64, device=device)
        self._near = torch.zeros_like(self._counts) if defers else None

    def add(self, tile: Tile) -> None:
        """Count a tile's negatives that rank before each positive of its queries."""
        ends = torch.tensor([tile.query_start, tile.query_start + len(tile.scores)])
        low, high = torch.searchsorted(self._queries, ends).tolist()
        rows = self._rows[low:high] - tile.query_start
        if self._near is None:
            # In most tiles, a query has no negative close to its positive.
            lowest = (self._thresholds[low:high] - self._margin).float()
            concerned = (tile.scores.amax(dim=1)[rows] >= lowest).nonzero().flatten()
        else:
            concerned = torch.arange(high - low, device=rows.device)
        for part in concerned.split(len(tile.scores)):  # the tile's memory has no more rows
            if len(part):
                scores, places = _select_rows(tile.scores, rows[part]), low + part
                self._counts[places] += self._count(tile, rows[part], scores, places)

    def to_ranking(self, num_candidates: int) -> Ranking:
        num_positives = self._positives.counts
        num_ranks = num_positives if self._all_positives else torch.ones_like(num_positives)
        first = num_ranks.cumsum(0) - num_ranks
        places = torch.arange(len(self._counts)) - first.repeat_interleave(num_ranks)
        ranks = 1 + places + self._counts.cpu()
        return Ranking(
            num_candidates=num_candidates,
            num_positives=num_positives,
            best_ranks=ranks[first],
            positive_ranks=ranks if self._all_positives else None,
        )

    def list_unsure(self) -> Tensor:
        """List the queries whose close scores were only counted."""
        return (
            self._queries[:0]
            if self._near is None
            else self._queries[self._near.cpu() > 0].unique()
        )

    def replace(self, queries: Tensor, counts: _NegativeCounts) -> None:
        """Replace the counts of some queries with counts from a run over only these queries."""
        self._counts[torch.isin(self._queries, queries).to(self._counts.device)] = counts._counts

    def _count(self, tile: Tile, rows: Tensor, scores: Tensor, places: Tensor) -> Tensor:
        """Count the scores that reach the thresholds in some rows of a tile, (q,) int64."""
        thresholds = self._thresholds[places, None]
        lowest, highest = (thresholds - self._margin).float(), (thresholds + self._margin).float()
        counts = _count_above(scores, highest, tile.memory)
        near_counts = _count_above(scores, lowest, tile.memory) - counts
        if self._near is not None:
            self._near[places] += near_counts
            return counts
        unsure = near_counts.nonzero().flatten()
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
    if scores.is_contiguous():
        return scores.index_select(0, rows)
    # The rows of a transposed tile are columns in memory; select them without a strided copy.
    return scores.T.index_select(1, rows).T


def _count_above(scores: Tensor, thresholds: Tensor, memory: Tensor) -> Tensor:
    # Summing float32 ones is faster than summing booleans, and exact up to 2^24, beyond any tile.
    above = memory.as_strided(scores.shape, scores.stride())
    torch.ge(scores, thresholds, out=above)
    return above.sum(dim=1).long()


class UnitRows:
    """Embeddings whose rows are normalized on access, without a normalized copy of all of them.

    Takes (N, P) of any float dtype on any device. Lengths are computed in float64,
    `rows_at_a_time`. A NaN or infinity raises ValueError with the row number.
    """

    def __init__(
        self, name: str, embeds: Tensor, *, device: torch.device, rows_at_a_time: int
    ) -> None:
        self.width = embeds.shape[1]
        self._embeds = embeds.to(device) if has_room(device, embeds.nbytes) else embeds
        self.device = device
        parts = self._embeds.split(rows_at_a_time)
        lengths = torch.cat(
            [linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in parts]
        )
        is_finite = lengths.isfinite()
        if not is_finite.all():
            raise ValueError(
                f"{name} row {int((~is_finite).long().argmax())} has a NaN or an infinity. Check "
                "the input it was computed from."
            )
        self._inverse_lengths = lengths.clamp(min=_MIN_LENGTH).reciprocal().to(device)  # (N,)

    def select(self, rows: Tensor) -> UnitRows:
        """Return the embeddings with the given row numbers."""
        selected = copy(self)
        selected._embeds = self._embeds[rows.to(self._embeds.device)]
        selected._inverse_lengths = self._inverse_lengths[rows.to(self.device)]
        return selected

    def write(self, start: int, buffer: Tensor) -> Tensor:
        """Fill an (n, P) float32 buffer with rows from `start`; return the filled part."""
        stop = min(start + len(buffer), len(self._embeds))
        rows = self._embeds[start:stop].to(self.device)
        scales = self._inverse_lengths[start:stop, None].float()
        return torch.mul(rows, scales, out=buffer[: stop - start])

    def take(self, rows: Tensor) -> Tensor:
        taken = self._embeds[rows.to(self._embeds.device)].to(self.device, torch.float64)
        return taken.mul_(self._inverse_lengths[rows.to(self.device), None])


@dataclass(frozen=True, eq=False)
class Tile:
    """Scores of some queries against some candidates, (n, m) float32; positives are -inf.

    `memory` is scratch space for n · m float32. `score_exactly` takes query and candidate row
    numbers and returns their (q, c) float64 scores.
    """

    query_start: int
    candidate_start: int
    scores: Tensor
    memory: Tensor
    score_exactly: Callable[[Tensor, Tensor], Tensor]

    def transpose(self) -> Tile:
        """Swap queries and candidates."""

        def score_exactly(queries: Tensor, candidates: Tensor) -> Tensor:
            return self.score_exactly(candidates, queries).T

        start, other = self.candidate_start, self.query_start
        return Tile(start, other, self.scores.T, self.memory, score_exactly)


def score_tiles(
    images: UnitRows, texts: UnitRows, correspondence: Correspondence, shape: TileShape
) -> Iterator[Tile]:
    """Score all images against all texts, reusing one tile's memory.

    Images are the queries. Pairs of the correspondence score -inf. A tile is valid until the next
    one is requested.
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
        for tile in range(tiles_per_block):
            text_rows = texts.write(tile * shape.texts, text_buffer.view(shape.texts, -1))
            size = len(image_rows), len(text_rows)
            scores = score_buffer[: math.prod(size)].view(size)
            torch.mm(image_rows, text_rows.T, out=scores)
            bounds = torch.tensor([0, 1]) + block * tiles_per_block + tile
            low, high = torch.searchsorted(tile_of_pair, bounds).tolist()
            scores[image_in_tile[low:high], text_in_tile[low:high]] = -torch.inf
            starts = block * shape.images, tile * shape.texts
            yield Tile(*starts, scores, memory, score_exactly)


def bound_float32_error(width: int) -> float:
    """Bound the difference between a float32 cosine and the exact one.

    With very high probability, the rounding error of a sum grows with the square root of its length
    (Higham and Mary, 2019, doi:10.1137/18M1226312). The bound allows three times the square root,
    plus four roundings for the embeddings themselves. The largest measured error is 1.6 times the
    square root, for embeddings that start with a large number (widths 8 to 4,096, several tile
    shapes).
    """
    return (3 * math.sqrt(width) + 4) * 2**-24
