"""Compute the shards of an output, while threads prepare the next and write the previous one.

Shards are independent and dealt out in turn to partitions, which any scheduler may start on any
machine, and within a partition to the processes of `accelerate launch` or `torchrun`. A shard that
another run is computing is refused.

Each actor of a Ray cluster loads the tower once. Ray Data passes shard numbers to the actors and
restarts a lost actor. Actors write embeddings to the output's folder, which all machines share, not
through Ray. The output therefore has the same bytes as from one process, in whatever order shards
are computed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from .._extras import RAY, require
from ..data.images.image_sources import UnreadableImagesError, find_unreadable_images
from ..data.remote.file_locations import FileLocation, list_states, use_states
from ..data.remote.remote_files import FileInfo
from ..data.validation_errors import ErrorCollector
from ..encoding.batches import start_copy, use_one_core
from ..encoding.devices import find_device
from ..image_loading_llm2clip import ImageLimits, get_image_limits, set_image_limits
from ..scheduling.graceful_stop import StopRequest, stop_on_signals
from ..scheduling.processes import choose_device
from .encoding_plan import EncodingPlan, Engine
from .input_rows import InputRows
from .shard_encoding import PreparedShard, ShardEncoder, load_shard_encoder
from .sharded_writer import ShardedWriter

_NAMES_AN_ERROR = re.compile(r"[\w.]+(Error|Exception): ")  # where the error starts in a traceback
# Errors of an actor that the driver raises again; subclasses first.
_KINDS = {kind.__name__: kind for kind in (UnreadableImagesError, OSError, ValueError)}
_UNREADABLE_ADVICE = (
    "Then run again with a new folder. --check-images decodes every image before computing "
    "anything."
)
_OBJECT_STORE_BYTES = 256 * 2**20  # for shard numbers and records in memory


@dataclass(frozen=True)
class ShardWork:
    """Computes the shards of an output in one process.

    Attributes:
        writer: Writer of the output.
        encoder: The loaded tower.
        rows: Texts or images of the output.
    """

    writer: ShardedWriter[Any]
    encoder: ShardEncoder
    rows: InputRows

    def compute(self, shards: Sequence[int], *, stop: StopRequest, bar: tqdm[Any]) -> None:
        """Compute shards until all are done, or until a signal stops the run after a batch.

        Threads prepare the next shard and write the previous one. An error while writing is raised
        after the next batch.
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
                    if self.writer.is_done(shard):  # another run has just written it
                        continue
                    embeds = self._encode(prepared, written, stop, bar)
                    if embeds is None:
                        break
                    num_inputs = len(self.writer.manifest.inputs_of_shard(shard))
                    bar.update(num_inputs - len(prepared.inputs))  # repeated texts
                    copied = start_copy(embeds)
                    written.result()  # keeps at most two shards in memory
                    write = partial(self._write, shard, prepared, copied, held.pop_all())
                    written = scribe.submit(write)
            written.result()

    def _prepare(self, shard: int) -> PreparedShard:
        rows = self.writer.manifest.inputs_of_shard(shard)
        return self.encoder.prepare(self.rows.read_inputs(rows))

    def _encode(
        self, prepared: PreparedShard, written: Future[None], stop: StopRequest, bar: tqdm[Any]
    ) -> Tensor | None:
        """Encode a shard batch by batch; return None if a signal interrupts it."""
        num_left = len(prepared.inputs)
        parts: list[Tensor] = []
        with closing(self.encoder.encode(prepared)) as encoded:  # type: ignore[type-var]
            for numbers, batch in zip(prepared.batches, encoded, strict=True):
                parts.append(batch)
                bar.update(len(numbers))
                num_left -= len(numbers)
                if written.done():
                    written.result()  # raises the write error
                if stop.signal and num_left:
                    return None
        return torch.cat(parts)

    def _write(
        self, shard: int, prepared: PreparedShard, copied: Callable[[], Tensor], held: ExitStack
    ) -> None:
        with held:  # the lock of the shard
            embeds = self.encoder.arrange(prepared, copied())
            self.writer.write(shard, embeds, prepared.num_truncated)


def open_stops(engine: Engine) -> AbstractContextManager[StopRequest]:
    """Handle SIGINT and SIGTERM; refuse to use Ray under a launcher."""
    if engine != "ray":
        return stop_on_signals()
    if PartialState().num_processes > 1:
        raise ValueError("engine='ray' starts its own processes. Run it without a launcher.")
    return nullcontext(StopRequest())  # Ray stops its own actors; finished shards stay


def compute_partition(
    plan: EncodingPlan[Any],
    work: ShardWork,
    folder: Path,
    *,
    stop: StopRequest,
    source: str,
) -> None:
    """Compute the missing shards of a partition, in all processes of the run or with Ray.

    Ray's actors load the model from `folder`. If no shard is missing afterwards, the main process
    completes the output while the others wait. Errors call the data `source`.
    """
    state, writer, config = PartialState(), work.writer, plan.config
    shards = range(writer.manifest.num_shards)[plan.part - 1 :: plan.num_parts]
    if plan.engine == "local":
        shards = shards[state.process_index :: state.num_processes]
    missing = sorted(set(shards) & set(writer.list_missing()))
    shows = config.show_progress
    with name_unreadable_images(work.rows, writer, source=source, show_progress=shows):
        if plan.engine == "ray":
            task = replace(plan, source=folder)  # do not send a loaded model to actors
            # The precision is compared once, here.
            if (taken := work.encoder.plan.get("precision")) in ("float32", "bfloat16"):
                task = replace(task, config=replace(config, precision=taken))
            open_work = partial(_open_work, task, writer, work.rows)
            compute_with_ray(open_work, missing, config.device, show_progress=shows)
        elif missing:
            shown = shows and state.is_local_main_process
            name = f"{writer.manifest.COMMAND} {plan.modality}"
            with closing(open_bar(writer, shards, missing, name, shown=shown)) as bar:
                work.compute(missing, stop=stop, bar=bar)
    stop.raise_interrupt(
        f"Stopped. Complete shards are in {plan.output}.",
        resume=False,
        is_main_process=state.is_main_process,
    )
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
    state.wait_for_everyone()


@contextmanager
def name_unreadable_images(
    rows: InputRows,
    writer: ShardedWriter[Any] | None = None,
    *,
    source: str,
    show_progress: bool = False,
) -> Iterator[None]:
    """Turn the error of one unreadable image into a DataValidationError that names all.

    The images of `writer`'s missing shards, or all images without a writer, are decoded to find the
    unreadable ones.
    """
    try:
        yield
    except UnreadableImagesError:
        errors = ErrorCollector()
        shards = [range(len(rows))]
        if writer is not None:
            shards = [*map(writer.manifest.inputs_of_shard, writer.list_missing())]
        for shard in shards:
            images: list[Any] = rows.read_inputs(shard)
            for error in find_unreadable_images(images, show_progress=show_progress).values():
                errors.add("image unreadable", error)
        errors.raise_if_any(source, advice=_UNREADABLE_ADVICE)
        raise  # the image decodes: the image processor refused it


def _open_work(plan: EncodingPlan[Any], writer: ShardedWriter[Any], rows: InputRows) -> ShardWork:
    """Load the tower in a Ray actor."""
    device = choose_device(plan.config.device)
    encoder = load_shard_encoder(Path(str(plan.source)), plan.modality, plan.config, device)
    recorded, taken = (each.get("precision") for each in (writer.manifest.plan, encoder.plan))
    if recorded != taken:
        raise ValueError(
            f"A machine of the Ray cluster runs the tower in {taken or 'its stored dtype'}, but "
            f"the output is in {recorded or 'the stored dtype'}. Set the same precision for all "
            "machines, such as float32."
        )
    return ShardWork(writer, encoder, rows)


def open_bar(
    writer: ShardedWriter[Any],
    shards: Sequence[int],
    missing: Sequence[int],
    name: str,
    *,
    shown: bool,
) -> tqdm[Any]:
    """Open a progress bar over the inputs of `shards`; those not in `missing` are done."""
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

    Each actor gets one GPU or, on a CPU, as many cores as this process has threads.
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
        # Not all actors may be able to start; a pool that waits for all of them could hang.
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(available)))
        ray.data.DataContext.get_current().enable_progress_bars = show_progress
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
            if row["kind"]:  # re-raise as if computed here
                raise _KINDS[row["kind"]](row["error"])
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        reason = next(filter(_NAMES_AN_ERROR.match, lines), lines[-1])
        raise RuntimeError(f"Ray could not compute the shards: {reason}") from error
    finally:
        if started_here:
            ray.shutdown()


def _start_ray() -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    # One extra core, because the pool may take all of them and needs a task to feed it.
    ray.init(
        num_cpus=(os.cpu_count() or 1) + 1,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="error",
    )


class _Actor:
    """Computes shards in a Ray process."""

    def __init__(
        self,
        open_work: Callable[[], ShardWork],
        threads: int,
        limits: ImageLimits,
        states: dict[FileLocation, FileInfo],
    ) -> None:
        use_states(states)
        set_image_limits(limits)  # its node does not have this process's environment
        torch.set_num_threads(threads)  # the number of threads affects rounding
        self._work = open_work()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (shard,) = batch["shard"].tolist()
        try:
            self._work.compute([shard], stop=StopRequest(), bar=tqdm(disable=True))
        except (ValueError, OSError) as error:  # as text, because Ray wraps exceptions
            kind = next(name for name, kind in _KINDS.items() if isinstance(error, kind))
            return {"shard": [shard], "kind": [kind], "error": [str(error)]}
        return {"shard": [shard], "kind": [""], "error": [""]}
