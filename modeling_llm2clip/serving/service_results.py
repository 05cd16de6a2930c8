"""Results of the service for one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..search.label_ranking import Tag
    from ..search.search_results import SearchResult


@dataclass(frozen=True, kw_only=True)
class ServiceResult:
    """Facts about the texts of a request, which every result has.

    Attributes:
        num_tokens: Tokens of all texts as the model read them, prompts included.
        truncated: Places of truncated texts; of candidate labels with a truncated prompt; or of
            queries with a truncated text.
    """

    num_tokens: int
    truncated: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class EmbeddedInputs(ServiceResult):
    """Embeddings of the inputs of one request.

    Attributes:
        embeds: (N, D) float32 of unit length, in the order of the inputs.
    """

    embeds: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ClassifiedImages(ServiceResult):
    """Labels of images.

    Attributes:
        tags: For each image its labels, best first.
    """

    tags: list[list[Tag]]


@dataclass(frozen=True, kw_only=True)
class FoundImages(ServiceResult):
    """Images that were found in the index.

    Attributes:
        results: For each query its images, best first.
    """

    results: list[SearchResult]
