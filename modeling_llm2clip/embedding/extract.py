"""Stage 2: captions or images into an embedding store, on any number of machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from accelerate import PartialState

from .._suggestions import counted
from ..configs.extract_config import ExtractConfig
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage, Modality
from ..data.remote.object_storage import ObjectStorage
from ..data.store.embedding_store import EmbeddingStore
from ..data.store.store_manifest import StoreManifest
from ..model_folders.model_folder import find_model_folder
from ..model_folders.stage_source import Source, open_source
from ..scheduling.graceful_stop import StopRequest, stop_on_signals
from ..scheduling.processes import choose_device
from .embedding_store_writer import EmbeddingStoreWriter
from .extraction_plan import make_plan
from .shard_computation import (
    Engine,
    ShardJob,
    compute_partition,
    make_shard_worker,
    parse_partition,
    require_engine,
)
from .shared_store_writer import SharedStoreWriter, SharedWork


def extract(
    source: Source,
    data: Sequence[CaptionedImage],
    output: str | Path,
    config: ExtractConfig | None = None,
    *,
    modality: Modality,
    partition: str | None = None,
    engine: Engine = "local",
    storage: str | None = None,
) -> Path:
    """Compute the embeddings of all captions or images into a store, or continue one.

    The embeddings are for `align`: taken before text adapter and projections. Only the tower that
    is needed is loaded.

    Args:
        source: Folder or Hub id of an LLM2CLIP model, or a loaded (model, processor).
        data: Records; item i of the store is record i.
        output: Folder of the store: new, empty, or of the same store, which is continued.
        config: Options; None for the defaults. `token_budget` is for captions alone, `batch_size`
            and `num_workers` for images alone.
        modality: What is extracted: text or image.
        partition: Which part of the store to compute, such as 2/8 for the second of eight; the
            store is complete after `merge_store`. None for all of it.
        engine: What computes the shards: the processes of this run, or the actors of a Ray cluster.
            Its machines see the same files, or share a `storage`; then the model is a Hub id, or
            at the same path on each.
        storage: URL of object storage in which machines that share no folder put their shards, such
            as `s3://bucket/captions`. A store that is complete is copied to `output`.

    Returns:
        `output`.

    Raises:
        ValueError: No captions or images, or broken ones; or `output` or `storage` is a store of
            another model, prompt, dataset or option, with both values; or there is no such
            partition.
        OSError: The disk is full, or the storage cannot be reached; what is written stays.
        StageInterrupt: SIGINT or SIGTERM stopped the extraction after a batch.
        RuntimeError: An actor of Ray failed again and again.

    Examples:
        >>> records = load_records("my-images")
        >>> store = extract("my-model", records, "images", modality="image")
    """
    if modality not in ("text", "image"):
        raise ValueError(f"modality={modality!r} must be text or image.")
    is_whole = parse_partition(partition) == (1, 1)
    config, output = config or ExtractConfig(), Path(output)
    table = RecordTable.from_records(data)
    device = choose_device(config.device)
    require_engine(engine)
    # Ray ends its actors when it is interrupted; what they wrote stays.
    stops = nullcontext(StopRequest()) if engine == "ray" else stop_on_signals()
    with stops as stop, open_source(source, output) as found:
        plan = make_plan(found.folder, table, config, device, modality)
        with PartialState().main_process_first():
            if storage is None:
                writer = EmbeddingStoreWriter.open(output, plan.manifest, plan.list_items)
            else:
                shared = ObjectStorage(storage)
                writer = SharedStoreWriter.begin(output, shared, plan.manifest, plan.list_items)
        make_worker = None
        if engine == "ray":
            model = found.name if storage and isinstance(source, str | Path) else found.folder
            work = SharedWork.describe(writer, table)
            make_worker = partial(_make_worker, model, work, config, modality)
        job = ShardJob(
            name=f"extract {modality}",
            unit=plan.unit,
            writer=writer,
            prepare=partial(plan.open_shards, writer),
            make_worker=make_worker,
            config=config,
        )
        finish = writer.finish if is_whole else None
        compute_partition(job, partition=partition, stop=stop, finish=finish)
    if is_whole:
        EmbeddingStore.open(output)  # a store of an earlier run may have lost files since
    return output


def _make_worker(
    model: str | Path, work: SharedWork, config: ExtractConfig, modality: Modality
) -> Callable[[int], None]:
    """Load the tower that is needed, for shards that something else hands out."""
    writer, table = work.open()
    device = choose_device(config.device)
    plan = make_plan(find_model_folder(model), table, config, device, modality)
    return make_shard_worker(writer, plan.open_shards(writer))


def merge_store(folder: str | Path, *, storage: str | None = None) -> Path:
    """Complete a store whose partitions have all been extracted.

    Args:
        folder: Folder of the store. With a storage it may be new.
        storage: URL of the object storage that has the shards.

    Returns:
        `folder`.

    Raises:
        ValueError: It holds no store, or shards are missing or damaged; they are named.
        OSError: The disk is full, or the storage cannot be reached.

    Examples:
        >>> store = merge_store("captions")  # which is complete already
    """
    folder = Path(folder)
    if storage is None:
        writer = EmbeddingStoreWriter(folder, StoreManifest.read(folder))
    else:
        writer = SharedStoreWriter.join(folder, ObjectStorage(storage))
    writer.finish()
    EmbeddingStore.open(folder)
    return folder


def describe_extraction(store: Path, *, storage: str | None = None) -> list[str]:
    """Describe a store in lines for a terminal; `storage` is the object storage of its shards."""
    manifest = StoreManifest.read(store)
    if not manifest.complete:
        writer = EmbeddingStoreWriter(store, manifest)
        if storage is not None:
            writer = SharedStoreWriter(store, manifest, ObjectStorage(storage))
        done = manifest.num_shards - len(writer.list_missing())
        where = "" if storage is None else f" --storage {storage}"
        return [
            f"{done} of {manifest.num_shards} shards are complete.",
            f"When all partitions have ended: llm2clip merge-store {store}{where}",
        ]
    counts = ", ".join(
        counted(number, name[:-1]) if name.endswith("s") else f"{number:,} {name}"
        for name, number in manifest.counts.items()
    )
    return [
        f"Wrote {store}: {counted(manifest.num_rows, 'embedding')} of {manifest.dim} dimensions "
        f"for {counted(manifest.num_items, 'record')} ({counts})."
    ]
