"""Provide the training and held-out data of a run, from random-access records or a stream.

The Trainer sees the whole run as one epoch in both cases. Batches of random-access records depend
only on the step, so a resumed run skips earlier batches without reading them. A stream's batches
depend on its position, which every checkpoint saves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainingArguments

from ..._suggestions import counted
from ...configs.align_config import AlignConfig
from ...data.key_arrays import contains_keys
from ...data.records.data_hashes import describe_images, hash_records
from ...data.records.record_table import Array, RecordTable
from ...data.records.records import CaptionedImage
from ...data.records.splits import count_shared_captions, list_text_keys
from ...data.remote.file_locations import FileLocation, list_states, use_states
from ...data.remote.remote_files import FileInfo
from ...data.store.embedding_store import EmbeddingStore
from ...data.streams.record_streams import RecordStream, make_loader, read_report
from ...data.streams.stream_run import StreamReport, hash_shards, share_batch
from ...encoding.batches import MOST_BESIDE_GPU, default_num_workers
from ...processing_llm2clip import LLM2CLIPProcessor
from .alignment_data import AlignmentDataset, AlignmentStream, ImageTransform, decode
from .held_out import (
    HeldOutImages,
    choose_held_out,
    count_held_out,
    require_negatives,
)
from .sampling import ResumableBatchSampler


@dataclass(eq=False)
class RecordData:
    """Random-access records, with random batches of the training items."""

    dataset: AlignmentDataset
    items: Array
    config: AlignConfig
    held_out: HeldOutImages | None = None

    def __post_init__(self) -> None:
        self.num_items = len(self.items)
        self._sampler: ResumableBatchSampler | None = None

    def with_held_out(self) -> RecordData:
        return RecordData(self.dataset, np.arange(len(self.dataset), dtype=np.int32), self.config)

    def identify(self) -> dict[str, Any]:
        records = self.dataset.records
        return {
            "num_records": len(records),
            "data": hash_records(records),
            "images": describe_images(records) if self.dataset.reads_images else None,
        }

    def make_loader(
        self, arguments: TrainingArguments, *, batch_size: int, num_steps: int
    ) -> DataLoader[Any]:
        """Make the loader of this process's batches for the whole run."""
        self._sampler = sampler = ResumableBatchSampler(
            self.items,
            batch_size=batch_size,
            num_steps=num_steps,
            seed=self.config.seed,
            rank=arguments.process_index,
            num_processes=arguments.world_size,
        )
        workers = count_workers(self.config, arguments, decodes=self.dataset.reads_images)
        if self.dataset.is_stored and not workers:
            num_reads = batch_size // arguments.world_size * num_steps
            self.dataset.copy_stores(arguments.device, num_reads=num_reads)
        return DataLoader(
            self.dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]  # arrays, not lists
            collate_fn=share_batch,  # the dataset returns whole batches
            num_workers=workers,
            pin_memory=arguments.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.config.seed),
            worker_init_fn=partial(_start_worker, list_states()),
        )

    def epoch_at(self, step: int) -> float:
        """Return the number of passes over the data after a number of steps."""
        return step / (1 if self._sampler is None else self._sampler.steps_per_epoch)

    def list_groups(self, step: int, places: Array) -> list[str]:
        """List the group ids at some positions of this process's batch in a step."""
        assert self._sampler is not None
        items = self._sampler.read_step(step).items[places]
        groups = (self.dataset.records.read(item, ("group_id",)) for item in items.tolist())
        return list(dict.fromkeys(group for (group,) in groups))

    def count_shared_captions(self) -> int:
        """Count the training captions that are also captions of held-out images."""
        assert self.held_out is not None
        records = self.dataset.records
        held_out = records.select(self.held_out.items)
        return count_shared_captions(records, held_out) - len(list_text_keys(held_out))


@dataclass(eq=False)
class StreamData:
    """A stream of records, repeated in every epoch."""

    num_items = None  # unknown

    dataset: AlignmentStream
    config: AlignConfig
    held_out: HeldOutImages | None = None

    def __post_init__(self) -> None:
        self._epoch = 0
        self._is_resumed = False
        self._resumed_state: Any = None  # the loader's state, until its first batch
        self._ended = StreamReport()  # of all finished epochs
        held = self.held_out
        keys = np.empty(0, np.int64) if held is None else list_text_keys(held.dataset.records)
        self._held_keys = np.unique(keys)
        self._num_shared = 0  # captions sampled by this process that held-out images also have

    def identify(self) -> dict[str, Any]:
        digest = hash_shards(self.dataset.stream.reader.shards)
        stream = self.dataset.stream
        ignored = sorted(stream.ignore_fields) or None
        required = sorted(stream.caption_fields or ())
        return {
            "num_records": None,
            "data": digest,
            "images": None,
            "ignored_fields": ignored,
            **({"caption_fields": required} if required else {}),
        }

    def make_loader(
        self,
        arguments: TrainingArguments,
        *,
        batch_size: int,
        num_steps: int,
    ) -> StreamData:
        """Set up iteration over this process's batches for the whole run, and return self."""
        self._num_left = num_steps
        self._process, self._num_processes = arguments.process_index, arguments.world_size
        self._loader = make_loader(
            self.dataset.stream,
            batch_size=batch_size // arguments.world_size,
            collate=self.dataset.collate,
            prepare=self.dataset.prepare_sample,
            num_workers=count_workers(self.config, arguments, decodes=True),
            drop_last=True,
            pin_memory=arguments.device.type == "cuda",
        )
        return self

    def __iter__(self) -> Iterator[Any]:
        while self._num_left:  # 0 if the run is resumed at its end
            self.dataset.stream.set_epoch(self._epoch)
            num_batches = int(self._is_resumed)  # counts a batch from before the checkpoint
            self._is_resumed = False
            for batch in self._loader:
                self._resumed_state = None
                num_batches += 1
                shared = contains_keys(self._held_keys, batch["text_keys"].numpy())
                self._num_shared += int(shared.sum())
                self._num_left -= 1
                yield batch
                if not self._num_left:
                    return
            self._end_epoch()
            if not num_batches:
                raise ValueError(
                    "The stream has too few samples for one batch per worker. Set a smaller "
                    "global_batch_size, or use fewer workers (num_workers)."
                )

    def _end_epoch(self) -> None:
        """Merge an epoch's report into the total, and print the data that this process lost."""
        self._resumed_state = None  # the checkpoint may be at the end of its epoch
        report = self._read_current()
        self._ended.merge(report)
        if report.lost_samples or report.lost_shards:
            of_process = f" of process {self._process}" if self._num_processes > 1 else ""
            tqdm.write(
                f"epoch {self._epoch}{of_process}: {report.describe_losses()}", file=sys.stderr
            )
        self._epoch += 1

    def _read_current(self) -> StreamReport:
        """Report what this process read and lost in the current epoch."""
        state = self._resumed_state
        return read_report(self._loader.state_dict() if state is None else state)

    def epoch_at(self, step: int) -> float:  # noqa: ARG002
        """Return the number of completed passes, because the length of a pass is unknown."""
        return float(self._epoch)

    def list_groups(self, step: int, places: Array) -> list[str]:  # noqa: ARG002
        """Return nothing, because a stream cannot repeat the records of a step."""
        return []

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "epoch": self._epoch,
            "ended": self._ended.to_state(),
            "loader": self._loader.state_dict(),
            "num_left": self._num_left,
            "num_shared": self._num_shared,
        }
        torch.save(state, folder / self._name_file())

    def load(self, checkpoint: Path) -> None:
        """Restore the position of this process's stream from a checkpoint."""
        state = torch.load(checkpoint / self._name_file(), weights_only=True)
        self._epoch = state["epoch"]
        self._ended = StreamReport.from_state(state["ended"])
        self._loader.load_state_dict(state["loader"])
        self._num_left = state["num_left"]
        self._num_shared = state["num_shared"]
        self._is_resumed = True
        self._resumed_state = state["loader"]

    def count_shared_captions(self) -> int:
        """Count sampled captions that held-out images also have; all processes must call this."""
        return sum(gather_object([self._num_shared]))

    def collect_report(self) -> dict[str, Any]:
        """Report what all processes read and lost in the run; all processes must call this."""
        total = StreamReport()
        for state in gather_object([self._ended.to_state(), self._read_current().to_state()]):
            total.merge(StreamReport.from_state(state))
        # Every epoch reports the same broken samples again.
        places = {kind: list(dict.fromkeys(where)) for kind, where in total.problems.places.items()}
        return {**total.to_state(), "places": places, "epochs": self._epoch + 1}

    def _name_file(self) -> str:
        return f"stream-{self._process}.pt"


def _start_worker(states: dict[FileLocation, FileInfo], _: int) -> None:
    """Make a worker read the same versions of remote files as this process."""
    use_states(states)


RunData = RecordData | StreamData


def open_records(
    records: RecordTable,
    processor: LLM2CLIPProcessor,
    config: AlignConfig,
    caption_store: EmbeddingStore | None,
    image_store: EmbeddingStore | None,
    *,
    image_transform: ImageTransform | None = None,
) -> RecordData:
    dataset = AlignmentDataset(
        records,
        processor,
        config,
        caption_store=caption_store,
        image_store=image_store,
        image_transform=image_transform,
    )
    items, held_items = choose_held_out(records, config.held_out_ratio, seed=config.seed)
    held_out = HeldOutImages(dataset, held_items) if len(held_items) else None
    return RecordData(dataset, items, config, held_out=held_out)


def open_stream(
    stream: RecordStream,
    processor: LLM2CLIPProcessor,
    config: AlignConfig,
    caption_store: EmbeddingStore | None,
    folder: Path,
    *,
    image_transform: ImageTransform | None = None,
) -> StreamData:
    """Prepare a stream: assign shards to processes, and write held-out images to a folder."""
    state = PartialState()
    held, groups = hold_out_of_stream(stream, config.held_out_ratio, folder)
    part = replace(
        stream,
        process_index=state.process_index,
        num_processes=state.num_processes,
        seed=config.seed,
        excluded_groups=groups,
    )
    dataset = AlignmentStream(
        part, processor, config, caption_store=caption_store, image_transform=image_transform
    )
    held_out = None
    if held:
        measured = AlignmentDataset(
            held, processor, config, caption_store=caption_store, is_part=True
        )
        held_out = HeldOutImages(measured, np.arange(len(held)))
    return StreamData(dataset, config, held_out=held_out)


def hold_out_of_stream(
    stream: RecordStream, ratio: float, folder: Path
) -> tuple[list[CaptionedImage], frozenset[str]]:
    """Hold out the first groups of a stream's shards; every process gets the same groups.

    Return the held-out records, with their images in the folder, and their group ids, which must be
    excluded from training. The total number of groups is estimated from the first shard. A group
    with an image that cannot be decoded is not held out; training then encounters the image and
    counts it as lost.
    """
    if not ratio:
        return [], frozenset()
    records: list[CaptionedImage] = []
    groups: dict[str, None] = {}
    broken: set[str] = set()
    others: set[str] = set()
    for number in range(len(stream.reader.shards)):
        read = stream.read_shard(number)
        if not number:
            total = len({record.group_id for record in read}) * len(stream.reader.shards)
            count = count_held_out(total, ratio)
            if count < 2:
                raise ValueError(
                    f"The stream has about {counted(total, 'group')}, too few to hold out two. "
                    "Add images, or set held_out_ratio=0."
                )
            require_negatives(total - count, count)
        for record in read:
            group = record.group_id
            if group in broken:
                continue
            if group not in groups and len(groups) >= count:
                others.add(group)
                continue
            try:
                decode(record.image)
            except ValueError:
                broken.add(group)
                groups.pop(group, None)
            else:
                groups[group] = None
                records.append(record)
        if len(groups) >= count and len(others) > 1:
            break
    else:
        require_negatives(len(others), len(groups))
    held = [record for record in records if record.group_id in groups]
    for number, record in enumerate(held):
        assert record.image is not None
        file = folder / f"{number:05d}"
        file.write_bytes(record.image.read_bytes())
        held[number] = replace(record, image=file)
    return held, frozenset(groups)


def count_workers(config: AlignConfig, arguments: TrainingArguments, *, decodes: bool) -> int:
    if config.num_workers is not None:
        return config.num_workers
    # On a CPU, workers would compete with training; stored embeddings need no workers.
    if not decodes or arguments.device.type == "cpu":
        return 0
    return default_num_workers(most=MOST_BESIDE_GPU)
