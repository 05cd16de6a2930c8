"""Images that turn out to be unreadable while they are encoded: all are named, nothing is lost.

The first one ends the run. The images of all shards that are not complete are then decoded, so that
each is named. Complete shards stay, and once these images alone are repaired the output continues:
its bytes are those of an output that was begun with the repaired ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..data.atomic_files import write_atomically
from ..data.images.image_sources import (
    ImageSource,
    UnreadableImagesError,
    find_unreadable_images,
)
from ..data.records.data_hashes import hash_images
from ..data.records.record_table import RecordTable
from ..data.sealed_manifest import read_sealed, write_sealed
from ..data.store.store_manifest import StoreManifest
from ..data.validation_errors import ErrorCollector
from .embedding_manifest import EmbeddingManifest
from .sharded_writer import ShardedWriter

_NOTE = "_unreadable-images.json.tmp"  # removed with other leftovers of a complete output
_ADVICE = (
    "Complete files stay. Once these images are repaired, the same command continues; "
    "without their records it needs a new folder."
)
_Manifest = TypeVar("_Manifest", EmbeddingManifest, StoreManifest)


@contextmanager
def name_unreadable_images(
    records: RecordTable,
    read_inputs: Callable[[range], Sequence[Any]],
    *,
    source: str,
    num_rows: int = 0,
    writer: ShardedWriter[Any] | None = None,
    show_progress: bool = False,
) -> Iterator[None]:
    """Raise DataValidationError for all unreadable images where the first one ends the encoding.

    `read_inputs` lists the images of rows of the output; `writer` is that of one that is begun,
    and where there is none yet, `num_rows` the number of its rows.
    """
    try:
        yield
    except UnreadableImagesError:
        errors = ErrorCollector()
        broken: set[ImageSource] = set()
        shards: list[int] = []  # that hold them
        rows = {0: range(num_rows)} if writer is None else _find_missing(writer)
        for shard, part in rows.items():
            unreadable = find_unreadable_images(read_inputs(part), show_progress=show_progress)
            broken.update(unreadable)
            shards += [shard] if unreadable else []
            for error in unreadable.values():
                errors.add("image unreadable", error)
        if writer is not None and writer.manifest.plan["images"] == hash_images(records):
            _note(records, broken, shards, writer.folder)
        errors.raise_if_any(source, advice=_ADVICE)
        raise  # such as a size that the image processor refuses


def _find_missing(writer: ShardedWriter[Any]) -> dict[int, range]:
    return {shard: writer.manifest.rows_of_shard(shard) for shard in writer.list_missing()}


def _note(
    records: RecordTable, broken: Collection[ImageSource], shards: list[int], output: Path
) -> None:
    is_broken = np.fromiter((image in broken for image in records.iterate_images()), bool)
    names = {name for batch in records.select(is_broken).iterate_columns(("name",))
             for name in batch.column(0).to_pylist()}  # fmt: skip
    note = {"images": sorted(names), "shards": shards, "others": _hash_others(records, names)}
    write_atomically(output / _NOTE, write_sealed(note).encode())


def _hash_others(records: RecordTable, names: Collection[str]) -> str:
    is_other = np.fromiter(
        (
            name not in names
            for batch in records.iterate_columns(("name",))
            for name in batch.column(0).to_pylist()
        ),
        bool,
    )
    return hash_images(records.select(is_other)) if is_other.any() else ""


def accept_repairs(
    planned: _Manifest,
    records: RecordTable,
    output: Path,
    open_writer: Callable[[_Manifest], ShardedWriter[_Manifest]],
) -> None:
    """Let an output continue with repaired images, if no other image has changed since."""
    if "images" not in planned.plan or not (output / _NOTE).is_file():
        return
    try:
        note = read_sealed((output / _NOTE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{output / _NOTE} is damaged ({error}), so that {output} cannot take the repaired "
            "images. Name a new folder."
        ) from error
    begun = planned.read(output)
    plan: dict[str, str] = {**begun.plan, "images": planned.plan["images"]}
    writer = open_writer(replace(begun, plan=plan))
    # A repaired image that a complete shard holds by now, or left out, may have changed since.
    was_encoded = not writer.find_records().keys().isdisjoint(note["shards"])
    is_repaired = note["others"] == _hash_others(records, note["images"])
    if plan != begun.plan and is_repaired and not was_encoded:
        writer.renew()
