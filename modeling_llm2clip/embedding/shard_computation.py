"""Computes shards of an output, while threads prepare the next one and write the one before.

Shards are independent. The processes of `accelerate launch` or `torchrun` take turns with them;
partitions, which any scheduler may start on any machine, do the same by their number. A shard that
another process writes is refused.

The actors of a Ray cluster load the tower once each. Ray Data hands them the numbers of the shards,
and starts a lost actor again. The embeddings go to the output's folder, which all machines see,
and not through Ray: so the bytes are those of one process, in whatever order the shards are
computed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from .._extras import RAY, require
from ..data.images.image_sources import UnreadableImagesError
from ..data.remote.file_locations import FileLocation, list_states, use_states
from ..data.remote.remote_files import FileInfo
from ..encoding.batches import start_copy, use_one_core
from ..encoding.devices import find_device
from ..image_loading_llm2clip import ImageLimits, get_image_limits, set_image_limits
from ..scheduling.graceful_stop import StopRequest, stop_on_signals
from ..scheduling.processes import choose_device
from .encoding_plan import EncodingPlan, Engine
from .input_rows import InputRows
from .shard_encoding import PreparedShard, ShardEncoder, load_shard_encoder
from .sharded_writer import ShardedWriter
from .unreadable_images import name_unreadable_images

_NAMES_AN_ERROR = re.compile(r"[\w.]+(Error|Exception): ")  # the first line of a traceback's end
# Errors of an actor that the driver raises; subclasses first.
_KINDS = {kind.__name__: kind for kind in (UnreadableImagesError, OSError, ValueError)}
_OBJECT_STORE_BYTES = 256 * 2**20  # numbers of shards go through it, and records in memory


@dataclass(frozen=True)
class ShardWork:
    """Computes the shards of an output in one process.

    Attributes:
        writer: Writer of the output.
        encoder: The loaded tower.
        rows: Texts or images of its shards.
    """

    writer: ShardedWriter[Any]
    encoder: ShardEncoder
    rows: InputRows

    def compute(self, shards: Sequence[int], *, stop: StopRequest, bar: tqdm[Any]) -> None:
        """Compute shards until all are done, or until the batch in which a signal comes.

        Threads prepare the next shard and write the one before, whose errors are raised after the
        next batch.
        """
        with (
            ThreadPoolExecutor(1) as reader,
            ThreadPoolExecutor(1, initializer=use_one_core) as scribe,
        ):
            ahead = reader.submit(self._prepare, shards[0])
            written = scribe.submit(lambda: None)
            for shard, following in zip(shards, [*shards[1:], None], strict=True):
                prepared = ahead.result()
                if following is not None:
                    ahead = reader.submit(self._prepare, following)
                if stop.signal:
                    break
                with ExitStack() as held:
                    held.enter_context(self.writer.hold(shard))
                    if self.writer.is_done(shard):  # another run just has
                        continue
                    embeds = self._encode(prepared, written, stop, bar)
                    if embeds is None:
                        break
                    num_inputs = len(self.writer.manifest.inputs_of_shard(shard))
                    bar.update(num_inputs - len(prepared.inputs))  # texts that occur again
                    copied = start_copy(embeds)
                    written.result()  # so that embeddings of two shards at most are in memory
                    write = partial(self._write, shard, prepared, copied, held.pop_all())
                    written = scribe.submit(write)
            written.result()

    def _prepare(self, shard: int) -> PreparedShard:
        inputs = self.writer.manifest.inputs_of_shard(shard)
        return self.encoder.prepare(self.rows.read_inputs(inputs))

    def _encode(
        self, prepared: PreparedShard, written: Future[None], stop: StopRequest, bar: tqdm[Any]
    ) -> Tensor | None:
        """Encode a shard, batch after batch; return None if a signal came before its end."""
        num_left = len(prepared.inputs)
        parts: list[Tensor] = []
        with closing(self.encoder.encode(prepared)) as encoded:  # type: ignore[type-var]
            for numbers, batch in zip(prepared.batches, encoded, strict=True):
                parts.append(batch)
                bar.update(len(numbers))
                num_left -= len(numbers)
                if written.done():
                    written.result()  # raises its error
                if stop.signal and num_left:
                    return None
        return torch.cat(parts)

    def _write(
        self, shard: int, prepared: PreparedShard, copied: Callable[[], Tensor], held: ExitStack
    ) -> None:
        with held:  # the shard, which other runs are refused until now
            embeds = self.encoder.arrange(prepared, copied())
            self.writer.write(shard, embeds, prepared.num_truncated)


def open_stops(engine: Engine) -> AbstractContextManager[StopRequest]:
    """Note signals; refuse Ray in one of several processes of a launcher."""
    if engine != "ray":
        return stop_on_signals()
    if PartialState().num_processes > 1:
        raise ValueError("engine='ray' starts its own processes. Run it without a launcher.")
    return nullcontext(StopRequest())  # Ray ends its actors itself; what they wrote stays


def compute_partition(
    plan: EncodingPlan[Any],
    work: ShardWork,
    folder: Path,
    *,
    stop: StopRequest,
    source: str,
) -> None:
    """Compute the missing shards of a partition, in all processes of the run or with Ray.

    Ray's actors load the model of `folder`. The main process completes the output if all shards are
    there, while the others wait. Errors name the data by `source`.
    """
    state, writer, config = PartialState(), work.writer, plan.config
    shards = range(writer.manifest.num_shards)[plan.part - 1 :: plan.num_parts]
    if plan.engine == "local":
        shards = shards[state.process_index :: state.num_processes]
    missing = sorted(set(shards) & set(writer.list_missing()))
    shows = config.show_progress
    with name_unreadable_images(work.rows, writer, source=source, show_progress=shows):
        if plan.engine == "ray":
            task = replace(plan, source=folder)  # a loaded model would be sent to each actor
            if (taken := work.encoder.plan.get("precision")) in ("float32", "bfloat16"):
                task = replace(task, config=replace(config, precision=taken))  # compared once
            open_work = partial(_open_work, task, writer, work.rows)
            compute_with_ray(open_work, missing, config.device, show_progress=shows)
        elif missing:
            shown = shows and state.is_local_main_process
            name = f"{writer.manifest.COMMAND} {plan.modality}"
            with closing(open_bar(writer, shards, missing, name, shown=shown)) as bar:
                work.compute(missing, stop=stop, bar=bar)
    stop.raise_interrupt(
        f"Stopped; complete shards are in {plan.output}.",
        resume=False,
        is_main_process=state.is_main_process,
    )
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
    state.wait_for_everyone()


def _open_work(plan: EncodingPlan[Any], writer: ShardedWriter[Any], rows: InputRows) -> ShardWork:
    """Load the tower that is needed in an actor of Ray."""
    device = choose_device(plan.config.device)
    encoder = load_shard_encoder(Path(str(plan.source)), plan.modality, plan.config, device)
    return ShardWork(writer, encoder, rows)


def open_bar(
    writer: ShardedWriter[Any],
    shards: Sequence[int],
    missing: Sequence[int],
    name: str,
    *,
    shown: bool,
) -> tqdm[Any]:
    """Open a bar over the inputs of some shards; its rate is the rate of this run."""
    sizes = {shard: len(writer.manifest.inputs_of_shard(shard)) for shard in shards}
    return tqdm(
        desc=name,
        total=sum(sizes.values()),
        initial=sum(sizes.values()) - sum(sizes[shard] for shard in missing),
        unit=f" {name.rpartition(' ')[2]}s",
        unit_scale=True,
        disable=not shown,
    )


def compute_with_ray(
    open_work: Callable[[], ShardWork],
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
            fn_constructor_args=(open_work, threads, get_image_limits(), list_states()),
            compute=pool,
            batch_size=1,
            max_restarts=-1,
            max_task_retries=2,
            **per_actor,
        )
        for row in computed.iter_rows():
            if row["kind"]:  # as if the shard had been computed here
                raise _KINDS[row["kind"]](row["error"])
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
        open_work: Callable[[], ShardWork],
        threads: int,
        limits: ImageLimits,
        states: dict[FileLocation, FileInfo],
    ) -> None:
        use_states(states)
        set_image_limits(limits)  # its node does not have this process's environment
        torch.set_num_threads(threads)  # another number gives other last bits
        self._work = open_work()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (shard,) = batch["shard"].tolist()
        try:
            self._work.compute([shard], stop=StopRequest(), bar=tqdm(disable=True))
        except (ValueError, OSError) as error:  # as text: Ray buries an exception in its own
            kind = next(name for name, kind in _KINDS.items() if isinstance(error, kind))
            return {"shard": [shard], "kind": [kind], "error": [str(error)]}
        return {"shard": [shard], "kind": [""], "error": [""]}
