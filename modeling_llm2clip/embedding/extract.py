"""Stage 2: captions or images into an embedding store, on any number of machines.

Stored are embeddings of captions before the text adapter, or of images before the projection; or
those that a dual encoder's own text encoder, the teacher of `align`, gives to the captions. The
rows are the distinct captions, or the images, in the order of their first occurrence. Which of them
share a batch depends on the shard alone, so a store that was continued has the same bytes as one
that was never interrupted, on the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from accelerate import PartialState

from .._suggestions import counted
from ..configs.encoding_config import ExtractConfig
from ..data.captions.caption_columns import (
    FirstOccurrences,
    flatten_captions,
    iterate_first_captions,
)
from ..data.captions.distinct_texts import TextNumbers
from ..data.captions.sentence_views import (
    add_views,
    count_undivided,
    describe_views,
    read_num_views,
    require_views,
)
from ..data.images.image_sources import ImageSource
from ..data.records.data_hashes import hash_images, hash_texts
from ..data.records.record_table import CAPTION_COLUMNS, RecordTable
from ..data.records.records import CaptionedImage, Modality
from ..data.records.shared_images import (
    find_ambiguous_names,
    refuse_ambiguous_names,
    require_images,
)
from ..data.remote.object_storage import ObjectStorage
from ..data.store.embedding_store import EmbeddingStore
from ..data.store.store_index import StoreIndex, make_batch
from ..data.store.store_manifest import (
    CAPTION_EMBEDS,
    STORED_DTYPES,
    TEACHER_TEXT_EMBEDS,
    VISION_EMBEDS,
    StoreManifest,
)
from ..model_folders.fingerprint import (
    fingerprint_teacher,
    fingerprint_text,
    fingerprint_vision,
)
from ..model_folders.model_folder import find_model_folder, require_own_model
from ..model_folders.model_writing import Source, open_source
from ..processing_llm2clip import check_texts
from ..scheduling.processes import choose_device
from .embedding_store_writer import (
    EmbeddingStoreWriter,
    SharedStoreWriter,
    SharedWork,
    StoreItems,
)
from .shard_computation import (
    Engine,
    Prepare,
    PreparedShard,
    compute_partition,
    make_shard_worker,
    open_stops,
    parse_partition,
)
from .shard_encoding import ShardEncoder, is_teaching, load_shard_encoder

_ITEM_COLUMNS = ("name", "group_id", "lang", "key", "group_key", "text_keys")


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
    is needed is loaded. A CLIP or SigLIP model, as a teacher of `align`, gives its unit embeddings
    of the captions instead, and zeros for captions that are longer than it reads.

    Args:
        source: Folder or Hub id of an LLM2CLIP model, or a loaded (model, processor); with
            `modality="text"` also of CLIP, SigLIP or the like.
        data: Records; item i of the store is record i.
        output: Folder of the store: new, empty, or of the same store, which is continued.
        config: Options; None for the defaults. `token_budget` and `sentence_views` are for captions
            alone, `batch_size` and `num_workers` for images alone.
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
        FileExistsError: `output` holds other files.
        OSError: `output` cannot be written, before anything is read; the disk is full, or the
            storage cannot be reached, and what is written stays.
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
    StoreManifest.require_folder(output)
    table = RecordTable.from_records(data)
    device = choose_device(config.device)
    with open_stops(engine) as stop, open_source(source, output) as found:
        _require_inputs(table, modality, config)
        require_own_model(found.folder, or_teacher=modality == "text")
        encoder = load_shard_encoder(found.folder, modality, config, device)
        planned = plan_store(found.folder, table, encoder, config, modality)
        list_items = partial(LIST_ITEMS[modality], table)
        if num_views := read_num_views(planned.plan):
            list_items = partial(list_caption_items, table, num_views=num_views)
        with PartialState().main_process_first():
            if storage is None:
                writer = EmbeddingStoreWriter.open(output, planned, list_items)
            else:
                writer = SharedStoreWriter.begin(
                    output, ObjectStorage(storage), planned, list_items
                )
        make_worker = None
        if engine == "ray":
            model = found.name if storage and isinstance(source, str | Path) else found.folder
            work = SharedWork.describe(writer, table)
            make_worker = partial(_make_worker, model, work, config, modality)
        compute_partition(
            writer,
            partial(open_shards, writer, table, encoder),
            config,
            name=f"extract {modality}",
            unit=" captions" if modality == "text" else " images",
            partition=partition,
            stop=stop,
            make_worker=make_worker,
            finish=writer.finish if is_whole else None,
        )
    if is_whole:
        EmbeddingStore.open(output)  # a store of an earlier run may have lost files since
    return output


def _make_worker(
    model: str | Path, work: SharedWork, config: ExtractConfig, modality: Modality
) -> Callable[[int], None]:
    """Load the tower that is needed, for shards that something else hands out."""
    writer, table = work.open()
    device = choose_device(config.device)
    encoder = load_shard_encoder(find_model_folder(model), modality, config, device)
    return make_shard_worker(writer, open_shards(writer, table, encoder))


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


def open_shards(
    writer: EmbeddingStoreWriter, records: RecordTable, encoder: ShardEncoder
) -> Prepare:
    """Return what prepares the shards of a store that is begun."""
    manifest = writer.manifest
    occurrences = FirstOccurrences(StoreIndex(writer.folder, manifest), manifest.rows_per_shard)
    num_views = read_num_views(manifest.plan)

    def prepare(rows: range) -> PreparedShard:
        if manifest.content != VISION_EMBEDS:
            texts = iterate_first_captions(records, occurrences, rows, num_views=num_views)
            return encoder.prepare(list(texts))
        images: list[ImageSource | None] = []
        for first, items, _ in occurrences.find(rows):
            # Records in several languages share the row of theirs.
            images += records.select(first + items).iterate_images()
        return encoder.prepare(images)

    return prepare


def _require_inputs(records: RecordTable, modality: Modality, config: ExtractConfig) -> None:
    if modality == "image":
        require_images(records)
        return
    if not any(short.any() or long.any() for short, long in records.iterate_counts()):
        check_texts([])
    require_views(records, config.sentence_views)


def plan_store(
    folder: Path,
    records: RecordTable,
    encoder: ShardEncoder,
    config: ExtractConfig,
    modality: Modality,
) -> StoreManifest:
    """Make the manifest of a store whose items are not known."""
    causes = {"data": hash_texts(records)}
    if modality == "image":
        causes["images"] = hash_images(records)
    else:
        causes |= describe_views(config.sentence_views)
    content, fingerprint = {
        "text": (CAPTION_EMBEDS, fingerprint_text), "image": (VISION_EMBEDS, fingerprint_vision),
    }[modality]  # fmt: skip
    if is_teaching(folder, modality, config):
        content, fingerprint = TEACHER_TEXT_EMBEDS, fingerprint_teacher
    row_bytes = encoder.dim * np.dtype(STORED_DTYPES[config.store_dtype][1]).itemsize
    return StoreManifest(
        content=content,
        fingerprint=fingerprint(folder),
        dtype=config.store_dtype,
        dim=encoder.dim,
        rows_per_shard=config.count_rows_per_shard(row_bytes),
        plan={**causes, **encoder.plan},
    )


def list_caption_items(records: RecordTable, scratch: Path, *, num_views: int = 0) -> StoreItems:
    """Number the distinct captions of a dataset and their views; `scratch` is an empty folder."""
    num_captions = sum(
        int(counts.sum(dtype=np.int64)) for pair in records.iterate_counts() for counts in pair
    )
    numbers = TextNumbers(scratch, num_captions * (1 + num_views))
    suspicious: list[str] = []
    for own in records.iterate_columns((*CAPTION_COLUMNS, "text_keys")):
        batch = add_views(own, num_views)
        keys = np.asarray(batch.column("text_keys").flatten())
        distinct = numbers.add(flatten_captions(batch).texts, keys)
        # Arrow passes those with a letter, and Python looks at the others.
        unclear = distinct.filter(pc.invert(pc.match_substring_regex(distinct, "[!-~]")))
        suspicious += [text for text in unclear.to_pylist() if not text.strip()]
    if suspicious:
        check_texts(suspicious)
    numbers.number()

    def make_batches() -> Iterator[pa.RecordBatch]:
        batches = records.iterate_columns((*_ITEM_COLUMNS, *CAPTION_COLUMNS))
        for batch, rows in zip(batches, numbers, strict=True):
            flat = flatten_captions(add_views(batch.select(list(CAPTION_COLUMNS)), num_views))
            yield make_batch(batch, flat.num_short, flat.ends, rows)

    counts = {"captions": num_captions, "distinct": numbers.num_distinct}
    if num_views:
        counts["sentence views"] = numbers.num_texts - num_captions
        counts["single-sentence long captions"] = count_undivided(records)
    return StoreItems(numbers.num_distinct, len(records), counts, make_batches())


def list_image_items(records: RecordTable, _scratch: Path) -> StoreItems:
    """Number the images of a dataset, by the first records of their names."""
    firsts = records.find_first_rows("name_key")
    is_first = firsts == np.arange(len(records))
    again = np.flatnonzero(~is_first)
    refuse_ambiguous_names(find_ambiguous_names(records, again, firsts[again]))
    numbers = (np.cumsum(is_first, dtype=firsts.dtype) - 1)[firsts]

    def make_batches() -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in records.iterate_columns(_ITEM_COLUMNS):
            rows = numbers[start : start + len(batch)]
            start += len(rows)
            yield make_batch(batch, np.ones(len(rows), np.int32), np.arange(len(rows) + 1), rows)

    num_distinct = int(is_first.sum())
    counts = {"images": len(records), "distinct": num_distinct}
    return StoreItems(num_distinct, len(records), counts, make_batches())


LIST_ITEMS: dict[str, Callable[[RecordTable, Path], StoreItems]] = {
    "text": list_caption_items,
    "image": list_image_items,
}
