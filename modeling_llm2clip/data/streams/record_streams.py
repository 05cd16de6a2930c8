"""Streams samples from shards, local or remote: shuffled, once per epoch, resumable.

`make_loader(stream_records(SOURCE), …)` yields batches of `CaptionedImage`s whose images are
`EncodedImage`s. Shards are shuffled by seed and epoch and dealt round-robin to the workers of all
processes; each worker reads its shards in turn through a shuffle buffer. A worker's state is the
position in its shards, and the shard and number of every sample in its buffer. On resume, the
samples in the buffer are re-read and the order continues; a shard that is re-read must still have
the same size and tag.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ..._extras import REMOTE_STREAMS, require
from ..record_fields import list_fields_read, list_ignored
from ..records.records import CaptionedImage, RecordRules, check_record
from ..remote.remote_access import LostFileError, RetryPolicy
from ..remote.remote_files import RemoteFile
from ..remote.shard_urls import find_format, list_shards, name_shards
from ..sources.shard_streams import (
    BrokenShardError,
    ShardColumns,
    ShardColumnsError,
    StreamedSample,
    read_columns,
    read_shard,
)
from ..validation_errors import ErrorCollector
from .stream_run import PartEnd, Prepare, ShardReader, StreamReport, StreamRun

_FIRST_SHARDS = 2  # all but one may be missing


class UrlShards(ShardReader):
    """Shards at paths, URLs or commands. At least one of the first two shards must open."""

    def __init__(
        self, shards: Sequence[str], policy: RetryPolicy, ignored: Collection[str]
    ) -> None:
        self.shards, self._ignored = list(shards), ignored
        self._names = name_shards(shards)
        self._policy = policy
        self._infos: dict[int, list[Any]] = {}
        _require_access(shards, policy)
        self._columns = self._read_first_columns()

    def read(
        self,
        shard: int,
        first: int,
        on_retry: Callable[[str, str], None],
        position: Any = None,
    ) -> Iterator[StreamedSample]:
        """Yield the samples of a shard; raise if its size or tag differs from the saved state."""
        file = RemoteFile(self.shards[shard], self._policy, on_retry=on_retry)
        info = self._infos[shard] = [*file.describe()]
        if position not in (None, info):
            raise ValueError(
                f"{self.shards[shard]} has changed since the state was saved (was {position}, is "
                f"{info}). Restore the shard, or restart the epoch."
            )
        return read_shard(
            file, self._names[shard], first=first, on_columns=self._require_same_columns
        )

    def save(self, shard: int) -> list[Any] | None:
        """Return the size and tag of a shard that was read."""
        return self._infos.get(shard)

    def _read_first_columns(self) -> ShardColumns | None:
        """Read the columns of the first readable shard, which is the same in every process."""
        if find_format(self.shards[0]) != ".parquet":
            return None
        first = zip(self.shards[:_FIRST_SHARDS], self._names, strict=False)
        read = (read_columns(RemoteFile(url, self._policy), name) for url, name in first)
        return next((columns for columns in read if columns is not None), None)

    def _require_same_columns(self, columns: ShardColumns) -> None:
        if self._columns is None:  # the first shards are broken
            self._columns = columns
        shards = (self._columns, columns)
        (first, fields), (shard, others) = (
            (name, {*list_fields_read(names.difference(self._ignored))}) for name, names in shards
        )
        if differing := sorted(fields ^ others):
            raise ShardColumnsError(
                f"{shard} and {first} have different columns; only one of them has: "
                f"{', '.join(differing)}. Write these columns into both, with null where a record "
                "lacks the field."
            )


def stream_records(
    source: str | Path | Sequence[str],
    *,
    seed: int = 0,
    buffer_size: int = 1000,
    process_index: int = 0,
    num_processes: int = 1,
    require_images: bool = True,
    ignore_fields: Collection[str] = (),
    caption_fields: Collection[str] | None = None,
    max_lost_share: float = 0.01,
    retry: RetryPolicy | None = None,
) -> RecordStream:
    """Stream the samples of shards. The first shard is opened immediately, to check access.

    Args:
        source: A folder, pattern, list or text file of shards; see `remote/shard_urls.py`.
        seed: Seed of the order.
        buffer_size: Size of each worker's shuffle buffer; 1 keeps the order within shards.
        process_index: Rank of this process.
        num_processes: Number of processes; each reads different shards.
        require_images: Whether a sample without an image counts as broken.
        ignore_fields: Names of fields to ignore, whether they are known or not.
        caption_fields: Fields of the captions to read, as in `load_records`; a sample that lacks
            one of these fields is broken.
        max_lost_share: Maximum share of a worker's samples or shards that may be broken. A worker
            that has read fewer than 1,000 samples computes the share as if it had read 1,000, or at
            the end of the epoch, 1,000 divided by the number of workers in all processes. A worker
            with fewer than 1 / `max_lost_share` shards stops at the first lost shard.
        retry: How often requests are retried, and the waits between attempts.

    Returns:
        The stream, for `make_loader` or any PyTorch loader.

    Raises:
        AccessError: Access is denied, or a host cannot be reached.
        ValueError: There are no shards, or they have different formats. During iteration, the
            subclasses TooManyLostError, and ShardColumnsError if the columns of Parquet files
            differ.

    Examples:
        >>> stream = stream_records("https://host/{00000..00331}.tar")  # doctest: +SKIP
        >>> record = next(iter(stream))  # doctest: +SKIP
    """
    policy, ignored = retry or RetryPolicy(), list_ignored(ignore_fields, caption_fields)
    return RecordStream(
        UrlShards(list_shards(source, policy), policy, ignored),
        seed=seed,
        buffer_size=buffer_size,
        process_index=process_index,
        num_processes=num_processes,
        require_images=require_images,
        ignore_fields=ignore_fields,
        caption_fields=caption_fields,
        max_lost_share=max_lost_share,
    )


def _require_access(shards: Sequence[str], policy: RetryPolicy) -> None:
    """Raise unless one of the first two shards can be opened; a single shard may be missing."""
    *others, last = shards[:_FIRST_SHARDS]
    for shard in others:
        with suppress(LostFileError):
            RemoteFile(shard, policy, is_first=True).describe()
            return
    RemoteFile(last, policy, is_first=True).describe()


@dataclass(eq=False, repr=False)
class RecordStream(IterableDataset[CaptionedImage]):
    """Yields the samples of one process, or of one worker inside a loader.

    `stream_records` describes the fields. Samples in `excluded_groups` are skipped and counted.
    """

    reader: ShardReader
    _: KW_ONLY
    seed: int = 0
    buffer_size: int = 1000
    process_index: int = 0
    num_processes: int = 1
    require_images: bool = True
    ignore_fields: Collection[str] = ()
    caption_fields: Collection[str] | None = None
    max_lost_share: float = 0.01
    excluded_groups: frozenset[str] = frozenset()
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.buffer_size < 1 or not 0 <= self.process_index < self.num_processes:
            raise ValueError(
                f"buffer_size={self.buffer_size}, process_index={self.process_index}, "
                f"num_processes={self.num_processes}: buffer_size must be at least 1, and "
                "process_index must be from 0 to num_processes - 1."
            )
        self.ignore_fields = list_ignored(self.ignore_fields, self.caption_fields)
        self._resumed: dict[str, Any] | None = None
        self._run: StreamRun | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the next iteration."""
        self.epoch = epoch

    def require_workers(self, num_workers: int) -> None:
        """Check that each worker of each process gets at least one shard."""
        if self.num_processes * max(1, num_workers) > len(self.reader.shards):
            raise ValueError(
                f"{len(self.reader.shards)} shards for {self.num_processes} processes with "
                f"{max(1, num_workers)} workers each: some would get none. Use fewer workers, or "
                f"split the data into more shards. The first shard is {self.reader.shards[0]}."
            )

    def __iter__(self) -> Iterator[CaptionedImage]:
        return self.start().iterate()

    def start(self, prepare: Prepare | None = None) -> StreamRun:
        """Start this worker's part of the epoch, or resume from a loaded state."""
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        self.require_workers(num_workers)
        number = self.process_index * num_workers + worker
        state, self._resumed = self._resumed, None
        epoch = self.epoch if state is None else state["epoch"]
        run = StreamRun(self, epoch, number, self.num_processes * num_workers, prepare=prepare)
        if state is not None:
            run.resume(state)
        self._run = run
        return run

    def read_shard(self, number: int) -> list[CaptionedImage]:
        """Read the valid samples of one shard, in order."""
        records = []
        reader = self.reader.divide(len(self.reader.shards), self.epoch)
        with suppress(BrokenShardError):  # counted when the stream reaches it
            for sample in reader.read(number, 0, lambda _url, _reason: None):
                record = None if sample.is_skipped else self.check(sample)[0]
                if record is not None:
                    records.append(record)
        return records

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_run": None}  # open files are not pickled

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the iteration as plain values."""
        return {} if self._run is None else self._run.save()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the next iteration from a state and its epoch, but not later iterations."""
        self._resumed = state or None

    @property
    def report(self) -> StreamReport:
        """Counts of this process since the start of the epoch."""
        return StreamReport() if self._run is None else self._run.report

    def check(self, sample: StreamedSample) -> tuple[CaptionedImage | None, str]:
        """Return a sample's record and an empty string, or None and the problem's description."""
        if sample.raw is None:
            return None, sample.problem
        errors = ErrorCollector()
        chosen = self.caption_fields or ()
        rules = RecordRules(None, self.require_images, self.ignore_fields, None, chosen)
        record = check_record(sample.raw, errors, rules)
        return (None, ", ".join(errors.counts)) if errors.total else (record, "")


@dataclass(eq=False, repr=False)
class _BatchedStream(IterableDataset[list[Any] | PartEnd]):
    """Yields batches of a stream, and refills a batch if samples are lost while it is prepared."""

    stream: RecordStream
    batch_size: int
    drop_last: bool
    prepare: Prepare | None

    def __iter__(self) -> Iterator[list[Any] | PartEnd]:
        run = self.stream.start(self.prepare)
        return run.iterate_batches(self.batch_size, drop_last=self.drop_last)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def make_loader(
    stream: RecordStream,
    *,
    batch_size: int,
    collate: Callable[[list[Any]], Any] = list,
    prepare: Prepare | None = None,
    num_workers: int = 0,
    drop_last: bool = False,
    **options: Any,
) -> Any:
    """Make a loader of batches that can be saved and resumed.

    Each process saves `loader.state_dict()` with every checkpoint. After
    `loader.load_state_dict(state)`, with the same numbers of processes and workers, the batches
    continue as if the loader had never stopped. Call `stream.set_epoch(epoch)` before each epoch.
    """
    require(REMOTE_STREAMS)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    stream.require_workers(num_workers)
    if options.get("persistent_workers"):
        raise ValueError(
            "persistent_workers cannot be used: such workers keep the order of their first epoch. "
            "Leave it off; workers start in a second."
        )
    from .stream_loader import StreamLoader

    with warnings.catch_warnings():
        # torchdata calls a function that torch warns about.
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        return StreamLoader(
            _BatchedStream(stream, batch_size, drop_last, prepare),
            collate,
            num_workers=num_workers,
            **options,
        )


def read_report(state: Any) -> StreamReport:
    """Add up the reports of all workers of a loader."""
    total = StreamReport()
    waiting = [state]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and "stream_version" in value:
            total.merge(StreamReport.from_state(value["report"]))
        elif isinstance(value, dict):
            waiting += list(value.values())[::-1]
    return total
