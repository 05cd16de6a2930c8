"""Writes small embedding stores, and inspects incomplete ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from modeling_llm2clip.data.atomic_files import hash_file
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.sealed_manifest import read_sealed, write_sealed
from modeling_llm2clip.data.store.store_index import make_batch
from modeling_llm2clip.data.store.store_manifest import MANIFEST_FILE, StoreManifest
from modeling_llm2clip.embedding.sharded_writer import read_begun
from modeling_llm2clip.embedding.store_writer import StoreWriter, begin_store

NUM_ROWS, DIM, ROWS_PER_SHARD = 23, 5, 8
# Images with 5, 6 and 7 captions, of 0, 1 and 2 long ones; captions are shared.
SHORT = [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13, 0], [2, 5, 8, 11, 14, 17, 20]]
LONG = [[], [22], [21, 22]]
FINGERPRINT = {"weights": "aa", "prompt": "prefix [1]", "pooling": "mean"}
TABLE = RecordTable.from_records(
    CaptionedImage(None, name, group_id, ())
    for name, group_id in (("a.png", "dog"), ("ä/b.png", ""), ("c.png", "猫"))
)


def make_index() -> pa.RecordBatch:
    rows = [[*short, *long] for short, long in zip(SHORT, LONG, strict=True)]
    ends = np.cumsum([0, *map(len, rows)])
    [records] = TABLE.iterate_columns(("name", "group_id", "lang", "key", "group_key", "text_keys"))
    flat = np.array([row for of_item in rows for row in of_item])
    return make_batch(records, np.array([len(short) for short in SHORT]), ends, flat)


def make_plan(**changes: object) -> StoreManifest:
    manifest = StoreManifest(
        content="caption_embeds",
        fingerprint=FINGERPRINT,
        dtype="float32",
        dim=DIM,
        rows_per_shard=ROWS_PER_SHARD,
        plan={"data": "bb"},
    )
    return replace(manifest, **changes)  # type: ignore[arg-type]


def make_embeddings(seed: int = 0) -> Tensor:
    return torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(seed))


def open_writer(folder: Path, **changes: object) -> StoreWriter:
    planned = make_plan(**changes)
    if not planned.is_begun(folder):
        begin_store(folder, planned, [make_index()])
    return StoreWriter(folder, read_begun(folder, planned))


def write_shard(writer: StoreWriter, shard: int, embeddings: Tensor) -> None:
    writer.write(shard, embeddings.split(ROWS_PER_SHARD)[shard], num_truncated=shard)


def write_store(
    folder: Path, embeddings: Tensor, *, shards: tuple[int, ...] = (0, 1, 2), **changes: object
) -> Path:
    writer = open_writer(folder, **changes)
    for shard in shards:
        write_shard(writer, shard, embeddings)
    if not writer.list_missing():
        writer.finish()
    return folder


def flip_byte(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def list_complete_shards(folder: Path) -> list[int]:
    """List the complete shards of an unfinished store, after checking every byte."""
    manifest = StoreManifest.read(folder)
    assert not manifest.complete
    shards = StoreWriter(folder, manifest).find_records()
    assert all(hash_file(folder / shard.file) == shard.sha256 for shard in shards.values())
    return sorted(shards)


def change_manifest(folder: Path, **changes: object) -> None:
    """Change entries of a manifest as the package would, with a matching hash."""
    file = folder / MANIFEST_FILE
    file.write_text(write_sealed({**read_sealed(file.read_text()), **changes}))
