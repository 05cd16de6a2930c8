"""Looks into embedding stores that are not complete."""

from __future__ import annotations

from pathlib import Path

from modeling_llm2clip.data.atomic_files import hash_file
from modeling_llm2clip.data.embedding_store import read_manifest
from modeling_llm2clip.data.embedding_store_writer import find_complete_shards


def list_complete_shards(folder: Path) -> list[int]:
    """Numbers of the complete shards of an unfinished store, whose every byte is checked."""
    manifest = read_manifest(folder)
    assert not manifest.complete
    shards = find_complete_shards(folder, manifest)
    assert all(hash_file(folder / shard.file) == shard.sha256 for shard in shards)
    return [shard.first_row // manifest.rows_per_shard for shard in shards]
