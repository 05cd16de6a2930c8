"""Stage 2: captions or images into an embedding store, on any number of machines.

Stored are embeddings of captions before the text adapter, or of images before the projection; or
those that a dual encoder's own text encoder, the teacher of `align`, gives to the captions. The
rows are the distinct captions, or the images, in the order of their first occurrence. Which of them
share a batch depends on the shard alone, so a store that was continued has the same bytes as one
that was never interrupted, on the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from accelerate import PartialState

from .._suggestions import counted, list_first
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
from ..data.key_arrays import Array
from ..data.records.data_hashes import hash_images, hash_texts
from ..data.records.record_table import (
    CAPTION_COLUMNS,
    RecordTable,
    find_first_records,
    require_images,
)
from ..data.records.records import CaptionedImage, Modality
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
from ..model_folders.model_folder import require_own_model
from ..model_folders.model_writing import Source, open_source
from ..processing_llm2clip import check_texts
from ..scheduling.processes import choose_device
from .embedding_store_writer import EmbeddingStoreWriter, StoreItems
from .encoding_plan import EncodingPlan, Engine, plan_encoding
from .shard_computation import ShardWork, compute_partition, open_stops
from .shard_encoding import ShardEncoder, is_teaching, load_shard_encoder
from .unreadable_images import accept_repairs, name_unreadable_images

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
            alone, `batch_size`, `num_workers` and `jpeg_decoding` for images alone.
        modality: What is extracted: text or image.
        partition: Which part of the store to compute, such as 2/8 for the second of eight; the
            store is complete after `merge_store`. None for all of it.
        engine: What computes the shards: the processes of this run, or the actors of a Ray cluster.
            Its machines see the same files.

    Returns:
        `output`.

    Raises:
        ValueError: No captions or images; or `output` is a store of another model, prompt, dataset
            or option, with both values; or there is no such partition.
        DataValidationError: Images cannot be decoded, all of which are named as soon as one is met;
            complete shards stay, and the store continues when these images alone are repaired.
        FileExistsError: `output` holds other files.
        OSError: `output` cannot be written, before anything is read; the disk is full, and
            what is written stays.
        StageInterrupt: SIGINT or SIGTERM stopped the extraction after a batch.
        RuntimeError: An actor of Ray failed again and again.

    Examples:
        >>> records = load_records("my-images")
        >>> store = extract("my-model", records, "images", modality="image")
    """
    plan = plan_encoding(
        StoreManifest, source, output, config or ExtractConfig(),
        modality=modality, partition=partition, engine=engine,
    )  # fmt: skip
    return run_extract(plan, data)


def run_extract(
    plan: EncodingPlan[ExtractConfig],
    data: Sequence[CaptionedImage],
    *,
    source: str = "The dataset",
) -> Path:
    """Compute a planned store; returns its folder. Errors name the data by `source`."""
    config, modality = plan.config, plan.modality
    table = RecordTable.from_records(data)
    device = choose_device(config.device)
    with open_stops(plan.engine) as stop, open_source(plan.source, plan.output) as model:
        _require_inputs(table, modality, config)
        require_own_model(model.folder, or_teacher=modality == "text")
        encoder = load_shard_encoder(model.folder, modality, config, device)
        planned = plan_store(model.folder, table, encoder, config, modality)
        with PartialState().main_process_first():
            accept_repairs(planned, table, plan.output, partial(EmbeddingStoreWriter, plan.output))
            writer = EmbeddingStoreWriter.open(
                plan.output, planned, partial(list_items, table, planned)
            )
        was_complete, inputs = writer.manifest.complete, StoreInputs(writer, table)
        with name_unreadable_images(
            table,
            inputs.read_inputs,
            source=source,
            writer=writer,
            show_progress=config.show_progress,
        ):
            compute_partition(
                plan,
                ShardWork(writer, encoder, inputs),
                model.folder,
                stop=stop,
                finish=plan.num_parts == 1 or was_complete,
            )
    if plan.num_parts == 1 or (was_complete and not writer.list_missing()):
        EmbeddingStore.open(plan.output, check="full" if was_complete else "fast")
    return plan.output


def merge_store(folder: str | Path) -> Path:
    """Complete a store whose partitions have all been extracted.

    Args:
        folder: Folder of the store.

    Returns:
        `folder`.

    Raises:
        ValueError: It holds no store, or shards are missing or damaged; they are named.
        OSError: The disk is full.

    Examples:
        >>> store = merge_store("captions")  # which is complete already
    """
    folder = Path(folder)
    writer = EmbeddingStoreWriter(folder, StoreManifest.read(folder))
    if not writer.finish():
        missing = writer.list_missing()
        raise ValueError(
            f"{folder} is not complete: {len(missing)} of {writer.manifest.num_shards} shards are "
            f"missing: {list_first(missing)}. Run the same extraction again, or the partitions "
            "that did not end; they continue."
        )
    EmbeddingStore.open(folder)
    return folder


def describe_extraction(store: Path) -> list[str]:
    """Describe a store in lines for a terminal."""
    manifest = StoreManifest.read(store)
    missing = EmbeddingStoreWriter(store, manifest).list_missing()
    if missing or not manifest.complete:
        done = manifest.num_shards - len(missing)
        return [
            f"{done} of {manifest.num_shards} shards are complete.",
            f"When all partitions have ended: llm2clip merge-store {store}",
        ]
    counts = ", ".join(
        counted(number, name[:-1]) if name.endswith("s") else f"{number:,} {name}"
        for name, number in manifest.counts.items()
    )
    return [
        f"Wrote {store}: {counted(manifest.num_rows, 'embedding')} of {manifest.dim} dimensions "
        f"for {counted(manifest.num_items, 'record')} ({counts})."
    ]


class StoreInputs:
    """Captions or images of the rows of a store that is begun."""

    def __init__(self, writer: EmbeddingStoreWriter, records: RecordTable) -> None:
        self._writer = writer
        self._records = records

    @cached_property
    def _occurrences(self) -> FirstOccurrences:
        manifest = self._writer.manifest
        index = StoreIndex(self._writer.folder, manifest)
        return FirstOccurrences(index, manifest.rows_per_shard)

    def read_inputs(self, rows: range) -> list[str] | list[ImageSource | None]:
        """Read the captions of some rows, or the addresses of their images."""
        manifest, records = self._writer.manifest, self._records
        if manifest.content != VISION_EMBEDS:
            num_views = read_num_views(manifest.plan)
            return list(
                iterate_first_captions(records, self._occurrences, rows, num_views=num_views)
            )
        images: list[ImageSource | None] = []
        for first, items, _ in self._occurrences.find(rows):
            # Records of an image in several languages share its row.
            images += records.select(first + items).iterate_images()
        return images


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
    """Make the manifest of a store before its items are known."""
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


def list_items(records: RecordTable, planned: StoreManifest, scratch: Path) -> StoreItems:
    """Number the distinct inputs of a planned store; `scratch` is an empty folder."""
    if planned.content == VISION_EMBEDS:
        return list_image_items(records)
    return list_caption_items(records, scratch, num_views=read_num_views(planned.plan))


def list_caption_items(records: RecordTable, scratch: Path, *, num_views: int = 0) -> StoreItems:
    """Number the distinct captions of a dataset and their views; `scratch` is an empty folder."""
    num_captions = sum(
        int(counts.sum(dtype=np.int64)) for pair in records.iterate_counts() for counts in pair
    )
    numbers = TextNumbers(scratch, num_captions * (1 + num_views))
    suspicious: list[str] = []
    for captions in records.iterate_columns((*CAPTION_COLUMNS, "text_keys")):
        batch = add_views(captions, num_views)
        keys = np.asarray(batch.column("text_keys").flatten())
        distinct = numbers.add(flatten_captions(batch).texts, keys)
        # Arrow passes texts with an ASCII character; Python checks the others.
        unclear = distinct.filter(pc.invert(pc.match_substring_regex(distinct, "[!-~]")))
        suspicious += [text for text in unclear.to_pylist() if not text.strip()]
    if suspicious:
        check_texts(suspicious)
    numbers.number()
    counts = {"captions": num_captions, "distinct": numbers.num_distinct}
    if num_views:
        counts["sentence views"] = numbers.num_texts - num_captions
        counts["single-sentence long captions"] = count_undivided(records)
    batches = _iterate_caption_items(records, numbers, num_views)
    return StoreItems(numbers.num_distinct, len(records), counts, batches)


def _iterate_caption_items(
    records: RecordTable, numbers: TextNumbers, num_views: int
) -> Iterator[pa.RecordBatch]:
    batches = records.iterate_columns((*_ITEM_COLUMNS, *CAPTION_COLUMNS))
    for batch, rows in zip(batches, numbers, strict=True):
        flat = flatten_captions(add_views(batch.select(list(CAPTION_COLUMNS)), num_views))
        yield make_batch(batch, flat.num_short, flat.ends, rows)


def list_image_items(records: RecordTable) -> StoreItems:
    """Number the images of a dataset, by the first records of their names."""
    firsts = find_first_records(records)
    is_first = firsts == np.arange(len(records))
    numbers = (np.cumsum(is_first, dtype=firsts.dtype) - 1)[firsts]
    num_distinct = int(is_first.sum())
    counts = {"images": len(records), "distinct": num_distinct}
    return StoreItems(num_distinct, len(records), counts, _iterate_image_items(records, numbers))


def _iterate_image_items(records: RecordTable, numbers: Array) -> Iterator[pa.RecordBatch]:
    start = 0
    for batch in records.iterate_columns(_ITEM_COLUMNS):
        rows = numbers[start : start + len(batch)]
        start += len(rows)
        yield make_batch(batch, np.ones(len(rows), np.int32), np.arange(len(rows) + 1), rows)
