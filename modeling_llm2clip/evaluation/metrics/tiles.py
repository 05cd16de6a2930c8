"""Tiles of the score matrix, computed one after the other in the same memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .correspondence import Correspondence
from .unit_rows import UnitRows

# A tile of float32 scores should stay in a processor's cache; a GPU wants large ones.
_MOST_TEXTS_CPU = 512
_MOST_TEXTS_GPU = 2048
# A block of images is made unit length once, the texts for every block anew.
_IMAGES_A_TEXT = 4
_MB = 1e6


@dataclass(frozen=True)
class TileShape:
    """How many images and texts a tile has at most."""

    images: int
    texts: int


def choose_tile_shape(width: int, *, max_memory_mb: float, device_type: str = "cpu") -> TileShape:
    """Take as many rows as memory holds, but not more than is fast.

    Args:
        max_memory_mb: for everything that is held beside the embeddings, in 10^6 bytes.
    Raises: ValueError when there is no room for one image and one text.
    """
    # Bytes of a score: itself and its comparison, both for some queries once more, and, were all
    # too near to a threshold, selection, masks and float64. Bytes of a row: float32 and as it is
    # stored, and, in that case, as it is stored and float64 twice.
    per_score, per_row = 40, 28 * width
    squared, linear = per_score * _IMAGES_A_TEXT, per_row * (1 + _IMAGES_A_TEXT)
    root = math.sqrt(linear**2 + 4 * squared * max_memory_mb * _MB)
    texts = int((root - linear) / (2 * squared))
    if texts < 1:
        raise ValueError(
            f"max_memory_mb={max_memory_mb:g} does not hold a tile of {_IMAGES_A_TEXT} images and "
            f"a text of width {width}; that takes {(squared + linear) / _MB:.2g}."
        )
    texts = min(texts, _MOST_TEXTS_CPU if device_type == "cpu" else _MOST_TEXTS_GPU)
    return TileShape(_IMAGES_A_TEXT * texts, texts)


@dataclass(frozen=True, eq=False)
class Tile:
    """Scores of some queries with some candidates.

    Attributes:
        query_start, candidate_start: the rows where it begins.
        scores: (n, m) float32, without gaps in memory; positives have minus infinity.
        memory: (n · m or more,) float32, to write over.
        score_exactly: rows of queries and of candidates to (q, c) float64 scores.
    """

    query_start: int
    candidate_start: int
    scores: Tensor
    memory: Tensor
    score_exactly: Callable[[Tensor, Tensor], Tensor]

    def transpose(self) -> Tile:
        """Let the candidates be the queries."""

        def score_exactly(queries: Tensor, candidates: Tensor) -> Tensor:
            return self.score_exactly(candidates, queries).T

        start, other = self.candidate_start, self.query_start
        return Tile(start, other, self.scores.T, self.memory, score_exactly)


class TileScorer:
    """Scores all images with all texts, tile after tile.

    Args:
        images, texts: the rows.
        correspondence: whose pairs get minus infinity.
        shape: of a tile.
        device: where tiles are computed; where the rows are wanted.
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
        self._tiles_a_block = math.ceil(correspondence.num_texts / shape.texts)
        image, text = correspondence.image_of_pair, correspondence.text_of_pair
        tiles = image // shape.images * self._tiles_a_block + text // shape.texts
        self._tile_of_pair, order = tiles.sort()
        self._image_in_tile = (image % shape.images)[order].to(device)
        self._text_in_tile = (text % shape.texts)[order].to(device)
        self._image_buffer = torch.empty(shape.images, images.width, device=device)
        self._text_buffer = torch.empty(shape.texts, texts.width, device=device)
        self._scores, self._memory = (
            torch.empty(shape.images * shape.texts, device=device) for _ in range(2)
        )

    def score_all(self, *, over_processes: bool) -> Iterator[Tile]:
        """Yield this process's tiles, images as queries; each is valid until the next."""
        rank, step = (dist.get_rank(), dist.get_world_size()) if over_processes else (0, 1)
        block_in_buffer, image_rows = -1, self._image_buffer
        for number in range(rank, self._num_blocks * self._tiles_a_block, step):
            block, place = divmod(number, self._tiles_a_block)
            if block != block_in_buffer:
                image_rows = self._images.write(block * self._shape.images, self._image_buffer)
                block_in_buffer = block
            text_rows = self._texts.write(place * self._shape.texts, self._text_buffer)
            size = len(image_rows), len(text_rows)
            scores = self._scores[: math.prod(size)].view(size)
            torch.mm(image_rows, text_rows.T, out=scores)
            self._strike_positives(scores, number)
            starts = block * self._shape.images, place * self._shape.texts
            yield Tile(*starts, scores, self._memory, self._score_exactly)

    def _strike_positives(self, scores: Tensor, number: int) -> None:
        bounds = torch.tensor([number, number + 1])
        low, high = torch.searchsorted(self._tile_of_pair, bounds).tolist()
        scores[self._image_in_tile[low:high], self._text_in_tile[low:high]] = -torch.inf

    def _score_exactly(self, images: Tensor, texts: Tensor) -> Tensor:
        return self._images.take(images) @ self._texts.take(texts).T
