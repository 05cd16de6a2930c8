"""Options of encoding texts and images, and of stage 2, the extraction."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from annotated_types import Interval

from .config_fields import DeviceConfig, ShardSize

Backend: TypeAlias = Literal["torch", "onnx"]
TextWeights: TypeAlias = Literal["float32", "int8", "int4"]
_MOST_ROWS_PER_SHARD = 2**16
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(DeviceConfig):
    """Options of encoding; in float32 none of them changes an embedding."""

    batch_size: Annotated[int, Interval(ge=1)] | None = None
    """Texts or images per batch. Default: by device."""
    num_workers: Annotated[int, Interval(ge=1)] | None = None
    """Threads that decode images. Default: one per core, at most 8."""
    show_progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True, kw_only=True)
class BackendConfig(DeviceConfig):
    """The library that runs a model."""

    backend: Backend = "torch"
    """Runtime of the model: torch, or onnx for ONNX Runtime on the CPU; MODEL is then a folder that
    `llm2clip export --onnx` wrote."""
    text_weights: TextWeights | None = None
    """With `backend` onnx, weights of the language model's linear layers. Default: the most exact
    ones in the folder."""

    def _find_conflicts(self) -> Iterator[str]:
        yield from super()._find_conflicts()
        if self.backend == "torch" and self.text_weights is not None:
            yield f"text_weights={self.text_weights} needs backend='onnx'."
        if self.backend == "onnx" and self.device not in ("auto", "cpu"):
            yield f"device={self.device}: backend='onnx' runs on the CPU. Leave the device out."


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(EncodingConfig):
    """Options of `extract`: computing and storing embeddings.

    A store that is begun is continued with the same `store_dtype`, `max_shard_size`, `batch_size`
    and `token_budget`.
    """

    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Dtype of the stored embeddings; what it cannot hold is refused, never clipped."""
    max_shard_size: ShardSize = "512MB"
    """Maximum size of a file of the store, such as 512MB or 1GiB; none has more than 65,536
    embeddings. An interrupted run continues within a file, whatever its size."""
    token_budget: Annotated[int, Interval(ge=1)] | None = None
    """Maximum number of tokens of a batch of captions, padding included. Default: by device."""

    def count_rows_per_shard(self, row_bytes: int) -> int:
        """Return how many embeddings a file of the store has.

        Args:
            row_bytes: Bytes of one stored embedding.
        """
        number, unit = re.findall(r"\d+|\D+", self.max_shard_size)
        size = int(number) * _UNITS[unit]
        return min(max(1, size // row_bytes), _MOST_ROWS_PER_SHARD)
