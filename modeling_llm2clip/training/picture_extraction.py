"""Stage 2 for a frozen vision tower: pictures into a store of vectors, before the projection."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ..data.captioned_images import CaptionedImage, hash_records
from ..data.pictures import Picture
from ..data.vector_store_layout import StoreManifest
from ..data.vector_store_writing import StoreWriter
from ..encoding.fingerprint import fingerprint_vision
from ..encoding.pictures import default_batch_size, encode_pictures
from ..modeling_llm2clip import LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .picture_files import count_bytes, hash_picture_sizes
from .shard_work import (
    ExtractionArguments,
    ExtractionReport,
    StoreProgress,
    choose_device,
    fill_store,
    pack_records,
)
from .stopping import StopRequest

_FAULTS_SHOWN = 5


def extract_pictures(
    model_folder: str | Path,
    records: Sequence[CaptionedImage],
    output: str | Path,
    arguments: ExtractionArguments | None = None,
    *,
    stop: StopRequest | None = None,
) -> ExtractionReport:
    """Compute the vectors of all pictures into a store, or go on with one.

    Only the picture half of the model is loaded. Records in several languages share the row of
    their picture. Arguments and errors as `extract_captions`; a picture that is missing or broken
    raises ValueError, and whole shards stay. So does one of another size in bytes than in an
    earlier run, and a name that stands for two pictures.
    """
    arguments = arguments or ExtractionArguments()
    device = choose_device(arguments)
    pictures = _list_pictures(records)
    row_of = {name: row for row, name in enumerate(pictures)}
    index = pack_records(
        records, short=[[row_of[r.name]] for r in records], long=[[] for _ in records]
    )
    processor = LLM2CLIPProcessor.from_pretrained(model_folder)
    model = LLM2CLIPVisionModel.from_pretrained(model_folder)
    fingerprint = fingerprint_vision(model_folder)
    model = model.to(device)
    batch_size = arguments.batch_size or default_batch_size(device)
    manifest = StoreManifest(
        kind="vision_embeds",
        fingerprint=fingerprint,
        dtype=arguments.dtype,
        dim=model.visual_projection.in_features,
        num_rows=len(pictures),
        num_items=len(records),
        rows_per_shard=arguments.rows_per_shard,
        plan={
            "data": hash_records(records),
            "pictures": hash_picture_sizes(records),
            "batch_size": str(batch_size),
        },
        counts={"pictures": len(records), "distinct": len(pictures)},
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    in_order = list(pictures.values())

    def compute(rows: range, tell: Callable[[int], object]) -> Tensor:
        return encode_pictures(
            model,
            processor,
            in_order[rows.start : rows.stop],
            batch_size=batch_size,
            num_workers=arguments.num_workers,
            on_batch=tell,
        )

    writer = StoreWriter.open(output, manifest, index)
    progress = StoreProgress(writer, unit=" pictures", shown=arguments.show_progress)
    return fill_store(writer, compute, stop=stop, progress=progress)


def _list_pictures(records: Sequence[CaptionedImage]) -> dict[str, Picture]:
    """Pictures by name, each once, in the order of the records."""
    if not records:
        raise ValueError("There are no pictures. Give a data set with at least one.")
    if without := [record.name for record in records if record.picture is None]:
        raise ValueError(
            f"{len(without)} records have no picture: {without[:_FAULTS_SHOWN]}. Read the data set "
            "with its pictures."
        )
    pictures: dict[str, Picture] = {}
    unlike: dict[str, None] = {}
    for record in records:
        assert record.picture is not None
        first = pictures.setdefault(record.name, record.picture)
        if first != record.picture and not _hold_the_same(first, record.picture):
            unlike[record.name] = None
    if unlike:
        raise ValueError(
            f"{len(unlike)} names stand for several pictures: {list(unlike)[:_FAULTS_SHOWN]}. Give "
            "every picture a name of its own; several languages may share one."
        )
    return pictures


def _hold_the_same(one: Picture, other: Picture) -> bool:
    """Whether two places hold the same bytes, as they do in shards with a member a language."""
    if count_bytes(one) != count_bytes(other):
        return False
    return one.read_bytes() == other.read_bytes()
