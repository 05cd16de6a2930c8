"""Stage 2: captions into a store of embeddings, taken before the adapter.

The rows are the distinct captions, longest first, and by first occurrence among equally long ones:
then a shard's captions are about equally long, and what does not fit the memory fails at once.
Which captions share a batch depends on the shard alone, so a store that was continued has the same
bytes as one that never was interrupted, on the same kind of machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ...data.data_hashes import hash_records
from ...data.embedding_store import StoreManifest
from ...data.embedding_store_writer import EmbeddingStoreWriter
from ...data.records import CaptionedImage
from ...encoding.text_encoding import default_token_budget, encode_token_ids
from ...model_folders.fingerprint import fingerprint_text
from ...modeling_llm2clip import LLM2CLIPTextModel
from ...processing_llm2clip import LLM2CLIPProcessor, check_texts
from ..graceful_stop import StopRequest
from .extract import (
    ExtractionArguments,
    ExtractionReport,
    StoreProgress,
    choose_device,
    pack_records,
    write_missing_shards,
)
from .text_lengths import measure_texts


@dataclass(frozen=True)
class CaptionPlan:
    """Which caption is in which row.

    Attributes:
        captions: one a row, all different.
        lengths: tokens of each.
        index: content of the store's index.
        data: SHA-256 of the data set.
        counts: captions, distinct ones, and distinct ones that are cut.
    """

    captions: list[str]
    lengths: list[int]
    index: bytes
    data: str
    counts: dict[str, int]


def extract_captions(
    model_folder: str | Path,
    records: Sequence[CaptionedImage],
    output: str | Path,
    arguments: ExtractionArguments | None = None,
    *,
    stop: StopRequest | None = None,
) -> ExtractionReport:
    """Compute the embeddings of all captions into a store, or go on with one.

    Only the text half of the model is loaded.

    Args:
        model_folder: folder or Hub id of a model.
        records: the data set; item i of the store is record i.
        output: folder of the store: new, empty, or of the same store, which is continued.
        stop: from `stop_on_signals`: the shard in hand is finished first.
    Raises:
        ValueError: no captions, or blank ones; or `output` is a store of another model, prompt,
            data set or setting, named with both values.
        OSError: the disk is full; whole shards stay.
    """
    arguments = arguments or ExtractionArguments()
    device = choose_device(arguments)
    processor = LLM2CLIPProcessor.from_pretrained(model_folder)
    plan = plan_captions(processor, records, show_progress=arguments.show_progress)
    model = LLM2CLIPTextModel.from_pretrained(model_folder)
    fingerprint = fingerprint_text(model_folder)
    model = model.to(device)
    budget = arguments.token_budget or default_token_budget(device)
    manifest = StoreManifest(
        content="caption_embeds",
        fingerprint=fingerprint,
        dtype=arguments.dtype,
        dim=model.config.text_width,
        num_rows=len(plan.captions),
        num_items=len(records),
        rows_per_shard=arguments.rows_per_shard,
        plan={"data": plan.data, "token_budget": str(budget)},
        counts=plan.counts,
        index_bytes=len(plan.index),
        index_sha256=hashlib.sha256(plan.index).hexdigest(),
    )

    def compute(rows: range, tell: Callable[[int], object]) -> Tensor:
        ids, _ = processor.list_ids(plan.captions[rows.start : rows.stop])
        return encode_token_ids(model, processor, ids, token_budget=budget, on_batch=tell)[0]

    writer = EmbeddingStoreWriter.open(output, manifest, plan.index)
    progress = StoreProgress(
        writer, unit=" tokens", sizes=plan.lengths, shown=arguments.show_progress
    )
    return write_missing_shards(writer, compute, stop=stop, progress=progress)


def plan_captions(
    processor: LLM2CLIPProcessor, records: Sequence[CaptionedImage], *, show_progress: bool = False
) -> CaptionPlan:
    """Give every distinct caption its row.

    Raises: ValueError when there are no captions, or naming every blank one.
    """
    captions = [text for r in records for text in (*r.captions, *r.long_captions)]
    distinct = list(dict.fromkeys(captions))
    check_texts(distinct)
    lengths, num_truncated = measure_texts(processor, distinct, show_progress=show_progress)
    order = np.argsort(-lengths, kind="stable")
    ordered = [distinct[i] for i in order.tolist()]
    row_of = {caption: row for row, caption in enumerate(ordered)}
    index = pack_records(
        records,
        short=[[row_of[text] for text in r.captions] for r in records],
        long=[[row_of[text] for text in r.long_captions] for r in records],
    )
    counts = {"captions": len(captions), "distinct": len(distinct), "truncated": num_truncated}
    return CaptionPlan(ordered, lengths[order].tolist(), index, hash_records(records), counts)
