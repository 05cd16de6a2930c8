"""Captions into a store of embeddings, taken before the text adapter.

The rows are the distinct captions, in the order of their first occurrence. The captions of a shard
are tokenized together, once, and form batches of similar length, the longest first. Which captions
share a batch depends on the shard alone, so a store that was continued has the same bytes as one
that was never interrupted, on the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch

from ...configs.extract_config import ExtractConfig
from ...data.captions.caption_columns import (
    CAPTION_COLUMNS,
    flatten_captions,
    iterate_first_captions,
)
from ...data.captions.distinct_texts import TextNumbers
from ...data.records.data_hashes import hash_texts
from ...data.records.record_table import RecordTable
from ...data.store.embedding_store_writer import EmbeddingStoreWriter, StoreItems
from ...data.store.store_index import make_batch
from ...encoding.encode import TorchEncoder
from ...encoding.encoder_interface import Encoder
from ...encoding.tokenized_texts import TokenizedTexts
from ...model_folders.fingerprint import fingerprint_text
from ...modeling_llm2clip import LLM2CLIPTextModel
from ...packing_llm2clip import plan_token_batches
from ...processing_llm2clip import LLM2CLIPProcessor, check_texts
from ...scheduling.shard_computation import PreparedShard
from .extraction_plan import ExtractionPlan, find_first_occurrences, plan_store

Array: TypeAlias = np.ndarray[Any, Any]
_ITEM_COLUMNS = ("name", "group_id", "lang", "key", "group_key", *CAPTION_COLUMNS)


def plan_captions(
    folder: Path, records: RecordTable, config: ExtractConfig, device: torch.device
) -> ExtractionPlan:
    """Plan the embeddings of all captions, each distinct one once; loads the LLM alone.

    Args:
        folder: Model folder.
        records: The dataset; short and long captions are stored.
        config: Options of the extraction.
        device: Where the LLM runs.

    Raises:
        ValueError: There are no captions.
    """
    if not any(short.any() or long.any() for short, long in records.iterate_counts()):
        check_texts([])
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    model = LLM2CLIPTextModel.from_pretrained(folder)
    fingerprint = fingerprint_text(folder)
    model = model.to(device)
    encoder = TorchEncoder(model, processor)
    budget = config.token_budget or encoder.token_budget
    manifest = plan_store(
        "caption_embeds",
        config,
        fingerprint=fingerprint,
        dim=model.config.text_width,
        plan={"data": hash_texts(records), "token_budget": str(budget)},
    )

    def open_shards(writer: EmbeddingStoreWriter) -> _CaptionShards:
        return _CaptionShards(encoder, records, writer, token_budget=budget)

    return ExtractionPlan(
        manifest, lambda scratch: list_caption_items(records, scratch), open_shards, " captions"
    )


def list_caption_items(records: RecordTable, scratch: Path) -> StoreItems:
    """Number the distinct captions of a dataset.

    Args:
        records: The dataset.
        scratch: Empty folder for temporary files, about as large as all captions.

    Raises:
        ValueError: Captions are blank; all of them are counted.
    """
    num_captions = sum(
        int(counts.sum(dtype=np.int64)) for pair in records.iterate_counts() for counts in pair
    )
    numbers = TextNumbers(scratch, num_captions)
    suspicious: list[str] = []
    for batch in records.iterate_columns((*CAPTION_COLUMNS, "text_keys")):
        keys = np.asarray(batch.column("text_keys").flatten())
        distinct = numbers.add(flatten_captions(batch).texts, keys)
        suspicious += _find_blank(distinct)
    if suspicious:
        check_texts(suspicious)
    numbers.number()
    return StoreItems(
        num_rows=numbers.num_distinct,
        num_items=len(records),
        counts={"captions": num_captions, "distinct": numbers.num_distinct},
        batches=_make_batches(records, numbers),
    )


def _make_batches(records: RecordTable, numbers: TextNumbers) -> Iterator[pa.RecordBatch]:
    for batch, rows in zip(records.iterate_columns(_ITEM_COLUMNS), numbers, strict=True):
        flat = flatten_captions(batch)
        yield make_batch(batch, flat.num_short, flat.ends, rows)


def _find_blank(texts: pa.Array) -> list[str]:
    """List the blank texts; Arrow passes those with a letter, and Python looks at the others."""
    unclear = texts.filter(pc.invert(pc.match_substring_regex(texts, "[!-~]")))
    return [text for text in unclear.to_pylist() if not text.strip()]


class _CaptionShards:
    """Prepares shards of captions."""

    def __init__(
        self,
        encoder: Encoder,
        records: RecordTable,
        writer: EmbeddingStoreWriter,
        *,
        token_budget: int,
    ) -> None:
        self._encoder = encoder
        self._records = records
        self._token_budget = token_budget
        self._occurrences = find_first_occurrences(writer)

    def __call__(self, rows: range) -> PreparedShard:
        texts = list(iterate_first_captions(self._records, self._occurrences, rows))
        tokens = TokenizedTexts(self._encoder.processor, texts)
        plan = plan_token_batches(tokens.lengths.tolist(), token_budget=self._token_budget)
        return PreparedShard(
            batches=[np.array(places) for places in plan],
            encode=lambda batches: self._encoder.iterate_texts(
                tokens, [places.tolist() for places in batches], project=False
            ),
            num_truncated=tokens.num_truncated,
        )
