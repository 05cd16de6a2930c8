"""Writer of an embedding store: it goes on where it was killed, and completes what is whole."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from stores import (
    BATCHES,
    DIM,
    FINGERPRINT,
    NUM_ROWS,
    count_written_batches,
    flip_byte,
    list_complete_shards,
    list_items,
    make_embeddings,
    make_plan,
    open_writer,
    write_shard,
    write_store,
)

from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_manifest import ShardRecord, StoreManifest
from modeling_llm2clip.embedding.embedding_store_writer import EmbeddingStoreWriter, StoreItems


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


def test_a_shard_that_another_run_writes_is_refused_and_left_as_it_is(
    store: Path, tmp_path: Path
) -> None:
    folder, embeddings = tmp_path / "busy", make_embeddings()
    with open_writer(folder).open_shard(0, BATCHES) as written:
        written.write(embeddings[BATCHES[0]])
        before = (folder / "shard-00000.part").read_bytes()
        with pytest.raises(ValueError, match=r"Another run writes shard 0 of 3 in .*busy now"):
            write_shard(open_writer(folder), 0, make_embeddings(seed=1))
        assert (folder / "shard-00000.part").read_bytes() == before
        assert count_written_batches(folder) == 1
        write_shard(open_writer(folder), 1, embeddings)  # others are free
        for places in BATCHES[1:]:
            written.write(embeddings[places])
        written.seal()
    name = "shard-00000.safetensors"
    assert (folder / name).read_bytes() == (store / name).read_bytes()


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
    assert not StoreManifest.read(folder).complete


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
    writer: EmbeddingStoreWriter, make_header: Callable[[int, StoreManifest], bytes]
) -> None:
    from dataclasses import asdict

    from modeling_llm2clip.data.store.store_manifest import write_sealed

    manifest = writer.manifest
    for shard in range(manifest.num_shards):
        rows = manifest.rows_of_shard(shard)
        head = make_header(len(rows), manifest) + bytes(8 * len(rows))
        size = len(head) + len(rows) * manifest.row_bytes
        file = writer.folder / manifest.name_shard(shard)
        with file.open("wb") as opened:
            opened.write(head)
            opened.truncate(size)
        digest = hashlib.sha256(head).hexdigest()
        record = ShardRecord(file.name, rows.start, len(rows), size, "", digest, 0)
        (writer.folder / manifest.name_record(shard)).write_text(write_sealed(asdict(record)))


def test_complete_shards_of_another_plan_are_refused_by_name(tmp_path: Path) -> None:
    """Same sizes, and whole: only the plan that each of them names differs."""
    ours = write_store(tmp_path / "ours", make_embeddings(), shards=(0, 1))
    changes = {"plan": {"data": "cc"}}
    theirs = write_store(tmp_path / "theirs", make_embeddings(seed=1), shards=(2,), **changes)
    for name in ("shard-00002.safetensors", "shard-00002.json"):
        shutil.copy(theirs / name, ours)
    writer = open_writer(ours)
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: it is of another store"):
        writer.finish()
    for name in ("shard-00002.safetensors", "shard-00002.json"):
        (ours / name).unlink()
    write_store(ours, make_embeddings(), shards=(2,))
    assert torch.equal(EmbeddingStore.open(ours, check="full").read(range(23)), make_embeddings())


def test_every_shard_says_which_plan_it_is_of(store: Path) -> None:
    plan = StoreManifest.read(store).hash_plan()
    for file in store.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"plan": plan}
            assert opened.get_tensor("embeddings").shape[1] == DIM


def hash_bytes(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        ("float32", "726b884cc70b0519201ccdec240fcea7fa6d2bbccbfd53b8ed9347610373d0fd"),
        ("float16", "c746ed084ed7f12090e6a15afa2299981d02734f5ce659d25fe7153da8cd554d"),
        ("bfloat16", "289e57d5a2bfa6b2607e521ebfc6251e5fd10a75d74e64c2c82d1aa817f7c9e6"),
    ],
)
def test_shards_have_the_bytes_of_their_format(tmp_path: Path, dtype: str, digest: str) -> None:
    """So that a store that is begun is continued by any later version of the same format."""
    folder = write_store(tmp_path / "store", make_steps(), dtype=dtype)
    assert hash_bytes(*sorted(folder.glob("*.safetensors"))) == digest


def test_an_unfinished_shard_and_a_record_have_the_bytes_of_their_format(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "store")
    write_shard(writer, 0, make_steps(), most=2)
    write_shard(writer, 1, make_steps())
    assert {name: hash_bytes(writer.folder / name)[:16] for name in
            ("shard-00000.part", "shard-00000.journal", "shard-00001.json")} == {
        "shard-00000.part": "e6bbd5f6b6409277",
        "shard-00000.journal": "37baf41d9df59d09",
        "shard-00001.json": "71518cf95193d3bf",
    }  # fmt: skip


def make_steps() -> torch.Tensor:
    """Embeddings of eighths, which every dtype here rounds the same on any machine."""
    return torch.arange(NUM_ROWS * DIM, dtype=torch.float32).reshape(NUM_ROWS, DIM) / 8
