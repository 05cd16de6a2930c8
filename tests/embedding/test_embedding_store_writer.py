"""Writer of an embedding store: it goes on where it was killed, and completes what is whole."""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from stores import (
    DIM,
    FINGERPRINT,
    NUM_ROWS,
    flip_byte,
    list_complete_shards,
    list_items,
    make_embeddings,
    make_plan,
    open_writer,
    write_shard,
    write_store,
)

from modeling_llm2clip.data.sealed_manifest import write_sealed
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_manifest import ShardRecord, StoreManifest
from modeling_llm2clip.embedding.embedding_store_writer import EmbeddingStoreWriter, StoreItems
from modeling_llm2clip.embedding.extract import merge_store


def test_a_store_is_opened_when_it_is_complete_and_holds_nothing_but_its_files(
    store: Path, tmp_path: Path
) -> None:
    names = sorted(file.name for file in store.iterdir())
    assert names == ["index.arrow", "manifest.json",
                     *(f"shard-0000{i}.safetensors" for i in range(3))]  # fmt: skip
    folder = write_store(tmp_path / "part", make_embeddings(), shards=(0, 2))
    with pytest.raises(ValueError, match="not complete: 2 of 3 shards"):
        EmbeddingStore.open(folder)
    assert list_complete_shards(folder) == [0, 2]


def test_left_over_files_do_not_disturb_and_are_removed(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", make_embeddings(), shards=(0,))
    (folder / "index-ab.tmp").mkdir()
    (folder / "index-ab.tmp" / "codes").write_bytes(b"part")
    for name in ("shard-00001.json.tmp", "manifest.json.ab.tmp", "shard-00001.safetensors.tmp"):
        (folder / name).write_bytes(b"part")
    (folder / "_shard-00001.safetensors.lock").touch()
    # A run was killed before it wrote the record: the shard is written again.
    (folder / "shard-00002.safetensors").write_bytes(b"unnoted")
    assert not open_writer(folder).is_done(2)
    write_store(folder, make_embeddings(), shards=(1, 2))
    assert torch.equal(EmbeddingStore.open(folder, check="full").read(range(23)), make_embeddings())
    assert len(list(folder.iterdir())) == 5


def test_a_shard_that_another_run_computes_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "busy"
    with open_writer(folder).hold(0):
        with (
            pytest.raises(ValueError, match=r"Another run computes shard 0 of 3 in .*busy now"),
            open_writer(folder).hold(0),
        ):
            pass
        with open_writer(folder).hold(1):  # others are free
            pass
    with open_writer(folder).hold(0):
        pass
    assert not list(folder.glob("*.lock"))


def test_a_complete_store_that_lost_a_shard_computes_it_again(store: Path) -> None:
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    (store / "shard-00001.safetensors").unlink()
    writer = open_writer(store)
    assert writer.list_missing() == [1] and not writer.finish()
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing: 1\."):
        merge_store(store)
    write_store(store, make_embeddings(), shards=(1,))
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before


def test_a_store_with_missing_or_damaged_shards_is_not_completed(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", make_embeddings(), shards=(0, 1))
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing: 2\."):
        merge_store(folder)
    write_shard(open_writer(folder), 2, make_embeddings())
    for name in ("shard-00001.safetensors", "shard-00002.safetensors"):
        flip_byte(folder / name, 40)  # in the header
    with pytest.raises(ValueError, match=r"2 damaged files: .*shard-00001.*; .*shard-00002"):
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
def test_a_folder_with_another_store_or_other_files_is_refused(
    store: Path, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        open_writer(store, **changes)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        open_writer(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").exists()


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
    """12,500 shards; their files are sparse, as nothing of them is read but heads."""
    folder, dim, per_shard, num_rows = tmp_path / "store", 4096, 8000, 100_000_000

    def list_few(_: Path) -> StoreItems:
        return replace(list_items(_), num_rows=num_rows)

    plan = make_plan(dtype="float16", dim=dim, rows_per_shard=per_shard)
    writer = EmbeddingStoreWriter.open(folder, plan, list_few)
    write_sparse_shards(writer)
    began = time.monotonic()
    assert writer.finish()
    finished = time.monotonic()
    opened = EmbeddingStore.open(folder)
    seconds = [finished - began, time.monotonic() - finished]
    assert opened.manifest.num_rows == num_rows and len(opened.manifest.shards) == 12_500
    assert max(seconds) < 30, seconds


def write_sparse_shards(writer: EmbeddingStoreWriter) -> None:
    manifest = writer.manifest
    content, _ = writer.encode(0, torch.zeros(manifest.rows_per_shard, manifest.dim).half())
    head = content[: len(content) - manifest.rows_per_shard * manifest.row_bytes]
    for shard in range(manifest.num_shards):
        file = writer.folder / manifest.name_shard(shard)
        with file.open("wb") as opened:
            opened.write(head)
            opened.truncate(len(content))
        record = ShardRecord(file.name, manifest.rows_per_shard, len(content), "")
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


def test_a_record_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", make_embeddings(), shards=(0, 1))
    shutil.copy(folder / "shard-00001.json", folder / "shard-00000.json")
    with pytest.raises(ValueError, match=r"shard-00000\.json .*it describes shard-00001\.safe"):
        open_writer(folder).find_records()


def test_every_shard_says_which_plan_it_is_of(store: Path) -> None:
    plan = StoreManifest.read(store).hash_plan()
    for file in store.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"plan": plan}
            assert opened.get_tensor("embeddings").shape[1] == DIM


def test_shards_have_the_bytes_of_their_format(tmp_path: Path) -> None:
    """So that a store that is begun is continued by any later version of the same format."""
    # Eighths, which every dtype here rounds the same on any machine.
    steps = torch.arange(NUM_ROWS * DIM, dtype=torch.float32).reshape(NUM_ROWS, DIM) / 8
    for dtype, digest in {
        "float32": "e908245395d3113f",
        "float16": "8814bce86f339088",
        "bfloat16": "4432dcc46958e11c",
    }.items():
        folder = write_store(tmp_path / dtype, steps, dtype=dtype)
        content = b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))
        assert hashlib.sha256(content).hexdigest()[:16] == digest, dtype
