"""What the service gives for one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..search.label_ranking import Tag
    from ..search.search_results import SearchResult


@dataclass(frozen=True)
class EmbeddedInputs:
    """Embeddings of the inputs of one request.

    Attributes:
        embeds: (N, D) float32 of unit length, in the order of the inputs.
        num_tokens: Tokens of all texts as the model read them, prompts included.
        truncated: Places of the texts that were truncated.
    """

    embeds: NDArray[np.float32]
    num_tokens: int
    truncated: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ClassifiedImages:
    """Labels of images.

    Attributes:
        tags: For each image its labels, best first.
        num_tokens: Tokens of all prompts as the model read them.
        truncated: Places of the candidate labels of which a prompt was truncated.
    """

    tags: list[list[Tag]]
    num_tokens: int
    truncated: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class FoundImages:
    """Images that were found in the index.

    Attributes:
        results: For each query its images, best first.
        num_tokens: Tokens of all texts as the model read them.
        truncated: Places of the queries of which a text was truncated.
    """

    results: list[SearchResult]
    num_tokens: int
    truncated: list[int] = field(default_factory=list)
