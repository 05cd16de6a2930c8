"""Computes shards of an output, one after the other, while a thread prepares the next one.

Shards are independent of each other. The processes of `accelerate launch` or `torchrun` share them
in turn; partitions, which any scheduler may start on any machine, do the same by their number. A
shard that another process writes is refused.

The actors of a Ray cluster load the tower once each. Ray Data hands them the numbers of the shards,
and starts a lost actor again, whose shard continues after its last batch. The embeddings go to the
output's folder, which all machines see, or to object storage, and not through Ray: so the bytes are
those of one process, in whatever order the shards are computed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from .._extras import RAY, require
from ..configs.encoding_config import EncodingConfig
from ..data.remote.file_places import FilePlace, list_states, use_states
from ..data.remote.remote_files import FileInfo
from ..encoding.devices import find_device
from ..image_loading_llm2clip import ImageLimits, get_image_limits, set_image_limits
from ..scheduling.graceful_stop import StopRequest, stop_on_signals
from .sharded_writer import Array, ShardedWriter

Engine: TypeAlias = Literal["local", "ray"]
_NAMES_AN_ERROR = re.compile(r"[\w.]+(Error|Exception): ")  # the first line of a traceback's end
_OBJECT_STORE_BYTES = 256 * 2**20  # numbers of shards go through it, and records in memory


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


def parse_partition(partition: str | None) -> tuple[int, int]:
    """Parse which part of an output to compute, such as 2/8; None for all of it."""
    if partition is None:
        return 1, 1
    part, slash, count = partition.partition("/")
    if not (slash and part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise ValueError(f"partition={partition!r} must be such as 2/8, the second of eight.")
    return int(part), int(count)


def open_stops(engine: Engine) -> AbstractContextManager[StopRequest]:
    """Note signals; refuse Ray in one of several processes of a launcher."""
    if engine != "ray":
        return stop_on_signals()
    if PartialState().num_processes > 1:
        raise ValueError("engine='ray' starts its own processes. Run it without a launcher.")
    return nullcontext(StopRequest())  # Ray ends its actors itself; what they wrote stays


def compute_partition(
    writer: ShardedWriter[Any],
    open_shards: Callable[[], Prepare],
    config: EncodingConfig,
    *,
    name: str,
    unit: str,
    partition: str | None,
    stop: StopRequest,
    make_worker: Callable[[], Callable[[int], None]] | None,
    finish: Callable[[], object] | None,
) -> None:
    """Compute what is missing of the shards of a partition, in all processes of the run.

    `open_shards` makes what prepares shards in this process, which has loaded the tower;
    `make_worker` makes what computes a shard by its number in an actor of Ray, and can be pickled;
    it is None where the processes of this run compute. `name` and `unit` are those of the progress
    bar. A batch that is begun when a signal comes is finished, then `StageInterrupt` is raised.
    Once all are done, the main process calls `finish` while the others wait.
    """
    state = PartialState()
    part, num_parts = parse_partition(partition)
    shards = range(writer.manifest.num_shards)[part - 1 :: num_parts]
    if make_worker is None:
        shards = shards[state.process_index :: state.num_processes]
    missing = sorted(set(shards) & set(writer.list_missing()))
    if make_worker is not None:
        compute_with_ray(make_worker, missing, config.device, show_progress=config.show_progress)
    elif missing:
        shown = config.show_progress and state.is_local_main_process
        with closing(open_bar(writer, shards, missing, name, unit, shown=shown)) as bar:
            compute_shards(writer, open_shards(), missing, stop=stop, bar=bar)
    stop.raise_interrupt(
        f"Stopped after a batch; what is done is in {writer.folder}.",
        resume=False,
        is_main_process=state.is_main_process,
    )
    state.wait_for_everyone()
    if finish is not None and state.is_main_process:
        finish()
    state.wait_for_everyone()


def open_bar(
    writer: ShardedWriter[Any],
    shards: Sequence[int],
    missing: Sequence[int],
    name: str,
    unit: str,
    *,
    shown: bool,
) -> tqdm[Any]:
    """Open a bar over the rows of some shards; the rate is that of this run."""
    sizes = {shard: len(writer.manifest.rows_of_shard(shard)) for shard in shards}
    return tqdm(
        desc=name,
        total=sum(sizes.values()),
        initial=sum(sizes.values()) - sum(sizes[shard] for shard in missing),
        unit=unit,
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


def compute_with_ray(
    make_worker: Callable[[], Callable[[int], None]],
    shards: Sequence[int],
    device: str,
    *,
    show_progress: bool,
) -> None:
    """Compute shards on a Ray cluster, or on this machine if there is none.

    An actor has one GPU, or on a CPU as many cores as this process has threads.
    """
    require(RAY)
    if not shards:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    import ray
    import ray.data

    started_here = not ray.is_initialized()
    if started_here:
        _start_ray()
    try:
        on_gpu = find_device(device).type == "cuda"
        threads = torch.get_num_threads()
        resources = ray.cluster_resources()
        per_actor = {"num_gpus": 1} if on_gpu else {"num_cpus": threads}
        available = resources.get("GPU", 0) if on_gpu else resources.get("CPU", 0) // threads
        # Fewer than the cluster holds may start: a pool that waits for all of them can hang.
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(available)))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = show_progress
        rows = [{"shard": shard} for shard in shards]
        computed = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(make_worker, threads, get_image_limits(), list_states()),
            compute=pool,
            batch_size=1,
            max_restarts=-1,
            max_task_retries=2,
            **per_actor,
        )
        for row in computed.iter_rows():
            if row["kind"]:  # as if the shard had been computed here
                raise (OSError if row["kind"] == "OSError" else ValueError)(row["error"])
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        reason = next(filter(_NAMES_AN_ERROR.match, lines), lines[-1])
        raise RuntimeError(f"Ray could not compute the shards: {reason}") from error
    finally:
        if started_here:
            ray.shutdown()


def _start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, or start one of this machine."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    # One more than there are: the pool may take every core, and something has to feed it.
    ray.init(
        num_cpus=(os.cpu_count() or 1) + 1,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="error",
    )


class _Actor:
    """Computes shards in a process of Ray."""

    def __init__(
        self,
        make_worker: Callable[[], Callable[[int], None]],
        threads: int,
        limits: ImageLimits,
        states: dict[FilePlace, FileInfo],
    ) -> None:
        use_states(states)
        set_image_limits(limits)  # its node does not have this process's environment
        torch.set_num_threads(threads)  # another number gives other last bits
        self._compute = make_worker()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (shard,) = batch["shard"].tolist()
        try:
            self._compute(shard)
        except (ValueError, OSError) as error:  # as text: Ray buries an exception in its own
            kind = "OSError" if isinstance(error, OSError) else "ValueError"
            return {"shard": [shard], "kind": [kind], "error": [str(error)]}
        return {"shard": [shard], "kind": [""], "error": [""]}
