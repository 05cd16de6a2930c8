"""Search results, and exact ranking of embeddings in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SearchResult:
    """A query and the images found for it, best first.

    Attributes:
        query: The sentence, or the name of the query image; of several combined, all of them.
        hits: Path and cosine of each image.
        query_image: The query image, where there is a file of it.
        columns: Columns of the index for each hit, such as `width` and `taken`; empty where the
            images come from no index.
    """

    query: str
    hits: Sequence[tuple[Path, float]]
    query_image: Path | None = None
    columns: Sequence[Mapping[str, Any]] = field(default=(), compare=False)

    def __str__(self) -> str:
        lines = [self.query, "  rank  cosine  image"]
        for rank, (path, cosine) in enumerate(self.hits, start=1):
            lines.append(f"  {rank:>4}  {cosine:>6.3f}  {path}")
        return "\n".join(lines)


def rank_images(
    queries: Sequence[str], cosines: Tensor, paths: Sequence[Path], *, top_k: int = 6
) -> list[SearchResult]:
    """Return the images with the greatest cosines, (queries, images), for each query."""
    require_top_k(top_k)
    if broken := int((~cosines.isfinite()).sum()):  # a NaN would come first
        raise ValueError(
            f"{broken} of {cosines.numel()} cosines are NaN or infinite: the model gives broken "
            "embeddings. Check it with llm2clip doctor."
        )
    best = cosines.topk(min(top_k, len(paths)))
    return [
        SearchResult(query, [(paths[i], float(s)) for s, i in zip(scores, rows, strict=True)])
        for query, scores, rows in zip(queries, best.values, best.indices, strict=True)
    ]


def require_top_k(top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")
