"""One worker's iteration over a stream: its order, shuffle buffer, state and losses."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import get_worker_info

from ..records.records import CaptionedImage
from ..remote.remote_access import LostFileError
from ..remote.shard_urls import drop_signatures
from ..sources.shard_streams import BrokenShardError, StreamedSample
from ..validation_errors import ErrorCollector, describe_errors

_STATE_VERSION = 3
_DRAWS_AT_ONCE = 4096
# Shares of fewer samples are taken of this many: a few early losses say little.
_LEAST_SAMPLES = 1000

# Makes the yielded value from a record. A ValueError means that this record is broken.
Prepare = Callable[[CaptionedImage], Any]


class ShardReader:
    """Shards whose samples are read sequentially, in the same order each time.

    Attributes:
        shards: Names of the shards.
        has_addresses: Whether a sample can be re-read from its shard and number.
    """

    shards: list[str]
    has_addresses = True

    def divide(self, num_readers: int, epoch: int) -> ShardReader:  # noqa: ARG002
        """Return the shards that `num_readers` readers split among themselves in an epoch."""
        return self

    def read(
        self,
        shard: int,
        first: int,
        on_retry: Callable[[str, str], None],
        position: Any = None,
    ) -> Iterator[StreamedSample]:
        """Yield a shard's samples from number `first` on; `position` is the result of `save`."""
        raise NotImplementedError

    def save(self, shard: int) -> Any:  # noqa: ARG002
        """Return the position for resuming a shard, as plain values; None if `first` is enough."""
        return None


class TooManyLostError(ValueError):
    """A stream lost more than `max_lost_share`; the message says what was lost and where."""


@dataclass
class StreamReport:
    """Counts samples, shards and problems since the start of the epoch, for one worker or all.

    Attributes:
        samples: Number of samples read, including samples still in the shuffle buffer.
        lost_samples: Broken samples.
        skipped_samples: Rows whose image was never downloaded; these are not samples.
        excluded_samples: Samples of held-out groups.
        dropped_samples: Samples read, but dropped with an incomplete last batch.
        not_resumed_samples: Samples of a `datasets` object that were in the shuffle buffer when a
            state was saved, and are lost on resume.
        shards: Shards read to the end.
        lost_shards: Shards that are missing or ended early.
        retries: Number of repeated requests.
        problems: Kinds of problems, with counts and places.
    """

    samples: int = 0
    lost_samples: int = 0
    skipped_samples: int = 0
    excluded_samples: int = 0
    dropped_samples: int = 0
    not_resumed_samples: int = 0
    shards: int = 0
    lost_shards: int = 0
    retries: int = 0
    problems: ErrorCollector = field(default_factory=ErrorCollector)

    @property
    def numbers(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}

    def add_lost_sample(self, kind: str, place: str) -> None:
        self.lost_samples += 1
        self.problems.add(kind, place)

    def add_lost_shard(self, place: str, reason: str) -> None:
        self.lost_shards += 1
        self.problems.add("shard lost", f"{place} ({reason})")

    def describe_losses(self) -> str:
        """Describe in one line what was read and what was lost."""
        parts = [
            f"{self.samples:,} samples read",
            f"{self.lost_samples:,} lost",
            f"{self.dropped_samples:,} dropped with incomplete last batches",
            f"{self.lost_shards:,} of {self.shards + self.lost_shards:,} shards lost",
        ]
        if self.not_resumed_samples:
            parts.append(f"{self.not_resumed_samples:,} in the shuffle buffer not resumed")
        return ", ".join(parts)

    def describe(self) -> str:
        """Describe each kind of problem with its count and first places."""
        return "\n".join(describe_errors(self.problems.counts, self.problems.places))

    def merge(self, other: StreamReport) -> None:
        for name, value in other.numbers.items():
            setattr(self, name, getattr(self, name) + value)
        self.problems.extend(other.problems)

    def to_state(self) -> dict[str, Any]:
        """Return the report as plain values."""
        places = {kind: [*where] for kind, where in self.problems.places.items()}
        return {**self.numbers, "counts": dict(self.problems.counts), "places": places}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> StreamReport:
        """Make a report from the result of `to_state`."""
        numbers = {name: value for name, value in state.items() if isinstance(value, int)}
        places = {kind: [*where] for kind, where in state["places"].items()}
        return cls(**numbers, problems=ErrorCollector(Counter(state["counts"]), places))


class PartEnd:
    """Marks the end of a worker's batches."""


class StreamRun:
    """One worker's iteration over a `RecordStream`; workers are numbered across all processes.

    `prepare` decodes the image of a record; if it is None, records are yielded unchanged.
    """

    def __init__(
        self,
        stream: Any,
        epoch: int,
        number: int,
        num_readers: int,
        *,
        prepare: Prepare | None = None,
    ) -> None:
        self._stream = stream
        self._reader = stream.reader.divide(num_readers, epoch)
        self._prepare = prepare
        self._epoch = epoch
        self._number = number
        self._num_readers = num_readers
        order = np.random.default_rng([stream.seed, epoch]).permutation(len(self._reader.shards))
        self._order: list[int] = order[number::num_readers].tolist()
        self._next_shard = 0  # in `_order`
        self._next_sample = 0  # in that shard
        self._num_drawn = 0  # samples that left the buffer
        self._block = -1  # of `_draws`
        self._draws: list[int] = []
        self._buffer: list[tuple[int, int, CaptionedImage]] = []
        self._rest: Iterator[StreamedSample] | None = None
        self._position: Any = None  # loaded from a state, until something is read
        self.report = StreamReport()

    def iterate(self) -> Iterator[Any]:
        """Yield the samples: records, or the results of `prepare`."""
        size = self._stream.buffer_size
        while True:
            while len(self._buffer) < size and self._read_one():
                pass
            if not self._buffer:
                self._require_most(at_end=True)
                return
            record = self._draw_record()
            if self._prepare is None:
                yield record
                continue
            try:
                prepared = self._prepare(record)
            except ValueError as error:  # counted as good until now
                self.report.samples -= 1
                place = str(error) if record.place in str(error) else f"{record.place} ({error})"
                self.report.add_lost_sample("image unreadable", place)
                self._require_most()
            else:
                yield prepared

    def iterate_batches(self, batch_size: int, *, drop_last: bool) -> Iterator[list[Any] | PartEnd]:
        """Yield the samples in batches, all full except the last."""
        batch: list[Any] = []
        for sample in self.iterate():
            batch.append(sample)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if drop_last:
            self.report.dropped_samples += len(batch)
        elif batch:
            yield batch
        yield PartEnd()

    def _draw_record(self) -> CaptionedImage:
        chosen = self._draw() % len(self._buffer)
        *_, record = self._buffer[chosen]
        self._buffer[chosen] = self._buffer[-1]
        self._buffer.pop()
        self._num_drawn += 1
        return record

    def _draw(self) -> int:
        """Return a random number that depends only on seed, epoch, reader and `_num_drawn`."""
        block, within = divmod(self._num_drawn, _DRAWS_AT_ONCE)
        if self._block != block:
            seeds = [self._stream.seed, self._epoch, self._number, block]
            self._draws = np.random.default_rng(seeds).integers(2**62, size=_DRAWS_AT_ONCE).tolist()
            self._block = block
        return self._draws[within]

    def _read_one(self) -> bool:
        """Read a sample into the buffer, or record its problem; return False at the end."""
        if self._next_shard >= len(self._order):
            return False
        shard = self._order[self._next_shard]
        try:
            if self._rest is None:
                self._rest = self._reader.read(
                    shard, self._next_sample, self._note_retry, self._position
                )
            sample = next(self._rest)
        except StopIteration:
            self.report.shards += 1
            self._go_to_next_shard()
            return True
        except (BrokenShardError, LostFileError) as error:
            place = f"{self._reader.shards[shard]} before sample {self._next_sample}"
            self.report.add_lost_shard(place, str(error))
            self._go_to_next_shard()
            self._require_most()
            return True
        self._next_sample = sample.number + 1
        self._position = None
        self._take(shard, sample)
        return True

    def _take(self, shard: int, sample: StreamedSample) -> None:
        if sample.is_skipped:
            self.report.skipped_samples += 1
            self.report.problems.add(sample.problem, sample.place)
            return
        record, problem = self._stream.check(sample)
        if record is None:
            self.report.add_lost_sample(problem, sample.place)
            self._require_most()
            return
        if record.group_id in self._stream.excluded_groups:
            self.report.excluded_samples += 1
            return
        self.report.samples += 1
        self._buffer.append((shard, sample.number, record))

    def _note_retry(self, url: str, reason: str) -> None:
        self.report.retries += 1
        self.report.problems.add("request repeated", f"{url} ({reason})")

    def _go_to_next_shard(self) -> None:
        self._next_shard += 1
        self._next_sample = 0
        self._rest = self._position = None

    def _require_most(self, *, at_end: bool = False) -> None:
        """Raise if this worker lost too many of the samples read so far, or of its own shards."""
        # At the end, each worker compares with its part of the minimum; otherwise many workers
        # could each lose a little, and the stream a lot.
        least = _LEAST_SAMPLES // self._num_readers if at_end else _LEAST_SAMPLES
        share, report = self._stream.max_lost_share, self.report
        seen = max(report.samples + report.lost_samples, least)
        nothing_left = at_end and share < 1 and report.lost_samples and not report.samples
        too_many = report.lost_samples > share * seen
        if nothing_left or too_many or report.lost_shards > share * len(self._order):
            raise TooManyLostError(
                f"The stream lost {report.lost_samples} samples (of {report.samples} read) and "
                f"{report.lost_shards} of {len(self._order)} shards that this worker reads, more "
                f"than max_lost_share = {share:g}:\n{report.describe()}\n"
                "Repair the source, leave out its broken shards, or raise max_lost_share."
            )

    def save(self) -> dict[str, Any]:
        """Return the state as plain values."""
        is_reading = self._next_shard < len(self._order) and self._next_sample > 0
        position = self._position
        if is_reading and position is None:
            position = self._reader.save(self._order[self._next_shard])
        return {
            **self._identity,
            "epoch": self._epoch,
            "next": [self._next_shard, self._next_sample],
            "position": position,
            "num_drawn": self._num_drawn,
            "contents": [
                [shard, self._reader.save(shard)]
                for shard in sorted({shard for shard, *_ in self._buffer})
                if self._reader.has_addresses
            ],
            "buffer": [number for shard, sample, _ in self._buffer for number in (shard, sample)],
            "report": self.report.to_state(),
        }

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """Everything that determines the order, except the epoch."""
        return {
            "stream_version": _STATE_VERSION,
            "seed": self._stream.seed,
            "buffer_size": self._stream.buffer_size,
            "shards": hash_shards(self._reader.shards),
            "reader": [self._number, self._num_readers],
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Resume from a state: re-read the samples of the buffer, or count them as not resumed."""
        differing = [name for name, now in self._identity.items() if state.get(name) != now]
        if differing:
            raise ValueError(
                f"This state belongs to another stream: {', '.join(differing)} differ. Resume with "
                "the same shards, seed, buffer_size, processes and workers."
            )
        self._next_shard, self._next_sample = state["next"]
        self._num_drawn = state["num_drawn"]
        self.report = StreamReport.from_state(state["report"])
        numbers, self._position = state["buffer"], state["position"]
        if self._reader.has_addresses:
            addresses = list(zip(numbers[::2], numbers[1::2], strict=True))
            self._refill(addresses, dict(state["contents"]))
            return
        self.report.samples -= len(numbers) // 2
        self.report.not_resumed_samples += len(numbers) // 2

    def _refill(self, addresses: list[tuple[int, int]], contents: dict[int, Any]) -> None:
        records: dict[tuple[int, int], CaptionedImage] = {}
        current = self._order[self._next_shard] if self._next_shard < len(self._order) else None
        buffered: dict[int, set[int]] = {}
        for shard, number in addresses:
            buffered.setdefault(shard, set()).add(number)
        for shard, samples in buffered.items():
            last = self._next_sample - 1 if shard == current else max(samples)
            try:
                rest = self._reader.read(shard, min(samples), self._note_retry, contents.get(shard))
                for sample in rest:
                    if sample.number in samples:
                        record, _ = self._stream.check(sample)
                        if record is not None:
                            records[shard, sample.number] = record
                    if sample.number >= last:
                        break
            except (BrokenShardError, LostFileError) as error:
                place = f"{self._reader.shards[shard]} of the buffer"
                self.report.add_lost_shard(place, str(error))
                if shard == current:
                    self._go_to_next_shard()
                continue
            if shard == current:
                self._rest = rest
        for address in addresses:
            if address in records:
                self._buffer.append((*address, records[address]))
            else:
                place = f"{self._reader.shards[address[0]]} sample {address[1]}"
                self.report.samples -= 1
                self.report.add_lost_sample("missing on resume", place)
        self._require_most()


def hash_shards(shards: Sequence[str]) -> str:
    """Hash the names of shards in order, ignoring signatures in URLs."""
    return hashlib.sha256("\n".join(drop_signatures(shards)).encode()).hexdigest()


def share_batch(batch: Any) -> Any:
    """Move the tensors of a worker's batch into shared memory; return the batch."""
    # torch would do this in a thread. An error there drops the batch, and the loader waits forever.
    parts = batch.values() if isinstance(batch, Mapping) else batch
    try:
        for part in parts if isinstance(batch, Mapping | list | tuple) else [batch]:
            if isinstance(part, Tensor) and get_worker_info() is not None:
                part.share_memory_()
    except RuntimeError as error:
        raise OSError(
            f"A worker has no room for its batch in shared memory ({error}). Set num_workers to 0 "
            "(--num-workers 0), or enlarge /dev/shm (docker run --shm-size 8g)."
        ) from error
    return batch
