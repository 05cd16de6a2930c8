"""Extraction by the actors of a Ray cluster: each loads the tower once, and computes whole shards.

Ray Data hands out the numbers of the shards, and starts a lost actor again, whose shard continues
after its last batch. The embeddings do not go through Ray but to the store's folder, which all
machines see, or to object storage: so the bytes are those of one process, in whatever order the
shards are computed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..._extras import RAY, require
from ...configs.extract_config import ExtractConfig
from ...data.records.record_table import RecordTable
from ...data.store.embedding_store_writer import EmbeddingStoreWriter
from ...encoding.devices import find_device
from ...model_folders.model_folder import find_model_folder
from .shard_extraction import Modality, ShardExtractor
from .shared_work import SharedWork, share_work

_OBJECT_STORE_BYTES = 256 * 2**20  # numbers of shards go through it, and records in memory


def compute_with_ray(
    writer: EmbeddingStoreWriter,
    shards: Sequence[int],
    model: str | Path,
    table: RecordTable,
    config: ExtractConfig,
    *,
    modality: Modality,
) -> None:
    """Compute the shards that are missing on a Ray cluster, or on this machine if there is none.

    An actor has one GPU, or on a CPU as many cores as this process has threads.

    Args:
        writer: Of the store.
        shards: Numbers of the shards to compute.
        model: Folder or Hub id of the model, for each machine.
        table: The dataset.
        config: Options of the extraction.
        modality: What is extracted.

    Raises:
        MissingExtraError: Ray is not installed.
        RuntimeError: An actor failed; complete shards stay.
    """
    require(RAY)
    missing = sorted(set(shards) & set(writer.list_missing()))
    if not missing:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    import ray
    import ray.data

    started_here = not ray.is_initialized()
    if started_here:
        _start_ray()
    try:
        on_gpu = find_device(config.device).type == "cuda"
        threads = torch.get_num_threads()
        resources = ray.cluster_resources()
        per_actor = {"num_gpus": 1} if on_gpu else {"num_cpus": threads}
        available = resources.get("GPU", 0) if on_gpu else resources.get("CPU", 0) // threads
        # Fewer than the cluster holds may start: a pool that waits for all of them can hang.
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(available)))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = config.show_progress
        rows = [{"shard": shard} for shard in missing]
        ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(share_work(writer, table), model, config, modality, threads),
            compute=pool,
            batch_size=1,
            max_restarts=-1,
            max_task_retries=2,
            **per_actor,
        ).materialize()  # fmt: skip
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
        work: SharedWork,
        model: str | Path,
        config: ExtractConfig,
        modality: Modality,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)  # another number gives other last bits
        # Kept as an attribute: the folder is removed with the object.
        self._folder = TemporaryDirectory(prefix="llm2clip-extract-")
        writer, table = work.open(Path(self._folder.name))
        self._extract = ShardExtractor(find_model_folder(model), table, writer, config, modality)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for shard in batch["shard"].tolist():
            self._extract(shard)
        return batch
