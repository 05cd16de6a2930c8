"""Embedding store: what was written is read, damage is found and named."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from stores import change_manifest, count_written_batches, list_complete_shards
from torch import Tensor

from modeling_llm2clip.data.records import record_columns
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store import store_index
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.embedding_store_writer import (
    EmbeddingStoreWriter,
    StoreItems,
    plan_manifest,
)
from modeling_llm2clip.data.store.store_index import make_batch, write_index
from modeling_llm2clip.data.store.store_manifest import ShardRecord, StoreManifest, read_manifest

NUM_ROWS, DIM, ROWS_PER_SHARD = 23, 5, 8
# Images with 5, 6 and 7 captions, of 0, 1 and 2 long ones; captions are shared.
SHORT = [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13, 0], [2, 5, 8, 11, 14, 17, 20]]
LONG = [[], [22], [21, 22]]
FINGERPRINT = {"weights": "aa", "prompt": "prefix [1]", "pooling": "mean"}
TABLE = RecordTable.from_records(
    CaptionedImage(None, name, group_id, ())
    for name, group_id in (("a.png", "dog"), ("ä/b.png", ""), ("c.png", "猫"))
)
# Batches of a shard of eight rows, and of the last one of seven, in another order than the rows.
BATCHES = [np.array([7, 2, 0]), np.array([5]), np.array([1, 3, 4, 6])]


def list_items(_: Path) -> StoreItems:
    rows = [[*short, *long] for short, long in zip(SHORT, LONG, strict=True)]
    ends = np.cumsum([0, *map(len, rows)])
    [records] = TABLE.iterate_columns(("name", "group_id", "lang", "key", "group_key"))
    flat = np.array([row for of_item in rows for row in of_item])
    batch = make_batch(records, np.array([len(short) for short in SHORT]), ends, flat)
    return StoreItems(NUM_ROWS, 3, {"captions": 21}, iter([batch]))


def make_plan(**changes: object) -> StoreManifest:
    manifest = plan_manifest(
        "caption_embeds",
        fingerprint=FINGERPRINT,
        dtype="float32",
        dim=DIM,
        rows_per_shard=ROWS_PER_SHARD,
        plan={"data": "bb"},
    )
    return replace(manifest, **changes)  # type: ignore[arg-type]


def make_embeddings(seed: int = 0) -> Tensor:
    return torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(seed))


def open_writer(folder: Path, **changes: object) -> EmbeddingStoreWriter:
    return EmbeddingStoreWriter.open(folder, make_plan(**changes), list_items)


def list_batches(shard: int) -> list[np.ndarray]:
    return BATCHES if shard < 2 else [places[places < 7] for places in BATCHES]


def write_shard(
    writer: EmbeddingStoreWriter, shard: int, embeddings: Tensor, *, most: int = 9
) -> int:
    """Write a shard, or the first of the batches that it lacks; returns how many it had."""
    first = writer.manifest.rows_of_shard(shard).start
    batches = list_batches(shard)
    with writer.open_shard(shard, batches) as written:
        had = written.num_done
        for places in batches[had : had + most]:
            written.write(embeddings[first + places])
        if written.num_done == len(batches):
            written.seal(num_truncated=shard)
    return had


def write_store(
    folder: Path, embeddings: Tensor, *, shards: tuple[int, ...] = (0, 1, 2), **changes: object
) -> Path:
    writer = open_writer(folder, **changes)
    for shard in shards:
        write_shard(writer, shard, embeddings)
    if not writer.list_missing():
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
    stored = embeddings.to(getattr(torch, dtype))
    assert torch.equal(read, stored.float())
    as_stored = opened.read(range(NUM_ROWS), dtype=None)
    assert as_stored.dtype == stored.dtype and torch.equal(as_stored, stored)
    assert opened.manifest.counts == {"captions": 21, "truncated": 0 + 1 + 2}


def test_a_shard_is_a_safetensors_file_that_other_programs_read(store: Path) -> None:
    found = load_file(store / "shard-00001.safetensors")
    assert np.array_equal(found["embeddings"], make_embeddings()[8:16].numpy())
    assert found["checksums"].shape == (8,)


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


def read_all(store: EmbeddingStore) -> list[object]:
    """Everything that a store can be asked for."""
    items = range(len(store))
    numbers = np.concatenate([np.arange(n) for n in np.add(*store.count_rows())])
    repeated = np.repeat(np.arange(len(store)), np.add(*store.count_rows()))
    return [
        store.read(range(NUM_ROWS)).numpy().tobytes(),
        [(store.rows_of(i).tolist(), store.rows_of(i, long=True).tolist()) for i in items],
        store.rows_at(repeated, numbers).tolist(),
        (list(store.names), list(store.group_ids), list(store.langs)),
        (store.keys.tolist(), store.group_keys.tolist()),
        (store.manifest.counts, store.manifest.fingerprint, store.manifest.plan),
    ]


@pytest.mark.parametrize("check", ["fast", "full"])
def test_whatever_byte_is_changed_the_store_is_refused_or_reads_the_same(
    store: Path, check: str
) -> None:
    """Hundreds of changes in each file: one bit, one byte, zeros, and a swap of two pieces."""
    wanted = read_all(EmbeddingStore.open(store))
    generator = random.Random(0)
    num_refused = 0
    for file in sorted(store.iterdir()):
        whole = file.read_bytes()
        for number in range(150):
            content, place = bytearray(whole), generator.randrange(len(whole))
            if number % 4 == 0:
                content[place] ^= 1 << generator.randrange(8)
            elif number % 4 == 1:
                content[place] = generator.randrange(256)
            elif number % 4 == 2:
                content[place : place + 16] = bytes(len(content[place : place + 16]))
            else:
                other = generator.randrange(len(whole) - 4)
                piece = content[other : other + 4]
                content[other : other + 4] = content[place : place + 4].ljust(4, b"x")
                content[place : place + 4] = piece[: len(content[place : place + 4])]
            file.write_bytes(content)
            try:
                found = read_all(EmbeddingStore.open(store, check=check))  # type: ignore[arg-type]
            except ValueError as error:
                assert "damaged" in str(error) or "format_version" in str(error)
                num_refused += 1
            else:
                assert found == wanted, (file, number)
        file.write_bytes(whole)
    assert num_refused > 4 * 150
    assert read_all(EmbeddingStore.open(store)) == wanted


def test_a_flipped_byte_of_a_row_is_found_when_it_is_read_and_its_file_named(store: Path) -> None:
    name = "shard-00002.safetensors"
    flip_byte(store / name, -1)  # of row 22
    opened = EmbeddingStore.open(store)
    assert torch.equal(opened.read([0, 15]), make_embeddings()[[0, 15]])
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"1 rows are damaged, among them \[22\], in {name}"):
            opened.read([3, 22, 1])
    with pytest.raises(ValueError, match=rf"1 damaged files: {name}: SHA-256"):
        EmbeddingStore.open(store, check="full")


def test_shards_of_each_other_and_of_another_store_of_the_same_shape_are_found(
    store: Path, tmp_path: Path
) -> None:
    other = write_store(tmp_path / "other", make_embeddings(seed=1))
    first, second = store / "shard-00000.safetensors", store / "shard-00001.safetensors"
    assert first.stat().st_size == second.stat().st_size
    whole = first.read_bytes()
    for changed in (second, other / first.name):
        shutil.copy(changed, first)
        with pytest.raises(ValueError, match=r"shard-00000.* damaged, or belongs to another store"):
            EmbeddingStore.open(store).read([0])
        first.write_bytes(whole)
    shutil.copy(other / "index.arrow", store / "index.arrow")  # of the same items
    assert read_all(EmbeddingStore.open(store))
    shutil.copy(other / "manifest.json", store / "manifest.json")
    with pytest.raises(ValueError, match="belongs to another store"):
        EmbeddingStore.open(store).read([0])


def test_a_row_is_checked_once_in_a_process_and_its_workers(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modeling_llm2clip.data.store import store_shards

    hashed: list[int] = []
    compute = store_shards.compute_checksums
    monkeypatch.setattr(
        store_shards,
        "compute_checksums",
        lambda rows, places: hashed.append(len(places)) or compute(rows, places),
    )
    opened = EmbeddingStore.open(store)
    opened.read([1, 9, 20])
    opened.read([20, 1, 2])
    assert hashed == [3, 1]
    worker = pickle.loads(pickle.dumps(opened))
    assert torch.equal(worker.read([9, 2, 3]), make_embeddings()[[9, 2, 3]])
    assert hashed == [3, 1, 1]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [_truncate, _lengthen, Path.unlink])
@pytest.mark.parametrize("name", ["shard-00001.safetensors", "index.arrow"])
def test_a_file_of_another_size_is_found_on_opening(
    store: Path, damage: Callable[[Path], None], name: str
) -> None:
    damage(store / name)
    with pytest.raises(ValueError, match=rf"1 damaged files: .*{name}"):
        EmbeddingStore.open(store)


def test_every_damaged_file_is_named_at_once(store: Path) -> None:
    _truncate(store / "shard-00001.safetensors")
    (store / "shard-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"2 damaged files: .*00001.*00002"):
        EmbeddingStore.open(store)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2, this code reads 3"),
        ({"content": "audio"}, "content is 'audio'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"shards": []}, "do not make up its rows"),
        ({"color": "red"}, "damaged.*color"),
        ({"dim": "five"}, "damaged"),
        ({"num_items": 70_000}, "does not have the 70000 items"),
    ],
)
def test_a_manifest_of_another_format_or_an_impossible_one_is_refused(
    store: Path, changes: dict[str, object], message: str
) -> None:
    change_manifest(store, **changes)
    with pytest.raises(ValueError, match=message):
        EmbeddingStore.open(store)


def test_an_edited_manifest_is_refused(store: Path) -> None:
    file = store / "manifest.json"
    edited = {**json.loads(file.read_text()), "fingerprint": {**FINGERPRINT, "weights": "bb"}}
    file.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: its content has the SHA-256"):
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
    assert names == ["index.arrow", "manifest.json",
                     *(f"shard-0000{i}.safetensors" for i in range(3))]  # fmt: skip


def test_left_over_files_do_not_disturb_and_are_removed(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", make_embeddings(), shards=(0,))
    (folder / "index-ab.tmp").mkdir()
    (folder / "index-ab.tmp" / "codes").write_bytes(b"part")
    for name in ("shard-00001.json.tmp", "manifest.json.ab.tmp"):
        (folder / name).write_bytes(b"part")
    (folder / "shard-00001.part").write_bytes(b"another size")
    (folder / "shard-00001.journal").write_bytes(b"no line of this shard\n")
    # A shard without its record and journal: it is written again.
    (folder / "shard-00002.safetensors").write_bytes(b"unnoted")
    write_store(folder, make_embeddings(), shards=(1, 2))
    assert torch.equal(EmbeddingStore.open(folder, check="full").read(range(23)), make_embeddings())
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("most", [1, 2])
def test_a_shard_continues_after_its_last_batch_and_has_the_same_bytes(
    store: Path, tmp_path: Path, most: int
) -> None:
    folder = tmp_path / "interrupted"
    for shard in range(3):
        had = [write_shard(open_writer(folder), shard, make_embeddings(), most=most)]
        while not open_writer(folder).is_done(shard):
            had.append(write_shard(open_writer(folder), shard, make_embeddings(), most=most))
        assert had == list(range(0, 3, most))  # nothing is written twice
    open_writer(folder).finish()
    for file in store.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("part", ["part", "journal"])
@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_that_the_disk_lost_is_written_again(
    store: Path, tmp_path: Path, part: str, batch: int
) -> None:
    """After a power failure a journal may have lines of rows that never came to the disk."""
    folder = tmp_path / "interrupted"
    write_shard(open_writer(folder), 0, make_embeddings(), most=2)
    assert count_written_batches(folder) == 2
    if part == "journal":
        flip_byte(folder / "shard-00000.journal", batch * 65 + 3)
    else:
        size = DIM * 4
        flip_byte(folder / "shard-00000.part", -8 * size + int(BATCHES[batch][-1]) * size)
    assert write_shard(open_writer(folder), 0, make_embeddings()) == batch
    name = "shard-00000.safetensors"
    assert (folder / name).read_bytes() == (store / name).read_bytes()


@pytest.mark.parametrize("moment", ["renamed", "noted"])
def test_a_run_that_is_killed_while_it_completes_a_shard_loses_nothing(
    tmp_path: Path, moment: str
) -> None:
    folder = tmp_path / "killed"
    write_shard(open_writer(folder), 0, make_embeddings(), most=2)
    journal = (folder / "shard-00000.journal").read_bytes()
    write_shard(open_writer(folder), 0, make_embeddings())
    (folder / "shard-00000.journal").write_bytes(journal)
    if moment == "renamed":
        (folder / "shard-00000.json").unlink()
        assert not open_writer(folder).is_done(0)
        assert write_shard(open_writer(folder), 0, make_embeddings()) == 2
    write_store(folder, make_embeddings(), shards=(1, 2))
    assert torch.equal(EmbeddingStore.open(folder).read(range(23)), make_embeddings())


def test_a_store_with_missing_or_damaged_shards_is_not_completed(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", make_embeddings(), shards=(0, 1))
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing, among them \[2\]"):
        open_writer(folder).finish()
    write_shard(open_writer(folder), 2, make_embeddings())
    flip_byte(folder / "shard-00001.safetensors", 40)
    (folder / "shard-00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"2 damaged files: shard-00000.*missing; shard-00001"):
        open_writer(folder).finish()
    assert not read_manifest(folder).complete


def test_runs_that_begin_one_store_at_once_agree_on_it(tmp_path: Path) -> None:
    def begin_another(scratch: Path) -> StoreItems:
        open_writer(scratch.parent)
        return list_items(scratch)

    writer = EmbeddingStoreWriter.open(tmp_path / "store", make_plan(), begin_another)
    assert writer.manifest == open_writer(tmp_path / "store").manifest
    assert sorted(file.name for file in writer.folder.iterdir()) == ["index.arrow", "manifest.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "stored dtype: 'float32' in the store, 'float16' now"),
        ({"rows_per_shard": 4}, r"rows per shard \(max_shard_size\): 8 in the store, 4 now"),
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


def test_many_items_are_found_at_once_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (record_columns, store_index):
        monkeypatch.setattr(module, "ROWS_PER_BATCH", 7)
    monkeypatch.setattr("modeling_llm2clip.data.records.record_table.ROWS_PER_BATCH", 7)
    table = RecordTable.from_records(
        CaptionedImage(None, f"{n}", f"{n // 2}", ("x",) * (1 + n % 3), ("y",) * (n % 2))
        for n in range(40)
    )
    short, long = table.count_texts()
    starts = np.cumsum(short + long) - short - long

    def list_many(_: Path) -> StoreItems:
        first = 0
        batches = []
        for batch in table.iterate_columns(("name", "group_id", "lang", "key", "group_key")):
            places = slice(first, first + batch.num_rows)
            ends = np.concatenate([[0], np.cumsum((short + long)[places])])
            rows = (np.arange(ends[-1]) + starts[first])[::-1] * 10
            batches.append(make_batch(batch, short[places], ends, rows))
            first += batch.num_rows
        return StoreItems(1000, len(table), {}, iter(batches))

    writer = EmbeddingStoreWriter.open(tmp_path / "store", make_plan(), list_many)
    index = store_index.StoreIndex(writer.folder, writer.manifest.index, len(table))
    assert index.num_batches == 6
    counts = zip(*index.iterate_counts(), strict=True)
    assert [np.concatenate(c).tolist() for c in counts] == [short.tolist(), long.tolist()]
    assert np.array_equal(np.concatenate([*index.iterate_numbers("key")]), table.keys)
    assert np.array_equal(np.concatenate([*index.iterate_numbers("group_key")]), table.group_keys)
    generator = np.random.default_rng(0)
    items = generator.integers(0, 40, 200)
    numbers = generator.integers(0, (short + long)[items])
    wanted = [
        [*index.rows_of(item, long=False), *index.rows_of(item, long=True)][number]
        for item, number in zip(items.tolist(), numbers.tolist(), strict=True)
    ]
    assert index.rows_at(items, numbers).tolist() == wanted
    assert len(set(wanted)) > 50
    for item, number in ((3, int(short[3] + long[3])), (39, -1), (40, 0), (-1, 0)):
        with pytest.raises(IndexError, match=f"{item}"):
            index.rows_at(np.array([0, item]), np.array([0, number]))


@pytest.mark.slow
def test_a_store_of_100_million_rows_is_completed_and_opened_in_seconds(tmp_path: Path) -> None:
    """1,526 shards of 65,536 rows; their files are sparse, as nothing of them is read but heads."""
    from modeling_llm2clip.data.store.store_shards import make_header

    folder, dim, per_shard, num_rows = tmp_path / "store", 4096, 2**16, 100_000_000

    def list_few(_: Path) -> StoreItems:
        return replace(list_items(_), num_rows=num_rows)

    plan = make_plan(dtype="float16", dim=dim, rows_per_shard=per_shard)
    writer = EmbeddingStoreWriter.open(folder, plan, list_few)
    write_sparse_shards(writer, make_header)
    began = time.monotonic()
    writer.finish()
    finished = time.monotonic()
    opened = EmbeddingStore.open(folder)
    seconds = [finished - began, time.monotonic() - finished]
    assert opened.manifest.num_rows == num_rows and len(opened.manifest.shards) == 1526
    assert max(seconds) < 5, seconds


def write_sparse_shards(
    writer: EmbeddingStoreWriter, make_header: Callable[[int, int, str], bytes]
) -> None:
    import hashlib
    from dataclasses import asdict

    from modeling_llm2clip.data.store.store_manifest import shard_file, shard_stem, write_sealed

    manifest = writer.manifest
    for shard in range(manifest.num_shards):
        rows = manifest.rows_of_shard(shard)
        head = make_header(len(rows), manifest.dim, manifest.dtype) + bytes(8 * len(rows))
        size = len(head) + len(rows) * manifest.row_bytes
        file = writer.folder / shard_file(shard)
        with file.open("wb") as opened:
            opened.write(head)
            opened.truncate(size)
        digest = hashlib.sha256(head).hexdigest()
        record = ShardRecord(file.name, rows.start, len(rows), size, "", digest, 0)
        (writer.folder / f"{shard_stem(shard)}.json").write_text(write_sealed(asdict(record)))


def test_an_index_has_checksums_of_all_of_its_bytes(tmp_path: Path) -> None:
    record = write_index(tmp_path / "index.arrow", list_items(tmp_path).batches)
    assert record.ends[-1] == record.bytes == (tmp_path / "index.arrow").stat().st_size
    assert len(record.sha256) == len(record.ends) == 2
    assert pa.ipc.open_file(tmp_path / "index.arrow").read_all().num_rows == 3
