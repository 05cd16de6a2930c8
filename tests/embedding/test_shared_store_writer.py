"""Laws of a store of machines that share no folder: its bytes are those of one machine."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_files import write_lines
from tiny import tiny_model
from tiny_folders import export_tiny_model

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records import record_index
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.remote.object_storage import ObjectStorage
from modeling_llm2clip.data.remote.remote_access import LostFileError, RetryPolicy
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.embedding.embedding_store_writer import SharedStoreWriter
from modeling_llm2clip.embedding.extract import _RayWork, extract, merge_store
from modeling_llm2clip.model_folders.model_writing import save_model

pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).parents[2]
CONFIG = ExtractConfig(
    store_dtype="float32",
    max_shard_size="1KiB",
    token_budget=256,
    device="cpu",
    show_progress=False,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def records(tmp_path: Path) -> RecordTable:
    lines = [
        {"file_name": f"{n}.png", "captions": [f"a red square {n}", f"square {n}"]}
        for n in range(20)
    ]
    return load_records(write_lines(tmp_path / "data", lines), require_images=False)


def read_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def test_partitions_of_machines_with_a_folder_each_become_the_store_of_one(
    model: Path, records: RecordTable, tmp_path: Path
) -> None:
    alone = extract(model, records, tmp_path / "alone", CONFIG, modality="text")
    url = f"file://{tmp_path}/storage/captions"
    for part in (1, 2, 3):
        extract(
            model, records, tmp_path / f"machine-{part}", CONFIG,
            modality="text", partition=f"{part}/3", storage=url,
        )  # fmt: skip
    with pytest.raises(ValueError, match="is not complete"):
        EmbeddingStore.open(tmp_path / "machine-1")
    assert main(["merge-store", str(tmp_path / "merged"), "--storage", url]) == 0
    assert read_files(tmp_path / "merged") == read_files(alone)
    merge_store(tmp_path / "machine-2", storage=url)
    assert read_files(tmp_path / "machine-2") == read_files(alone)


def test_one_machine_continues_what_another_began(
    model: Path, records: RecordTable, tmp_path: Path
) -> None:
    alone = extract(model, records, tmp_path / "alone", CONFIG, modality="text")
    url = f"file://{tmp_path}/storage"
    options = {"config": CONFIG, "modality": "text", "storage": url}
    extract(model, records, tmp_path / "lost", partition="1/2", **options)  # type: ignore[arg-type]
    there = {file: file.stat().st_mtime_ns for file in (tmp_path / "storage").iterdir()}
    shutil.rmtree(tmp_path / "lost")
    extract(model, records, tmp_path / "other", **options)  # type: ignore[arg-type]
    assert read_files(tmp_path / "other") == read_files(alone)
    assert {file: file.stat().st_mtime_ns for file in there} == there  # nothing was made twice


def test_other_stores_are_refused_on_either_side(
    model: Path, records: RecordTable, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/storage"
    extract(model, records, tmp_path / "one", CONFIG, modality="text", storage=url)
    half = replace(CONFIG, store_dtype="float16")
    with pytest.raises(ValueError, match=r"holds another output: .*float16"):
        extract(model, records, tmp_path / "new", half, modality="text", storage=url)
    extract(model, records, tmp_path / "half", half, modality="text")
    with pytest.raises(ValueError, match=r"half and file://\S+ hold different stores"):
        extract(model, records, tmp_path / "half", half, modality="text", storage=url)
    with pytest.raises(ValueError, match="holds no store"):
        merge_store(tmp_path / "none", storage=f"file://{tmp_path}/nothing")
    for wrong in ("captions", "https://host/captions", "pipe:cat"):
        with pytest.raises(ValueError, match="must be the URL of object storage"):
            merge_store(tmp_path / "none", storage=wrong)


def test_a_complete_store_is_not_taken_for_one_that_is_in_the_storage(
    model: Path, records: RecordTable, tmp_path: Path
) -> None:
    """A manifest without its shards would make other machines compute nothing."""
    url = f"file://{tmp_path}/storage"
    options = {"config": CONFIG, "modality": "text", "storage": url}
    extract(model, records, tmp_path / "complete", CONFIG, modality="text")
    for partition in (None, "1/2"):
        with pytest.raises(
            ValueError, match=r"complete is complete, and file://\S+ lacks 5 shards"
        ):
            extract(model, records, tmp_path / "complete", partition=partition, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "storage").exists()
    extract(model, records, tmp_path / "new", **options)  # type: ignore[arg-type]
    before = read_files(tmp_path / "storage")
    extract(model, records, tmp_path / "complete", **options)  # type: ignore[arg-type]
    assert read_files(tmp_path / "storage") == before
    assert read_files(tmp_path / "new") == read_files(tmp_path / "complete")


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: content[:-1] + b"x"]
)
def test_a_damaged_shard_in_the_storage_is_named(
    damage: Callable[[bytes], bytes], model: Path, records: RecordTable, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/storage"
    extract(model, records, tmp_path / "one", CONFIG, modality="text", storage=url, partition="1/1")
    shard = sorted((tmp_path / "storage").glob("*.safetensors"))[1]
    shard.write_bytes(damage(shard.read_bytes()))
    for _ in range(2):
        with pytest.raises(ValueError, match=shard.name):
            merge_store(tmp_path / "merged", storage=url)


def test_a_file_that_is_not_there_is_lost_and_leaves_nothing(tmp_path: Path) -> None:
    storage = ObjectStorage(f"file://{tmp_path}/storage", RetryPolicy(first_wait=0))
    assert storage.list_sizes() == {}
    with pytest.raises(LostFileError, match="no such file"):
        storage.pull("gone", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_mapped", [True, False])
@pytest.mark.parametrize("is_part", [True, False])
def test_an_actor_finds_the_records_that_it_was_given(
    is_mapped: bool,
    is_part: bool,
    model: Path,
    records: RecordTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_mapped:
        monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 0)
        records = load_records(tmp_path / "data", require_images=False)
    assert (records.file is not None) == is_mapped
    table = records.select(np.arange(3, 17, 2)) if is_part else records
    url = f"file://{tmp_path}/storage"
    extract(model, table, tmp_path / "begun", CONFIG, modality="text", partition="1/9", storage=url)
    writer = SharedStoreWriter.join(tmp_path / "begun", ObjectStorage(url))
    sent = pickle.dumps(_RayWork.describe(model, CONFIG, "text", writer, table))
    wanted = list(table)
    if is_mapped:
        assert records.file is not None
        records.file.unlink()  # the actor's machine does not have it
    joined, found = pickle.loads(sent).join()
    assert list(found) == wanted
    assert joined.list_missing() == writer.list_missing()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_with_storage_leaves_the_same_bytes_as_one_process(
    model: Path, records: RecordTable, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    alone = extract(model, records, tmp_path / "alone", CONFIG, modality="text")
    command = [
        sys.executable, "-m", "modeling_llm2clip", "extract", model, tmp_path / "data",
        tmp_path / "ray", "--modality", "text", "--device", "cpu", "--store-dtype", "float32",
        "--max-shard-size", "1KiB", "--token-budget", "256", "--engine", "ray",
        "--storage", f"file://{tmp_path}/storage",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    subprocess.run(list(map(str, command)), env=environment, timeout=240, check=True)
    assert read_files(tmp_path / "ray") == read_files(alone)
    assert not list((tmp_path / "ray").glob("*.tmp"))


def kill_at_push(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Die before a file is copied to the storage."""
    real = ObjectStorage.push

    def die(self: ObjectStorage, file: Path) -> None:
        if file.name == name:
            raise KeyboardInterrupt
        real(self, file)

    monkeypatch.setattr(ObjectStorage, "push", die)


@pytest.mark.parametrize("name", ["shard-00002.safetensors", "shard-00002.json"])
def test_a_partition_that_was_killed_before_a_shard_was_copied_is_finished_by_the_next_run(
    name: str,
    model: Path,
    records: RecordTable,
    tmp_path: Path,
    written: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = extract(model, records, tmp_path / "alone", CONFIG, modality="text")
    num_shards = len(written)
    written.clear()
    url = f"file://{tmp_path}/storage"
    options = {"config": CONFIG, "modality": "text", "storage": url}
    extract(model, records, tmp_path / "second", partition="2/2", **options)  # type: ignore[arg-type]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at_push(patch, name)
        extract(model, records, tmp_path / "first", partition="1/2", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shards are missing: 2"):
        merge_store(tmp_path / "early", storage=url)
    extract(model, records, tmp_path / "first", partition="1/2", **options)  # type: ignore[arg-type]
    assert read_files(merge_store(tmp_path / "merged", storage=url)) == read_files(alone)
    assert len(written) == num_shards + 1  # the shard that was not there yet


def make_other_model(folder: Path) -> Path:
    """A model whose embeddings have the same shape, and other values."""
    model, processor = tiny_model(max_text_length=128)
    with torch.no_grad():
        model.text_model.norm.weight.mul_(-1)
    return save_model(model, processor, folder)


def test_shards_of_a_storage_without_manifest_are_those_of_the_same_plan_alone(
    model: Path, records: RecordTable, tmp_path: Path, written: list[int]
) -> None:
    storage = tmp_path / "storage"
    options = {"config": CONFIG, "modality": "text", "storage": f"file://{storage}"}
    alone = extract(model, records, tmp_path / "a", **options)  # type: ignore[arg-type]
    (storage / "manifest.json").unlink()
    written.clear()
    other = make_other_model(tmp_path / "other")
    with pytest.raises(ValueError, match=r"5 damaged files: .*it is of another store"):
        extract(other, records, tmp_path / "b", **options)  # type: ignore[arg-type]
    (storage / "manifest.json").unlink()
    found = extract(model, records, tmp_path / "c", **options)  # type: ignore[arg-type]
    assert read_files(found) == read_files(alone) and not written


def test_shards_of_another_model_are_never_merged(
    model: Path, records: RecordTable, tmp_path: Path
) -> None:
    """A shard says which plan it is of, so that no manifest beside it can say otherwise."""
    storages = {name: tmp_path / f"storage-{name}" for name in ("a", "b")}
    sources = {"a": model, "b": make_other_model(tmp_path / "other")}
    for name, storage in storages.items():
        extract(
            sources[name], records, tmp_path / name, CONFIG,
            modality="text", storage=f"file://{storage}", partition="1/2",
        )  # fmt: skip
    for file in storages["a"].glob("shard-*"):
        shutil.copy(file, storages["b"])
    url = f"file://{storages['b']}"
    for partition in ("2/2", "1/2"):
        extract(
            sources["b"], records, tmp_path / "again", CONFIG,
            modality="text", storage=url, partition=partition,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors: it is of another store") as e:
        merge_store(tmp_path / "merged", storage=url)
    assert f"Delete each and the .json file beside it in {tmp_path}/merged and {url}" in str(
        e.value
    )
    for file in storages["a"].glob("shard-*"):  # as the error says
        (storages["b"] / file.name).unlink()
    extract(sources["b"], records, tmp_path / "again", CONFIG, modality="text", storage=url)
    wanted = extract(sources["b"], records, tmp_path / "wanted", CONFIG, modality="text")
    assert read_files(tmp_path / "again") == read_files(wanted)


def test_two_machines_that_begin_different_stores_at_once_do_not_mix_them(
    model: Path, records: RecordTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"config": CONFIG, "modality": "text", "storage": f"file://{tmp_path}/storage"}
    other = make_other_model(tmp_path / "other")
    real = ObjectStorage.push

    def push_after_another(self: ObjectStorage, file: Path) -> None:
        monkeypatch.setattr(ObjectStorage, "push", real)
        extract(model, records, tmp_path / "a", partition="1/2", **options)  # type: ignore[arg-type]
        real(self, file)

    monkeypatch.setattr(ObjectStorage, "push", push_after_another)
    extract(other, records, tmp_path / "b", partition="1/2", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hold different stores: weights: "):
        extract(model, records, tmp_path / "a", partition="2/2", **options)  # type: ignore[arg-type]
    extract(other, records, tmp_path / "b", partition="2/2", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it is of another store"):
        merge_store(tmp_path / "merged", storage=f"file://{tmp_path}/storage")
