"""What a run trains on and measures itself on: records of an index, or a stream of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import TrainingArguments

from ...configs.align_config import AlignConfig
from ...data.records.data_hashes import describe_images, hash_records
from ...data.records.record_table import RecordTable
from ...data.store.embedding_store import EmbeddingStore
from ...data.streams.record_streams import RecordStream
from ...data.streams.stream_run import hash_shards
from ...processing_llm2clip import LLM2CLIPProcessor
from .alignment_batches import Batches, SampledBatches, StreamedBatches
from .alignment_data import AlignmentDataset
from .alignment_stream import AlignmentStream, hold_out_of_stream
from .held_out import HeldOutImages, choose_held_out, count_shared_captions
from .sampling import NOISE_SAMPLING, Array


@dataclass(frozen=True)
class RunData:
    """What a run trains on and measures itself on.

    Attributes:
        dataset: Makes its batches.
        items: Of the dataset, that are trained on; empty for a stream.
        held_out: Images that are measured on; None for none.
        num_held_out: How many records these are.
        num_shared_captions: Captions to train on that these have too; None for a stream, whose
            captions are not known before.
    """

    dataset: AlignmentDataset | AlignmentStream
    items: Array
    held_out: HeldOutImages | None
    num_held_out: int
    num_shared_captions: int | None

    @property
    def num_items(self) -> int | None:
        """Number of records to train on; None for a stream, whose length is not known."""
        return None if isinstance(self.dataset, AlignmentStream) else len(self.items)

    def make_batches(
        self,
        config: AlignConfig,
        arguments: TrainingArguments,
        *,
        batch_size: int,
        num_steps: int,
    ) -> Batches:
        """Make the batches of this process."""
        if isinstance(self.dataset, AlignmentStream):
            return StreamedBatches(
                self.dataset, config=config, batch_size=batch_size, arguments=arguments
            )
        return SampledBatches(
            self.dataset,
            self.items,
            config=config,
            batch_size=batch_size,
            num_steps=num_steps,
            arguments=arguments,
        )

    def with_held_out(self) -> RunData:
        """Return the same data, of which nothing is held out."""
        assert isinstance(self.dataset, AlignmentDataset)  # of a stream nothing is fitted twice
        items = np.arange(len(self.dataset), dtype=np.int32)
        return replace(self, items=items, held_out=None, num_held_out=0, num_shared_captions=0)

    def identify(self) -> dict[str, Any]:
        """Return what identifies the data, for the record of a run."""
        if isinstance(self.dataset, AlignmentStream):
            digest = hash_shards(self.dataset.stream.reader.shards)
            return {"num_records": None, "data": digest, "images": None}
        reads_images = self.dataset.image_store is None
        return {
            "num_records": len(self.dataset.records),
            "data": hash_records(self.dataset.records),
            "images": describe_images(self.dataset.records) if reads_images else None,
            **({"noise_sampling": NOISE_SAMPLING} if self.dataset.has_noise else {}),
        }


def open_records(
    records: RecordTable,
    processor: LLM2CLIPProcessor,
    config: AlignConfig,
    caption_store: EmbeddingStore | None,
    image_store: EmbeddingStore | None,
) -> RunData:
    """Prepare records of an index."""
    dataset = AlignmentDataset(
        records,
        processor,
        caption_store=caption_store,
        image_store=image_store,
        long_caption_ratio=config.long_caption_ratio,
        image_noise=config.image_noise,
        caption_noise=config.caption_noise,
        seed=config.seed,
    )
    items, held_items = choose_held_out(dataset, config.held_out_ratio, seed=config.seed)
    held_out = HeldOutImages(dataset, held_items) if len(held_items) else None
    num_shared = count_shared_captions(dataset.records, held_items)
    return RunData(dataset, items, held_out, len(held_items), num_shared)


def open_stream(
    stream: RecordStream,
    processor: LLM2CLIPProcessor,
    config: AlignConfig,
    caption_store: EmbeddingStore | None,
    folder: Path,
) -> RunData:
    """Prepare a stream, and deal its shards to the processes of the run."""
    state = PartialState()
    held, groups = hold_out_of_stream(stream, config.held_out_ratio, folder)
    own = stream.for_process(
        state.process_index, state.num_processes, seed=config.seed, excluded_groups=groups
    )
    dataset = AlignmentStream(
        own,
        processor,
        caption_store=caption_store,
        long_caption_ratio=config.long_caption_ratio,
        seed=config.seed,
    )
    held_out = None
    if held:
        table = RecordTable.from_records(held)
        measured = AlignmentDataset(table, processor, caption_store=caption_store, is_part=True)
        held_out = HeldOutImages(measured, np.arange(len(table)))
    return RunData(dataset, np.empty(0, np.int32), held_out, len(held), None)
