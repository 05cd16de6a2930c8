"""Results of the service (embeddings, labels, images), and the error for refused requests."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..search.search_results import SearchResult
from ..search.tag_images import Tag


@dataclass(frozen=True, kw_only=True)
class ServiceResult:
    """The fields common to all results.

    Attributes:
        num_tokens: Total number of tokens in all texts after truncation, including prompts.
        truncated: Positions of truncated texts, of candidate labels with a truncated prompt, or of
            queries with a truncated text.
    """

    num_tokens: int
    truncated: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class EmbeddedInputs(ServiceResult):
    """Embeddings of one request's inputs.

    Attributes:
        embeds: (N, D) float32 of unit length, in input order.
    """

    embeds: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ClassifiedImages(ServiceResult):
    """Labels of images.

    Attributes:
        tags: The labels of each image, best first.
    """

    tags: list[list[Tag]]


@dataclass(frozen=True, kw_only=True)
class FoundImages(ServiceResult):
    """Images in the index that match queries.

    Attributes:
        results: The images found for each query, best first.
    """

    results: list[SearchResult]


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        message: The error and its remedy, for the client.
        param: Name of the invalid request field; None if the error concerns the whole request.
        code: Short, machine-readable name of the error.
        retry_after_s: Seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
