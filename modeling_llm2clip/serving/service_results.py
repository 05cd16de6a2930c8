"""Results of the service: embeddings, labels, images; and the error of a refused request."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..search.search_results import SearchResult
from ..search.tag_labels import Tag


@dataclass(frozen=True, kw_only=True)
class ServiceResult:
    """Number of tokens and truncated texts of a request, which every result has.

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
    """Images of the index that fit queries.

    Attributes:
        results: For each query its images, best first.
    """

    results: list[SearchResult]


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        message: The error and its remedy, for the client.
        param: Field of the request; None for the request as a whole.
        code: A short name for programs.
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
