"""Shards computed by the actors of a Ray cluster, each of which loads its tower once.

Ray Data hands out the numbers of the shards, and starts a lost actor again, whose shard continues
after its last batch. The embeddings do not go through Ray but to the output's folder, which all
machines see, or to object storage: so the bytes are those of one process, in whatever order the
shards are computed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._extras import RAY, require
from ..encoding.devices import find_device
from ..image_loading_llm2clip import ImageLimits, get_image_limits, set_image_limits

_NAMES_AN_ERROR = re.compile(r"[\w.]+(Error|Exception): ")  # the first line of a traceback's end
_OBJECT_STORE_BYTES = 256 * 2**20  # numbers of shards go through it, and records in memory


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
            fn_constructor_args=(make_worker, threads, get_image_limits()),
            compute=pool,
            batch_size=1,
            max_restarts=-1,
            max_task_retries=2,
            **per_actor,
        )
        for row in computed.iter_rows():
            _raise_error(row)
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
        self, make_worker: Callable[[], Callable[[int], None]], threads: int, limits: ImageLimits
    ) -> None:
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


def _raise_error(row: dict[str, Any]) -> None:
    """Raise the error of a shard, if it has one, as if it had been computed here."""
    if row["kind"]:
        raise (OSError if row["kind"] == "OSError" else ValueError)(row["error"])
