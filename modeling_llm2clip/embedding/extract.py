"""Stage 2: write the embeddings of captions or images to a store, on any number of machines.

Stores captions before the text adapter and images before the projection. A dual encoder, the
teacher of `align`, stores its own text embeddings of the captions. Batches depend only on the
shard, so on the same kind of machine a resumed store has the same bytes as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
from accelerate import PartialState

from .._suggestions import counted
from ..configs.encoding_config import ExtractConfig
from ..data.captions.sentence_views import describe_views, read_num_views, require_views
from ..data.records.data_hashes import hash_images, hash_texts
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage, Modality
from ..data.store.embedding_store import EmbeddingStore
from ..data.store.store_index import StoreIndex
from ..data.store.store_manifest import (
    CAPTION_EMBEDS,
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
from ..scheduling.processes import choose_device
from .encoding_plan import EncodingPlan, Engine, plan_encoding
from .input_rows import (
    ImageRows,
    InputRows,
    TextRows,
    index_images,
    index_texts,
    require_inputs,
)
from .shard_computation import ShardWork, compute_partition, open_stops
from .shard_encoding import ShardEncoder, is_teaching, load_shard_encoder
from .sharded_writer import describe_missing, read_begun
from .store_writer import StoreWriter, begin_store


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
    """Store the embeddings of all captions or images, or resume storing them.

    The embeddings are for `align`, so they are taken before the text adapter and projections. Only
    the tower in use is loaded. With a CLIP or SigLIP model, the teacher of `align`, the store holds
    that model's unit embeddings of the captions instead, with zeros for captions over the model's
    maximum length.

    Args:
        source: Folder or Hub id of an LLM2CLIP model, or a loaded (model, processor); with
            `modality="text"` also a model like CLIP or SigLIP.
        data: Records; item i of the store is record i.
        output: Folder for the store: new, empty, or an unfinished store of the same run, which
            resumes.
        config: Options; None for the defaults. `sentence_views` applies only to captions,
            `jpeg_decoding` only to images.
        modality: What to extract: text or image.
        partition: Which part of the store to compute, such as 2/8 for the second of eight; the
            last part to finish completes the store. None for all of it.
        engine: Where to compute the shards: in the processes of this run, or in the actors of a
            Ray cluster that sees the same files.

    Returns:
        `output`.

    Raises:
        ValueError: No captions or images; `output` is a store of another model, prompt, dataset or
            option (the message shows both values); or there is no such partition.
        DataValidationError: Images cannot be decoded. The first one triggers a check that names
            all of them. Repair or remove them, and extract into a new folder.
        FileExistsError: `output` holds other files.
        OSError: `output` is not writable (checked before anything is read), or the disk is full
            (finished shards stay).
        StageInterrupt: SIGINT or SIGTERM stopped the extraction after a batch.
        RuntimeError: A Ray actor failed repeatedly.

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
    """Compute a planned store and return its folder. Errors call the data `source`."""
    config, modality, output = plan.config, plan.modality, plan.output
    records = RecordTable.from_records(data)
    require_inputs(records, modality)
    if modality == "text":
        require_views(records, config.sentence_views)
    device = choose_device(config.device)
    with open_stops(plan.engine) as stop, open_source(plan.source, output) as model:
        require_own_model(model.folder, or_teacher=modality == "text")
        encoder = load_shard_encoder(model.folder, modality, config, device)
        planned = plan_store(model.folder, records, encoder, config, modality)
        with PartialState().main_process_first():
            if not planned.is_begun(output):
                begin_store(output, planned, index_records(records, planned))
            begun = read_begun(output, planned)
        writer = StoreWriter(output, begun)
        work = ShardWork(writer, encoder, open_rows(output, begun, records))
        compute_partition(plan, work, model.folder, stop=stop, source=source)
    if not writer.list_missing():
        EmbeddingStore.open(output, check="full" if begun.complete else "fast")
    return output


def describe_extraction(store: Path) -> list[str]:
    """Return lines that describe a store, for a terminal."""
    manifest = StoreManifest.read(store)
    if missing := describe_missing(store, manifest):
        return missing
    inputs = "image" if manifest.content == VISION_EMBEDS else "caption"
    word = "too long" if manifest.content == TEACHER_TEXT_EMBEDS else "truncated"
    truncated = f", {manifest.num_truncated:,} {word}" * (inputs == "caption")
    return [
        f"Wrote {store}: {counted(manifest.num_rows, 'embedding')} of {manifest.dim} dimensions "
        f"for {counted(manifest.num_inputs, inputs)} of {counted(manifest.num_items, 'record')}"
        f"{truncated}."
    ]


def open_rows(folder: Path, manifest: StoreManifest, records: RecordTable) -> InputRows:
    """Open the captions or images of a store whose manifest exists."""
    if manifest.content == VISION_EMBEDS:
        return ImageRows(records)
    num_views = read_num_views(manifest.plan)
    counts = StoreIndex(folder, manifest).iterate_counts()
    return TextRows(records, manifest.rows_per_shard, counts=counts, num_views=num_views)


def index_records(records: RecordTable, planned: StoreManifest) -> Iterator[pa.RecordBatch]:
    """Yield the index of a planned store."""
    if planned.content == VISION_EMBEDS:
        return index_images(records)
    return index_texts(records, planned.rows_per_shard, read_num_views(planned.plan))


def plan_store(
    folder: Path,
    records: RecordTable,
    encoder: ShardEncoder,
    config: ExtractConfig,
    modality: Modality,
) -> StoreManifest:
    """Make the manifest of a store, without the counts of its items."""
    causes = {"data": hash_texts(records)}
    if modality == "image":
        causes["images"] = hash_images(records)
    else:
        causes |= describe_views(config.sentence_views)
    content, fingerprint = {
        "text": (CAPTION_EMBEDS, fingerprint_text), "image": (VISION_EMBEDS, fingerprint_vision),
    }[modality]  # fmt: skip
    is_teacher = is_teaching(folder, modality, config)
    return StoreManifest(
        content=TEACHER_TEXT_EMBEDS if is_teacher else content,
        fingerprint=(
            fingerprint_teacher(folder)
            if is_teacher
            else fingerprint(folder, encoder.encoder.processor)
        ),
        dtype=config.store_dtype,
        dim=encoder.dim,
        rows_per_shard=config.rows_per_shard,
        plan={**causes, **encoder.plan},
    )
