"""Computes shards of an output, one after the other, while a thread prepares the next one.

Shards are independent of each other. The processes of `accelerate launch` or `torchrun` share them
in turn; partitions, which any scheduler may start on any machine, do the same by their number; Ray
hands them out one by one. A shard that another process writes is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from ..configs.encoding_config import EncodingConfig
from ..scheduling.graceful_stop import StopRequest
from .ray_engine import compute_with_ray
from .sharded_writer import Array, ShardedWriter

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


@dataclass(frozen=True)
class ShardJob:
    """The shards of an output, and how they are computed.

    Attributes:
        name: What is in front of the progress bar.
        unit: What is counted.
        writer: Writer of the output.
        prepare: Makes what prepares a shard in this process, which has loaded the tower.
        make_worker: Makes what computes a shard by its number in an actor of Ray, and can be
            pickled; None where the processes of this run compute.
        config: Device and progress bar.
    """

    name: str
    unit: str
    writer: ShardedWriter[Any]
    prepare: Callable[[], Prepare]
    make_worker: Callable[[], Callable[[int], None]] | None
    config: EncodingConfig


def parse_partition(partition: str | None) -> tuple[int, int]:
    """Parse which part of an output to compute, such as 2/8; None for all of it."""
    if partition is None:
        return 1, 1
    part, slash, count = partition.partition("/")
    if not (slash and part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise ValueError(f"partition={partition!r} must be such as 2/8, the second of eight.")
    return int(part), int(count)


def require_engine(engine: Engine) -> None:
    """Refuse Ray in one of several processes of a launcher."""
    if engine == "ray" and PartialState().num_processes > 1:
        raise ValueError("engine='ray' starts its own processes. Run it without a launcher.")


def compute_partition(
    job: ShardJob,
    *,
    partition: str | None,
    stop: StopRequest,
    finish: Callable[[], object] | None,
) -> None:
    """Compute what is missing of the shards of a partition, in all processes of the run.

    A batch that is begun when a signal comes is finished, then `StageInterrupt` is raised. Once all
    are done, the main process calls `finish` while the others wait.
    """
    state = PartialState()
    part, num_parts = parse_partition(partition)
    shards = range(job.writer.manifest.num_shards)[part - 1 :: num_parts]
    if job.make_worker is None:
        shards = shards[state.process_index :: state.num_processes]
    missing = sorted(set(shards) & set(job.writer.list_missing()))
    if job.make_worker is not None:
        show_progress = job.config.show_progress
        compute_with_ray(job.make_worker, missing, job.config.device, show_progress=show_progress)
    elif missing:
        shown = job.config.show_progress and state.is_local_main_process
        with closing(open_bar(job, shards, missing, shown=shown)) as bar:
            compute_shards(job.writer, job.prepare(), missing, stop=stop, bar=bar)
    stop.raise_interrupt(
        f"Stopped after a batch; what is done is in {job.writer.folder}.",
        resume=False,
        is_main_process=state.is_main_process,
    )
    state.wait_for_everyone()
    if finish is not None and state.is_main_process:
        finish()
    state.wait_for_everyone()


def open_bar(
    job: ShardJob, shards: Sequence[int], missing: Sequence[int], *, shown: bool
) -> tqdm[Any]:
    """Open a bar over the rows of some shards; the rate is that of this run."""
    sizes = {shard: len(job.writer.manifest.rows_of_shard(shard)) for shard in shards}
    return tqdm(
        desc=job.name,
        total=sum(sizes.values()),
        initial=sum(sizes.values()) - sum(sizes[shard] for shard in missing),
        unit=job.unit,
        unit_scale=True,
        disable=not shown,
    )


def compute_shards(
    writer: ShardedWriter[Any],
    prepare: Prepare,
    shards: Sequence[int],
    *,
    stop: StopRequest,
    bar: tqdm[Any],
) -> None:
    """Compute shards until all are done or a signal comes; a batch that is begun is finished."""
    rows = [writer.manifest.rows_of_shard(shard) for shard in shards]
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(prepare, rows[0])
        for shard, following in zip(shards, [*rows[1:], None], strict=True):
            prepared = ahead.result()
            if following is not None:
                ahead = thread.submit(prepare, following)
            if stop.signal or not _compute_shard(writer, shard, prepared, stop, bar):
                return


def _compute_shard(
    writer: ShardedWriter[Any],
    shard: int,
    prepared: PreparedShard,
    stop: StopRequest,
    bar: tqdm[Any],
) -> bool:
    """Compute the batches of a shard that are missing; returns whether it is complete."""
    with writer.open_shard(shard, prepared.batches) as written:
        missing = prepared.batches[written.num_done :]
        count_earlier(bar, sum(map(len, prepared.batches[: written.num_done])))
        with closing(prepared.encode(missing)) as encoded:  # type: ignore[type-var]
            for batch, embeddings in zip(missing, encoded, strict=True):
                written.write(embeddings)
                bar.update(len(batch))
                if stop.signal:
                    break
        if written.num_done < len(prepared.batches):
            return False
        written.seal(prepared.num_truncated)
    return True


def count_earlier(bar: tqdm[Any], amount: int) -> None:
    """Count what an interrupted run had computed of a shard, which says nothing of the rate."""
    if not bar.disable:
        bar.initial += amount
        bar.update(amount)


def make_shard_worker(writer: ShardedWriter[Any], prepare: Prepare) -> Callable[[int], None]:
    """Return what computes a shard that something else hands out, unless it is complete."""

    def compute(shard: int) -> None:
        if not writer.is_done(shard):
            bar = tqdm(disable=True)
            compute_shards(writer, prepare, [shard], stop=StopRequest(), bar=bar)

    return compute
