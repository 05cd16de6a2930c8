"""Looks into embedding stores that are not complete, and writes small ones."""

from __future__ import annotations

from pathlib import Path

from modeling_llm2clip.data.atomic_files import hash_file
from modeling_llm2clip.data.store.embedding_store_writer import find_complete_shards
from modeling_llm2clip.data.store.store_manifest import (
    MANIFEST_FILE,
    read_manifest,
    read_sealed,
    write_sealed,
)


def list_complete_shards(folder: Path) -> list[int]:
    """Numbers of the complete shards of an unfinished store, whose every byte is checked."""
    manifest = read_manifest(folder)
    assert not manifest.complete
    shards = find_complete_shards(folder, manifest)
    assert all(hash_file(folder / shard.file) == shard.sha256 for shard in shards)
    return [shard.first_row // manifest.rows_per_shard for shard in shards]


def change_manifest(folder: Path, **changes: object) -> None:
    """Change entries of a manifest as the package would, with the hash that fits them."""
    file = folder / MANIFEST_FILE
    file.write_text(write_sealed({**read_sealed(file.read_text()), **changes}))


def count_written_batches(folder: Path) -> int:
    """Batches that are noted in the journals of shards that are not complete."""
    return sum(len(file.read_bytes().splitlines()) for file in folder.glob("*.journal"))
