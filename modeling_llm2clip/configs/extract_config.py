"""Options of stage 2, the extraction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .config_fields import ShardSize
from .encoding_config import EncodingConfig

_MOST_ROWS_PER_SHARD = 2**16
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(EncodingConfig):
    """Options of `extract`: computing and storing embeddings.

    An interrupted store continues only with the same `store_dtype`, `max_shard_size`, `batch_size`
    and `token_budget`.
    """

    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Dtype of the stored embeddings; values that it cannot hold are refused, never clipped."""
    max_shard_size: ShardSize = "512MB"
    """Maximum size of a file of the store, such as 512MB or 1GiB, and at most 65,536 embeddings. An
    interrupted run continues within a file of any size."""
    token_budget: Annotated[int, Interval(ge=1)] | None = None
    """Maximum number of tokens per batch of captions, padding included. Default: by device."""

    def count_rows_per_shard(self, row_bytes: int) -> int:
        """Return how many embeddings a file of the store has.

        Args:
            row_bytes: Bytes of one stored embedding.
        """
        number, unit = re.findall(r"\d+|\D+", self.max_shard_size)
        size = int(number) * _UNITS[unit]
        return min(max(1, size // row_bytes), _MOST_ROWS_PER_SHARD)
