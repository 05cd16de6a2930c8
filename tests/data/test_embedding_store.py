"""Embedding store: what was written is read, damage is found and named."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import list_complete_shards
from torch import Tensor

from modeling_llm2clip.data.embedding_store import EmbeddingStore, StoreManifest
from modeling_llm2clip.data.embedding_store_writer import EmbeddingStoreWriter, pack_index

NUM_ROWS, DIM, ROWS_PER_SHARD = 23, 5, 8
# Images with 5, 6 and 7 captions, of 0, 1 and 2 long ones; captions are shared.
SHORT = [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13, 0], [2, 5, 8, 11, 14, 17, 20]]
LONG = [[], [22], [21, 22]]
FINGERPRINT = {"weights": "aa", "prompt": "prefix [1]", "pooling": "mean"}


def make_index() -> bytes:
    texts = {
        "names": ["a.png", "ä/b.png", "c.png"],
        "group_ids": ["dog", "", "猫"],
        "langs": ["en"] * 3,
    }
    return pack_index(texts, {"short": SHORT, "long": LONG})


def make_manifest(index: bytes, **changes: object) -> StoreManifest:
    manifest = StoreManifest(
        content="caption_embeds",
        fingerprint=FINGERPRINT,
        dtype="float32",
        dim=DIM,
        num_rows=NUM_ROWS,
        num_items=3,
        rows_per_shard=ROWS_PER_SHARD,
        plan={"data": "bb"},
        counts={"captions": 21},
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    return replace(manifest, **changes)  # type: ignore[arg-type]


def make_embeddings() -> Tensor:
    return torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(0))


def open_writer(folder: Path, **changes: object) -> EmbeddingStoreWriter:
    index = make_index()
    return EmbeddingStoreWriter.open(folder, make_manifest(index, **changes), index)


def write_store(
    folder: Path, embeddings: Tensor, *, shards: tuple[int, ...] = (0, 1, 2), **changes: object
) -> Path:
    writer = open_writer(folder, **changes)
    for shard in shards:
        with writer.claim(shard) as ours:
            assert ours
            rows = writer.manifest.rows_of_shard(shard)
            writer.write_shard(shard, embeddings[rows.start : rows.stop])
    writer.finish()
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", make_embeddings())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_read_is_what_was_written_rounded_to_its_dtype(tmp_path: Path, dtype: str) -> None:
    embeddings = make_embeddings()
    opened = EmbeddingStore.open(
        write_store(tmp_path / "store", embeddings, dtype=dtype), check="full"
    )
    read = opened.read(range(NUM_ROWS))
    assert read.dtype == torch.float32
    assert torch.equal(read, embeddings.to(getattr(torch, dtype)).float())


@given(st.lists(st.integers(0, NUM_ROWS - 1), max_size=40))
@settings(deadline=None, max_examples=50)
def test_rows_come_in_the_order_asked_for_and_as_often(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "shared-store"
    if not folder.exists():
        write_store(folder, make_embeddings())
    opened = EmbeddingStore.open(folder)
    expected = make_embeddings()[rows]
    for kind in (rows, np.array(rows, dtype=np.int32), torch.tensor(rows, dtype=torch.long)):
        assert torch.equal(opened.read(kind), expected)


def test_an_item_has_its_own_rows_however_many_they_are(store: Path) -> None:
    opened = EmbeddingStore.open(store)
    assert len(opened) == 3
    for item in range(3):
        assert opened.rows_of(item).tolist() == SHORT[item]
        assert opened.rows_of(item, long=True).tolist() == LONG[item]
        assert torch.equal(opened.read(opened.rows_of(item)), make_embeddings()[SHORT[item]])
    assert list(opened.names) == ["a.png", "ä/b.png", "c.png"]
    assert list(opened.group_ids) == ["dog", "", "猫"]
    assert opened.group_ids[-1] == "猫" and opened.names[1:] == ["ä/b.png", "c.png"]


@pytest.mark.parametrize("rows", [[-1], [0, NUM_ROWS], [0.0], [[1, 2]], [True]])
def test_numbers_that_are_not_rows_are_refused(store: Path, rows: list[object]) -> None:
    with pytest.raises(ValueError, match=r"(?i)row"):
        EmbeddingStore.open(store).read(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("item", [3, -4])
def test_items_that_the_store_does_not_have_are_refused(store: Path, item: int) -> None:
    opened = EmbeddingStore.open(store)
    for ask in (opened.rows_of, opened.names.__getitem__):
        with pytest.raises(IndexError, match=f"no item {item}"):
            ask(item)


def test_a_worker_process_gets_the_same_store(store: Path) -> None:
    opened = EmbeddingStore.open(store)
    again = pickle.loads(pickle.dumps(opened))
    assert torch.equal(again.read([3, 20]), opened.read([3, 20]))


def flip_byte(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["shard-00000.safetensors", "shard-00002.safetensors", "index.safetensors"]
)
def test_a_flipped_byte_is_found_by_the_full_check_and_its_file_named(
    store: Path, name: str
) -> None:
    flip_byte(store / name, -1)
    EmbeddingStore.open(store)  # sizes and headers are as before
    with pytest.raises(ValueError, match=rf"1 damaged files: {name}: SHA-256"):
        EmbeddingStore.open(store, check="full")


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def _break_header(file: Path) -> None:
    flip_byte(file, 9)


def _lie_about_the_header(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**60) + content[8:])


def _change_shape(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"[8,5]", b"[5,8]"))


@pytest.mark.parametrize(
    "damage",
    [_truncate, _lengthen, Path.unlink, _break_header, _lie_about_the_header, _change_shape],
)
def test_damage_to_size_or_header_is_found_on_opening(
    store: Path, damage: Callable[[Path], None]
) -> None:
    damage(store / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=r"1 damaged files: .*shard-00001\.safetensors"):
        EmbeddingStore.open(store)


def test_every_damaged_file_is_named_at_once(store: Path) -> None:
    _truncate(store / "shard-00001.safetensors")
    (store / "shard-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"2 damaged files: .*00001.*00002"):
        EmbeddingStore.open(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "format_version": 1}, "format_version 1, this code reads 2"),
        (lambda m: {**m, "content": "audio"}, "content is 'audio'"),
        (lambda m: {**m, "dtype": "int8"}, "dtype is 'int8'"),
        (lambda m: {**m, "shards": m["shards"][:2]}, "do not make up its rows"),
        (lambda m: {k: v for k, v in m.items() if k != "dim"}, r"lacks \['dim'\]"),
        (lambda m: {**m, "color": "red"}, "damaged .*color"),
        (lambda m: {**m, "dim": "five"}, "damaged"),
        (
            lambda m: {**m, "shards": [{**m["shards"][0], "file": "../x"}, *m["shards"][1:]]},
            "do not make up its rows",
        ),
        (lambda m: [m], "format_version None"),
    ],
)
def test_a_manifest_of_another_format_or_a_damaged_one_is_refused(
    store: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    file = store / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=message):
        EmbeddingStore.open(store)


def test_what_is_not_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no embedding store"):
        EmbeddingStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        EmbeddingStore.open(tmp_path)


def test_the_fingerprint_of_another_model_is_refused_with_both_values(store: Path) -> None:
    opened = EmbeddingStore.open(store)
    opened.require_fingerprint(FINGERPRINT)
    with pytest.raises(
        ValueError, match=r"pooling: 'mean' in the store, 'last_token' now"
    ) as caught:
        opened.require_fingerprint({**FINGERPRINT, "pooling": "last_token", "weights": "cc"})
    assert "weights: 'aa' in the store, 'cc' now" in str(caught.value)
    assert "prompt:" not in str(caught.value)


def test_an_incomplete_store_is_refused_and_keeps_its_complete_shards(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", make_embeddings(), shards=(0, 2))
    with pytest.raises(ValueError, match="not complete: 2 of 3 shards"):
        EmbeddingStore.open(folder)
    assert list_complete_shards(folder) == [0, 2]


def test_a_complete_store_holds_nothing_but_its_files(store: Path) -> None:
    names = sorted(file.name for file in store.iterdir())
    assert names == ["index.safetensors", "manifest.json",
                     *(f"shard-0000{i}.safetensors" for i in range(3))]  # fmt: skip


def test_left_over_files_do_not_disturb_and_are_removed(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", make_embeddings(), shards=(0,))
    left_over = ["shard-00001.safetensors.tmp", "shard-00001.json.tmp", "manifest.json.tmp"]
    for name in left_over:
        (folder / name).write_bytes(b"part")
    # A shard without its record was interrupted between the two files: it is written again.
    (folder / "shard-00002.safetensors").write_bytes(b"unnoted")
    write_store(folder, make_embeddings(), shards=(1, 2))
    assert torch.equal(EmbeddingStore.open(folder, check="full").read(range(23)), make_embeddings())
    assert not list(folder.glob("*.tmp"))


def test_two_writers_never_hold_the_same_shard(tmp_path: Path) -> None:
    one, other = open_writer(tmp_path / "store"), open_writer(tmp_path / "store")
    with one.claim(0) as ours, other.claim(0) as theirs, other.claim(1) as another:
        assert (ours, theirs, another) == (True, False, True)
    with other.claim(0) as ours:
        assert ours  # it was given up without being written
        other.write_shard(0, make_embeddings()[:8])
    with one.claim(0) as ours:
        assert not ours  # it is done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "stored dtype: 'float32' in the store, 'float16' now"),
        ({"rows_per_shard": 4}, "rows_per_shard: 8 in the store, 4 now"),
        ({"plan": {"data": "cc"}}, "data: 'bb' in the store, 'cc' now"),
        ({"fingerprint": {**FINGERPRINT, "prompt": "prefix []"}},
         r"prompt: 'prefix \[1\]' in the store, 'prefix \[\]' now"),
    ],
)  # fmt: skip
def test_a_folder_with_another_store_is_refused_with_both_values(
    store: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_writer(store, **changes)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        open_writer(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_embeddings_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    embeddings = make_embeddings()
    embeddings[9, 2] = 70000.0  # float16 ends at 65504
    with pytest.raises(ValueError, match=r"first in row 9; they do not fit .* store float32"):
        write_store(tmp_path / "half", embeddings, dtype="float16")
    embeddings[9, 2] = torch.nan
    with pytest.raises(ValueError, match=r"first in row 9; the model computes NaN or infinity"):
        write_store(tmp_path / "whole", embeddings)
