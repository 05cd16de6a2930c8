"""Computes shards of a store, one after the other, while a thread prepares the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from tqdm import tqdm

from ...configs.extract_config import ExtractConfig
from ...data.records.record_table import RecordTable
from ...data.store.embedding_store_writer import EmbeddingStoreWriter
from ..distributed import choose_device
from ..graceful_stop import StopRequest
from .caption_extraction import plan_captions
from .extraction_plan import ExtractionPlan, PreparedShard
from .image_extraction import plan_images

Modality: TypeAlias = Literal["text", "image"]


def make_plan(
    folder: Path,
    table: RecordTable,
    config: ExtractConfig,
    device: torch.device,
    modality: Modality,
) -> ExtractionPlan:
    """Load the tower that is needed, and plan a store.

    Args:
        folder: Model folder.
        table: The dataset.
        config: Options of the extraction.
        device: Where the tower runs.
        modality: What is extracted.
    """
    make = plan_captions if modality == "text" else plan_images
    return make(folder, table, config, device)


class StoreProgress:
    """A bar over some shards of a store; the rate is that of this run.

    Args:
        writer: Of the store.
        shards: What this process computes, done or not.
        name: In front of the bar.
        unit: What is counted.
        shown: Whether there is a bar.
    """

    def __init__(
        self,
        writer: EmbeddingStoreWriter,
        shards: Iterable[int],
        *,
        name: str = "",
        unit: str = " rows",
        shown: bool = False,
    ) -> None:
        sizes = {shard: len(writer.manifest.rows_of_shard(shard)) for shard in shards}
        missing = set(writer.list_missing())
        self._bar = tqdm(
            desc=name or None,
            total=sum(sizes.values()),
            initial=sum(size for shard, size in sizes.items() if shard not in missing),
            unit=unit,
            unit_scale=True,
            disable=not shown,
        )

    def add_earlier(self, amount: int) -> None:
        """Count what an interrupted run had computed of a shard, which says nothing of the rate.

        Args:
            amount: Rows.
        """
        if not self._bar.disable:
            self._bar.initial += amount
            self._bar.update(amount)

    def add(self, amount: int) -> None:
        """Count what this process has computed.

        Args:
            amount: Rows of a batch.
        """
        self._bar.update(amount)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def compute_shards(
    writer: EmbeddingStoreWriter,
    prepare: Callable[[range], PreparedShard],
    shards: Sequence[int],
    *,
    stop: StopRequest,
    progress: StoreProgress,
) -> None:
    """Compute shards until all are done or a signal comes; a batch that is begun is finished.

    Args:
        writer: Of the store.
        prepare: Reads the inputs of a shard, given its rows.
        shards: Numbers of shards that are not complete.
        stop: Checked between batches.
        progress: Counts every batch.

    Raises:
        OSError: The disk is full; what is written stays.
        ValueError: The model gives NaN or infinity, or an image is broken.
    """
    with ThreadPoolExecutor(1) as thread:
        ahead = _prepare_ahead(thread, prepare, [writer.manifest.rows_of_shard(s) for s in shards])
        for shard, prepared in zip(shards, ahead, strict=True):
            if stop.signal or not _compute_shard(writer, shard, prepared, stop, progress):
                return


def _compute_shard(
    writer: EmbeddingStoreWriter,
    shard: int,
    prepared: PreparedShard,
    stop: StopRequest,
    progress: StoreProgress,
) -> bool:
    """Compute the batches of a shard that are missing; returns whether it is complete."""
    with writer.open_shard(shard, prepared.batches) as written:
        progress.add_earlier(sum(map(len, prepared.batches[: written.num_done])))
        missing = prepared.batches[written.num_done :]
        with closing(prepared.encode(missing)) as encoded:  # type: ignore[type-var]
            for batch, embeddings in zip(missing, encoded, strict=True):
                written.write(embeddings)
                progress.add(len(batch))
                if stop.signal:
                    break
        if written.num_done < len(prepared.batches):
            return False
        written.seal(prepared.num_truncated)
    writer.publish(shard)
    return True


def _prepare_ahead(
    thread: ThreadPoolExecutor,
    prepare: Callable[[range], PreparedShard],
    shards: Sequence[range],
) -> Iterator[PreparedShard]:
    """Prepare the next shard in a thread while the caller computes one."""
    running = thread.submit(prepare, shards[0]) if shards else None
    for following in (*shards[1:], None):
        if running is None:
            return
        prepared = running.result()
        running = None if following is None else thread.submit(prepare, following)
        yield prepared


class ShardExtractor:
    """Loads a tower once, and computes shards that something else hands out.

    Args:
        folder: Model folder.
        table: The dataset.
        writer: Of the store.
        config: Options of the extraction.
        modality: What is extracted.
    """

    def __init__(
        self,
        folder: Path,
        table: RecordTable,
        writer: EmbeddingStoreWriter,
        config: ExtractConfig,
        modality: Modality,
    ) -> None:
        self._writer = writer
        plan = make_plan(folder, table, config, choose_device(config.device), modality)
        self._prepare = plan.open_shards(writer)

    def __call__(self, shard: int) -> None:
        """Compute a shard, unless it is complete.

        Args:
            shard: Its number.
        """
        if not self._writer.is_done(shard):
            progress = StoreProgress(self._writer, [shard])
            stop = StopRequest()
            compute_shards(self._writer, self._prepare, [shard], stop=stop, progress=progress)
