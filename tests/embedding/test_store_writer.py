"""The store writer resumes after a kill, and completes only whole stores."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from stores import (
    DIM,
    FINGERPRINT,
    NUM_ROWS,
    list_complete_shards,
    make_embeddings,
    open_writer,
    write_shard,
    write_store,
)

from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_manifest import StoreManifest


def test_only_a_complete_store_opens_and_it_has_no_other_files(store: Path, tmp_path: Path) -> None:
    names = sorted(file.name for file in store.iterdir())
    assert names == ["index.arrow", "manifest.json",
                     *(f"shard-0000{i}.safetensors" for i in range(3))]  # fmt: skip
    folder = write_store(tmp_path / "part", make_embeddings(), shards=(0, 2))
    with pytest.raises(ValueError, match="is incomplete: it has 2 of 3 shards"):
        EmbeddingStore.open(folder)
    assert list_complete_shards(folder) == [0, 2]


def test_leftover_files_are_ignored_and_removed(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", make_embeddings(), shards=(0,))
    for name in ("_complete-00001.json.tmp", "index.arrow.ab.tmp", "shard-00001.safetensors.tmp"):
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
            pytest.raises(ValueError, match=r"Another run is computing shard 0 of 3 in .*busy"),
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
    write_store(store, make_embeddings(), shards=(1,))
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before


def test_a_store_with_missing_or_damaged_shards_is_not_completed(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", make_embeddings(), shards=(0, 1))
    writer = open_writer(folder)
    assert not writer.finish()
    write_shard(writer, 2, make_embeddings())
    record = folder / "_complete-00001.json"
    record.write_text(record.read_text().replace('"rows": 8', '"rows": 9'))
    with pytest.raises(ValueError, match=r"_complete-00001\.json is damaged .*SHA-256"):
        writer.finish()
    assert not StoreManifest.read(folder).complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "embedding dtype: 'float32' in the store, 'float16' now"),
        ({"rows_per_shard": 4}, "rows_per_shard: 8 in the store, 4 now"),
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
        StoreManifest.require_folder(tmp_path / "other")


def test_embeddings_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    embeddings = make_embeddings()
    embeddings[9, 2] = 70000.0  # float16 ends at 65504
    with pytest.raises(
        ValueError, match=r"shard 1 of 3: .* first in row 1. The values exceed .* float32"
    ):
        write_store(tmp_path / "half", embeddings, dtype="float16")
    embeddings[9, 2] = torch.nan
    with pytest.raises(ValueError, match=r"shard 1 of 3: .* first in row 1. The model returns NaN"):
        write_store(tmp_path / "whole", embeddings)


def test_complete_shards_of_another_plan_are_refused_by_name(tmp_path: Path) -> None:
    """Sizes and hashes match; only the output that the record names differs."""
    ours = write_store(tmp_path / "ours", make_embeddings(), shards=(0, 1))
    changes = {"plan": {"data": "cc"}}
    theirs = write_store(tmp_path / "theirs", make_embeddings(seed=1), shards=(2,), **changes)
    for name in ("shard-00002.safetensors", "_complete-00002.json"):
        shutil.copy(theirs / name, ours)
    with pytest.raises(ValueError, match=r"_complete-00002\.json .*of another output"):
        open_writer(ours).finish()
    (ours / "_complete-00002.json").unlink()
    write_store(ours, make_embeddings(), shards=(2,))
    assert torch.equal(EmbeddingStore.open(ours, check="full").read(range(23)), make_embeddings())


def test_a_record_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", make_embeddings(), shards=(0, 1))
    shutil.copy(folder / "_complete-00001.json", folder / "_complete-00000.json")
    with pytest.raises(ValueError, match=r"_complete-00000\.json .*it describes shard-00001\.safe"):
        open_writer(folder).find_records()


def test_shards_have_the_bytes_of_their_format(tmp_path: Path) -> None:
    """So any later version of the same format can continue a store."""
    # Eighths, which every dtype here rounds the same on any machine.
    steps = torch.arange(NUM_ROWS * DIM, dtype=torch.float32).reshape(NUM_ROWS, DIM) / 8
    for dtype, digest in {
        "float32": "570c884d9051405b",
        "float16": "f475b16623f7ca3a",
        "bfloat16": "a25ed881ed9b05ee",
    }.items():
        folder = write_store(tmp_path / dtype, steps, dtype=dtype)
        content = b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))
        assert hashlib.sha256(content).hexdigest()[:16] == digest, dtype
