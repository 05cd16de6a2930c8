"""Computes shards of an output, one after the other, while a thread prepares the next one.

Shards are independent of each other. The processes of `accelerate launch` or `torchrun` share them
in turn; partitions, which any scheduler may start on any machine, do the same by their number; Ray
hands them out one by one. A shard that another process writes is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from ..configs.encoding_config import EncodingConfig
from .graceful_stop import StopRequest
from .ray_engine import compute_with_ray

Array: TypeAlias = np.ndarray[Any, Any]
Engine: TypeAlias = Literal["local", "ray"]


@dataclass(frozen=True)
class PreparedShard:
    """A shard whose inputs are read, and which may be encoded.

    Attributes:
        batches: Places in the shard of the rows of each batch; they depend on the shard alone.
        encode: Computes some of the batches, in their order: (rows of the batch, D) each.
        num_truncated: How many of its captions are longer than the model reads.
    """

    batches: Sequence[Array]
    encode: Callable[[Sequence[Array]], Iterator[Tensor]]
    num_truncated: int = 0


Prepare: TypeAlias = Callable[[range], PreparedShard]
"""Reads the inputs of a shard, given its rows."""


class ShardSizes(Protocol):
    """Which rows each shard has."""

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete output."""

    def rows_of_shard(self, shard: int) -> range:
        """Return the rows of a shard, whether it has been written or not.

        Args:
            shard: Its number, from 0.
        """


class OpenShard(Protocol):
    """A shard that is being written, batch by batch."""

    @property
    def num_done(self) -> int:
        """Batches that are written."""

    def write(self, embeddings: Tensor) -> None:
        """Write the next batch.

        Args:
            embeddings: (rows of the batch, D).
        """

    def seal(self, num_truncated: int = 0) -> object:
        """Complete the shard, all of whose batches are written.

        Args:
            num_truncated: How many of its captions were longer than the model reads.
        """


class ShardedWriter(Protocol):
    """One process's access to an output of shards; it can be pickled.

    Attributes:
        folder: Has what is done, also when a signal ends the run.
    """

    folder: Path

    @property
    def manifest(self) -> ShardSizes:
        """What the output will hold."""

    def is_done(self, shard: int) -> bool:
        """Whether a shard is complete on disk.

        Args:
            shard: Its number, from 0.
        """

    def list_missing(self) -> list[int]:
        """List the shards that are not complete yet."""

    def open_shard(self, shard: int, batches: Sequence[Array]) -> AbstractContextManager[OpenShard]:
        """Begin a shard, or continue it after the batches that an interrupted run wrote.

        Args:
            shard: Its number, from 0.
            batches: Places in the shard of the rows of each batch.
        """


@dataclass(frozen=True)
class ShardJob:
    """The shards of an output, and how they are computed.

    Attributes:
        name: In front of the progress bar.
        unit: What is counted.
        writer: Of the output.
        prepare: Makes what prepares a shard in this process, which has loaded the tower.
        make_worker: Makes what computes shards in another process; it can be pickled.
        config: Device and progress bar.
    """

    name: str
    unit: str
    writer: ShardedWriter
    prepare: Callable[[], Prepare]
    make_worker: Callable[[], ShardWorker]
    config: EncodingConfig


def parse_partition(partition: str | None) -> tuple[int, int]:
    """Parse which part of an output to compute.

    Args:
        partition: Such as 2/8; None for all of it.

    Returns:
        Number of the part, from 1, and how many there are.

    Raises:
        ValueError: It is not of this form, or there is no such part.
    """
    if partition is None:
        return 1, 1
    part, slash, count = partition.partition("/")
    if not (slash and part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise ValueError(f"partition={partition!r} must be such as 2/8, the second of eight.")
    return int(part), int(count)


def require_engine(engine: Engine) -> None:
    """Refuse Ray under a launcher.

    Args:
        engine: What computes the shards.

    Raises:
        ValueError: Ray is asked for by one of several processes.
    """
    if engine == "ray" and PartialState().num_processes > 1:
        raise ValueError("engine='ray' starts its own processes. Run it without a launcher.")


def compute_partition(
    job: ShardJob,
    *,
    partition: str | None,
    engine: Engine,
    stop: StopRequest,
    finish: Callable[[], object] | None,
) -> None:
    """Compute what is missing of the shards of a partition, in all processes of the run.

    Args:
        job: The shards, and how they are computed.
        partition: Such as 2/8; None for all shards.
        engine: What computes them: the processes of this run, or the actors of a Ray cluster.
        stop: Checked between batches; Ray ends its actors when it is interrupted.
        finish: Called by the main process once all are done, while the others wait.

    Raises:
        OSError: The disk is full; what is written stays.
        ValueError: The model gives NaN or infinity, or an image is broken.
        StageInterrupt: A signal came; the batch that was begun is finished.
        RuntimeError: An actor of Ray failed again and again.
    """
    state = PartialState()
    _compute_missing(job, partition, engine, stop)
    stop.raise_interrupt(
        f"Stopped after a batch; what is done is in {job.writer.folder}.",
        resume=False,
        is_main_process=state.is_main_process,
    )
    state.wait_for_everyone()
    if finish is not None and state.is_main_process:
        finish()
    state.wait_for_everyone()


def _compute_missing(
    job: ShardJob, partition: str | None, engine: Engine, stop: StopRequest
) -> None:
    part, num_parts = parse_partition(partition)
    shards = range(job.writer.manifest.num_shards)[part - 1 :: num_parts]
    if engine == "ray":
        missing = sorted(set(shards) & set(job.writer.list_missing()))
        compute_with_ray(
            job.make_worker, missing, job.config.device, show_progress=job.config.show_progress
        )
        return
    state = PartialState()
    own = shards[state.process_index :: state.num_processes]
    missing = sorted(set(own) & set(job.writer.list_missing()))
    if not missing:
        return
    shown = job.config.show_progress and state.is_local_main_process
    progress = ShardProgress(job.writer, own, name=job.name, unit=job.unit, shown=shown)
    with closing(progress):
        compute_shards(job.writer, job.prepare(), missing, stop=stop, progress=progress)


class ShardProgress:
    """A bar over some shards of an output; the rate is that of this run.

    Args:
        writer: Of the output.
        shards: What this process computes, done or not.
        name: In front of the bar.
        unit: What is counted.
        shown: Whether there is a bar.
    """

    def __init__(
        self,
        writer: ShardedWriter,
        shards: Iterable[int],
        *,
        name: str = "",
        unit: str = " rows",
        shown: bool = False,
    ) -> None:
        sizes = {shard: len(writer.manifest.rows_of_shard(shard)) for shard in shards}
        # Looking at every shard would cost a worker of Ray, which shows no bar, more than its own.
        missing = set(writer.list_missing()) if shown else set(sizes)
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
    writer: ShardedWriter,
    prepare: Prepare,
    shards: Sequence[int],
    *,
    stop: StopRequest,
    progress: ShardProgress,
) -> None:
    """Compute shards until all are done or a signal comes; a batch that is begun is finished.

    Args:
        writer: Of the output.
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
    writer: ShardedWriter,
    shard: int,
    prepared: PreparedShard,
    stop: StopRequest,
    progress: ShardProgress,
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
    return True


def _prepare_ahead(
    thread: ThreadPoolExecutor, prepare: Prepare, shards: Sequence[range]
) -> Iterator[PreparedShard]:
    """Prepare the next shard in a thread while the caller computes one."""
    running = thread.submit(prepare, shards[0]) if shards else None
    for following in (*shards[1:], None):
        if running is None:
            return
        prepared = running.result()
        running = None if following is None else thread.submit(prepare, following)
        yield prepared


class ShardWorker:
    """Has a tower loaded, and computes shards that something else hands out.

    Args:
        writer: Of the output.
        prepare: Reads the inputs of a shard, given its rows.
    """

    def __init__(self, writer: ShardedWriter, prepare: Prepare) -> None:
        self._writer = writer
        self._prepare = prepare

    def __call__(self, shard: int) -> None:
        """Compute a shard, unless it is complete.

        Args:
            shard: Its number.
        """
        if not self._writer.is_done(shard):
            progress = ShardProgress(self._writer, [shard])
            stop = StopRequest()
            compute_shards(self._writer, self._prepare, [shard], stop=stop, progress=progress)
