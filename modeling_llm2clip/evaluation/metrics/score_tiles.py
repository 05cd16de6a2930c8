"""Tiles of the score matrix, computed one after the other in the same memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...encoding.float32 import float32_as_such
from .correspondence import Correspondence

# A tile of float32 scores should fit into the cache of a CPU; a GPU works best on large ones.
_MAX_TEXTS_CPU = 512
_MAX_TEXTS_GPU = 2048
# A block of images is normalized once, the texts for every block anew.
_IMAGES_PER_TEXT = 4
_MB = 1e6
# Shorter embeddings keep their direction and get a length below 1, as in F.normalize.
_MIN_LENGTH = 1e-12


@dataclass(frozen=True)
class TileShape:
    """Largest size of a tile.

    Attributes:
        images: Number of images.
        texts: Number of texts.
    """

    images: int
    texts: int


def choose_tile_shape(width: int, *, max_memory_mb: float, device_type: str = "cpu") -> TileShape:
    """Choose as many rows as the memory holds, but no more than is fast.

    Args:
        width: Width of the embeddings.
        max_memory_mb: For everything that is held beside the embeddings, in 10^6 bytes.
        device_type: `"cpu"` or that of a GPU.

    Raises:
        ValueError: There is no room for one tile.
    """
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

    Args:
        name: Name of the embeddings in errors.
        embeds: (N, P) of any float dtype, on any device.
        device: Where the rows go.
        rows_at_a_time: How many rows are held in float64 while lengths are computed.

    Raises:
        ValueError: A row has a NaN or an infinity; the first one is named.
    """

    def __init__(
        self, name: str, embeds: Tensor, *, device: torch.device, rows_at_a_time: int
    ) -> None:
        self.width = embeds.shape[1]
        self._embeds = embeds
        self._device = device
        inverses = []
        for start in range(0, len(embeds), rows_at_a_time):
            rows = embeds[start : start + rows_at_a_time]
            lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            if not lengths.isfinite().all():
                row = start + int((~lengths.isfinite()).long().argmax())
                raise ValueError(
                    f"{name} row {row} has a NaN or an infinity. Find out which input it comes "
                    "from before anything is ranked."
                )
            inverses.append(lengths.clamp(min=_MIN_LENGTH).reciprocal())
        self._inverse_lengths = torch.cat(inverses).to(device)  # (N,) float64

    def write(self, start: int, buffer: Tensor) -> Tensor:
        """Write rows into a float32 buffer, until it is full or there are no more.

        Args:
            start: The first row.
            buffer: (n, P) float32 on the device.

        Returns:
            The part of the buffer that was written.
        """
        stop = min(start + len(buffer), len(self._embeds))
        rows = self._embeds[start:stop].to(self._device)
        scales = self._inverse_lengths[start:stop, None].float()
        return torch.mul(rows, scales, out=buffer[: stop - start])

    def take(self, rows: Tensor) -> Tensor:
        """Return some rows.

        Args:
            rows: (n,) int64, numbers of the rows.

        Returns:
            (n, P) float64.
        """
        taken = self._embeds[rows.to(self._embeds.device)].to(self._device, torch.float64)
        return taken.mul_(self._inverse_lengths[rows.to(self._device), None])


@dataclass(frozen=True, eq=False)
class Tile:
    """Scores of some queries with some candidates.

    Attributes:
        query_start: Row of its first query.
        candidate_start: Row of its first candidate.
        scores: (n, m) float32, without gaps in memory; positives have minus infinity.
        memory: (n · m or more,) float32, to write over.
        score_exactly: Makes (q, c) float64 scores of rows of queries and rows of candidates.
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


class TileScorer:
    """Scores all images with all texts, tile after tile.

    Args:
        images: Embeddings of the images.
        texts: Embeddings of the texts.
        correspondence: Its pairs get minus infinity.
        shape: Largest size of a tile.
        device: Where tiles are computed; the rows must be on it.
    """

    def __init__(
        self,
        images: UnitRows,
        texts: UnitRows,
        correspondence: Correspondence,
        shape: TileShape,
        device: torch.device,
    ) -> None:
        self._images, self._texts, self._shape = images, texts, shape
        self._num_blocks = math.ceil(correspondence.num_images / shape.images)
        self._tiles_per_block = math.ceil(correspondence.num_texts / shape.texts)
        image, text = correspondence.image_of_pair, correspondence.text_of_pair
        tiles = image // shape.images * self._tiles_per_block + text // shape.texts
        self._tile_of_pair, order = tiles.sort()
        self._image_in_tile = (image % shape.images)[order].to(device)
        self._text_in_tile = (text % shape.texts)[order].to(device)
        self._image_buffer = torch.empty(
            shape.images, images.width, dtype=torch.float32, device=device
        )
        self._text_buffer = torch.empty(
            shape.texts, texts.width, dtype=torch.float32, device=device
        )
        self._scores, self._memory = (
            torch.empty(shape.images * shape.texts, dtype=torch.float32, device=device)
            for _ in range(2)
        )

    def score_all(self) -> Iterator[Tile]:
        """Yield all tiles, with images as queries; each is valid until the next."""
        for block in range(self._num_blocks):
            image_rows = self._images.write(block * self._shape.images, self._image_buffer)
            for place in range(self._tiles_per_block):
                text_rows = self._texts.write(place * self._shape.texts, self._text_buffer)
                size = len(image_rows), len(text_rows)
                scores = self._scores[: math.prod(size)].view(size)
                torch.mm(image_rows, text_rows.T, out=scores)
                self._mask_positives(scores, block * self._tiles_per_block + place)
                starts = block * self._shape.images, place * self._shape.texts
                yield Tile(*starts, scores, self._memory, self._score_exactly)

    def _mask_positives(self, scores: Tensor, number: int) -> None:
        bounds = torch.tensor([number, number + 1])
        low, high = torch.searchsorted(self._tile_of_pair, bounds).tolist()
        scores[self._image_in_tile[low:high], self._text_in_tile[low:high]] = -torch.inf

    def _score_exactly(self, images: Tensor, texts: Tensor) -> Tensor:
        return self._images.take(images) @ self._texts.take(texts).T


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Compute float32 products in float32: no TF32, no bfloat16, no autocast.

    Both have 10 bits of mantissa or fewer, and the switches that choose them hold for the whole
    program; candidates with nearly equal scores would swap ranks.

    Args:
        device_type: Type of the device whose autocast is switched off.
    """
    with torch.autocast(device_type, enabled=False), float32_as_such():
        yield


def bound_float32_error(width: int) -> float:
    """Bound the difference between a float32 cosine and the exact one.

    The rounding error of a sum grows with the root of its length with all but certain probability
    (Higham and Mary, 2019, doi:10.1137/18M1226312). Three roots, and four roundings for the
    embeddings themselves; the most that was measured is 1.6 roots, for embeddings that begin with a
    large number (widths 8 to 4,096, tiles of several shapes).

    Args:
        width: Width of the embeddings.
    """
    return (3 * math.sqrt(width) + 4) * 2**-24
