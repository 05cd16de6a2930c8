"""Embedding store: damage to any byte is detected and the file named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stores import FINGERPRINT, change_manifest, flip_byte, make_embeddings, write_store

from modeling_llm2clip.data.store.embedding_store import EmbeddingStore


def test_a_flipped_byte_is_detected_when_its_shard_is_read(store: Path) -> None:
    name = "shard-00002.safetensors"
    flip_byte(store / name, -1)  # of row 22
    opened = EmbeddingStore.open(store)
    assert torch.equal(opened.read([0, 15]), make_embeddings()[[0, 15]])
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"1 damaged file: {name}: SHA-256"):
            opened.read([3, 17, 1])
    with pytest.raises(ValueError, match=rf"1 damaged file: {name}: SHA-256"):
        EmbeddingStore.open(store, check="full")


def test_swapped_shards_and_those_of_another_store_of_equal_shape_are_detected(
    store: Path, tmp_path: Path
) -> None:
    other = write_store(tmp_path / "other", make_embeddings(seed=1))
    first, second = store / "shard-00000.safetensors", store / "shard-00001.safetensors"
    assert first.stat().st_size == second.stat().st_size
    whole = first.read_bytes()
    for changed in (second, other / first.name):
        shutil.copy(changed, first)
        with pytest.raises(ValueError, match=r"1 damaged file: shard-00000"):
            EmbeddingStore.open(store).read([0])
        first.write_bytes(whole)
    shutil.copy(other / "index.arrow", store / "index.arrow")  # of the same items
    assert EmbeddingStore.open(store).read([0]).any()
    shutil.copy(other / "manifest.json", store / "manifest.json")
    with pytest.raises(ValueError, match="1 damaged file: shard-00000"):
        EmbeddingStore.open(store).read([0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes() + b"\0"),
        Path.unlink,
    ],
)
def test_files_of_another_size_are_detected_on_opening(
    store: Path, damage: Callable[[Path], object]
) -> None:
    damage(store / "index.arrow")
    with pytest.raises(ValueError, match=r"1 damaged file: .*index\.arrow"):
        EmbeddingStore.open(store)
    for number in (1, 2):  # every one is named at once
        damage(store / f"shard-0000{number}.safetensors")
    with pytest.raises(ValueError, match=r"damaged file.*00001.*00002"):
        EmbeddingStore.open(store)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": 4},
            "format_version 4, but this version reads 6.*extract MODEL DATA",
        ),
        ({"color": "red"}, "damaged.*color"),
        ({"num_items": 70_000}, "does not contain the store's 70000 items"),
    ],
)
def test_a_manifest_of_another_format_or_an_impossible_one_is_refused(
    store: Path, changes: dict[str, object], message: str
) -> None:
    change_manifest(store, **changes)
    with pytest.raises(ValueError, match=message):
        EmbeddingStore.open(store)


def test_an_edited_broken_or_missing_manifest_is_refused(store: Path) -> None:
    file = store / "manifest.json"
    edited = {**json.loads(file.read_text()), "fingerprint": {**FINGERPRINT, "weights": "bb"}}
    file.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: its content has the SHA-256"):
        EmbeddingStore.open(store)
    file.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        EmbeddingStore.open(store)
    file.unlink()
    with pytest.raises(ValueError, match="has no embedding store"):
        EmbeddingStore.open(store)
