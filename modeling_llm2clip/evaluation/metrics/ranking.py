"""Compute exact ranks of the positives in both retrieval directions, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import normalize

from ...encoding.devices import has_room
from .correspondence import Correspondence, PositiveLists

# A model that encodes the same input in two batches returns slightly different float32 values.
TIE_TOLERANCE = 1e-6
TIE_RULE = (
    "ties count against the model: a wrong candidate whose cosine is no more than "
    f"{TIE_TOLERANCE:g} below the right candidate's is ranked before it"
)


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


# A tile of scores should fit in a CPU's cache; a GPU prefers large tiles. Each block of images is
# normalized once, while the texts are normalized again for every block.
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
) -> RetrievalRanks:
    """Rank the positives of every image and every text by exact cosine, in one pass.

    Embeddings are (I, P) and (T, P), of any float dtype and length. NaNs raise ValueError, and
    all-zero rows have cosine 0 with everything. `all_positives` ranks all positives instead of only
    the best one, which compares the scores with one more threshold per additional positive.

    The rank of a query's k-th best positive is k plus the number of non-positive candidates that
    score at least as high. Ties count against the model, so a model that gives all inputs the same
    embedding does not look good. Scores within `TIE_TOLERANCE` are ties, so rounding does not
    affect ranks. The positives of one query do not lower each other's ranks.

    Positives are scored first. Then each tile of the score matrix is computed, compared with the
    thresholds of both directions, and dropped. All scores are float64, because float32 would swap
    candidates with nearly equal scores, so ranks are the same on any device and with any tile
    `shape`; the default shape is fast on the device. Working memory does not grow with the number
    of rows, except for a few numbers per row and pair and, on a GPU, the embeddings themselves if
    they fit in half of its memory.

    `device` runs the computation and defaults to the images' device.
    """
    _require_fit(image_embeds, text_embeds, correspondence)
    device = device or image_embeds.device
    shape = shape or (TILE_OF_CPU if device.type == "cpu" else _TILE_OF_GPU)
    images, texts = (
        _UnitRows(name, embeds, device)
        for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds))
    )
    pairs = correspondence.image_of_pair, correspondence.text_of_pair
    parts = zip(*(rows.split(shape.texts) for rows in pairs), strict=True)
    scores = torch.cat([vecdot(images.take(i), texts.take(t)) for i, t in parts]).cpu()
    i2t, t2i = (
        _NegativeCounts(positives, scores, all_positives=all_positives, device=device)
        for positives in (correspondence.texts_of_images(), correspondence.images_of_texts())
    )
    for first_image, first_text, tile in _score_tiles(images, texts, correspondence, shape):
        i2t.add(first_image, tile)
        t2i.add(first_text, tile.T)
    return RetrievalRanks(i2t.to_ranking(len(text_embeds)), t2i.to_ranking(len(image_embeds)))


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
    positive is a threshold; with `all_positives`, so are all others.
    """

    def __init__(
        self,
        positives: PositiveLists,
        scores: Tensor,
        *,
        all_positives: bool,
        device: torch.device,
    ) -> None:
        queries = torch.arange(len(positives.counts)).repeat_interleave(positives.counts)
        by_pair = scores[positives.pairs]
        by_score = by_pair.argsort(descending=True, stable=True)
        ordered = by_pair[by_score[queries[by_score].argsort(stable=True)]]
        if not all_positives:
            first = positives.offsets[:-1]
            ordered, queries = ordered[first], queries[first]
        self._positives, self._all_positives = positives, all_positives
        self._queries = queries  # (thresholds,) ascending, on the CPU
        self._thresholds = (ordered - TIE_TOLERANCE).to(device)  # best first within a query
        self._counts = torch.zeros(len(ordered), dtype=torch.int64, device=device)

    def add(self, first_query: int, scores: Tensor) -> None:
        """Count the negatives in a tile, (queries, candidates), before each of its positives."""
        ends = torch.tensor([first_query, first_query + len(scores)])
        low, high = torch.searchsorted(self._queries, ends).tolist()
        rows = (self._queries[low:high] - first_query).to(scores.device)
        # In most tiles, a query has no negative close to its positive.
        near = (scores.amax(dim=1)[rows] >= self._thresholds[low:high]).nonzero().flatten()
        for part in near.split(len(scores)):  # as much memory as the tile
            is_before = _select_rows(scores, rows[part]) >= self._thresholds[low + part, None]
            self._counts[low + part] += is_before.sum(dim=1)

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


def _select_rows(scores: Tensor, rows: Tensor) -> Tensor:
    if scores.is_contiguous():
        return scores.index_select(0, rows)
    return scores.T.index_select(1, rows).T


class _UnitRows:
    """Embeddings whose rows become float64 of unit length on access, without a copy of all."""

    def __init__(self, name: str, embeds: Tensor, device: torch.device) -> None:
        self._embeds = embeds.to(device) if has_room(device, embeds.nbytes) else embeds
        self._device = device
        parts = self._embeds.split(TILE_OF_CPU.texts)
        is_finite = torch.cat([rows.isfinite().all(dim=1) for rows in parts])
        if not is_finite.all():
            raise ValueError(
                f"{name} row {int((~is_finite).long().argmax())} has a NaN or an infinity. Check "
                "the input it was computed from."
            )

    def take(self, rows: Tensor) -> Tensor:
        taken = self._embeds[rows.to(self._embeds.device)]
        return normalize(taken.to(self._device, torch.float64), dim=-1)


def _score_tiles(
    images: _UnitRows, texts: _UnitRows, correspondence: Correspondence, shape: TileShape
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield each tile's first image, first text and float64 scores; positives are -inf."""
    for image_rows in torch.arange(correspondence.num_images).split(shape.images):
        image_embeds = images.take(image_rows)
        for text_rows in torch.arange(correspondence.num_texts).split(shape.texts):
            scores = image_embeds @ texts.take(text_rows).T
            image = correspondence.image_of_pair - image_rows[0]
            text = correspondence.text_of_pair - text_rows[0]
            is_here = (image >= 0) & (image < len(image_rows))
            is_here &= (text >= 0) & (text < len(text_rows))
            scores[image[is_here], text[is_here]] = -torch.inf
            yield int(image_rows[0]), int(text_rows[0]), scores
