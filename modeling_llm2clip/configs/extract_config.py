"""Stage 2: how embeddings are extracted into a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .config_fields import Range
from .encoding_config import EncodingConfig


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(EncodingConfig):
    """How `extract` computes and stores embeddings.

    A store that is begun is continued with the same `store_dtype`, `rows_per_shard`, `batch_size`
    and `token_budget`.
    """

    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Dtype of the stored embeddings; what it cannot hold is refused, never clipped."""
    rows_per_shard: Annotated[int, Range(min=1)] = 2048
    """Embeddings per file of the store; a killed run computes at most these again."""
    token_budget: Annotated[int, Range(min=1)] | None = None
    """Maximum number of tokens of a batch of captions, padding included. Default: by device."""
