"""Short runs of `embed` on made-up captions, for the tests of `embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from made_up_records import make_records

from modeling_llm2clip.configs.encoding_config import EmbedConfig
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.embedding.embed import embed

TEXT = EmbedConfig(
    columns=("text", "name"),
    rows_per_shard=16,
    batch_size=2,
    device="cpu",
    show_progress=False,
)
IMAGE = EmbedConfig(rows_per_shard=4, batch_size=3, device="cpu", show_progress=False)


def make_few_texts(count: int) -> list[CaptionedImage]:
    """Records of 3 to 5 captions and at most one long one."""
    return make_records(count, fewest=3, most_long=1)


def embed_texts(
    model: Path, records: list[CaptionedImage], folder: Path, config: EmbedConfig = TEXT
) -> Path:
    return embed(model, records, folder, config, modality="text")


def read_embeddings(folder: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Read ids and embeddings, as any reader of a folder of Parquet files does."""
    table = pq.read_table(folder)
    embeddings = table["embedding"].combine_chunks().flatten().to_numpy()
    return table["id"].to_pylist(), embeddings.reshape(len(table), -1)
