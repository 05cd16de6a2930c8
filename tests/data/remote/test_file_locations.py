"""Files by location: a remote read returns what was described, or raises."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned_files import (
    LINES,
    encode,
    write_lines,
    write_parquet,
    write_parquet_of_bytes,
    write_shard,
    write_shards,
)
from shard_server import ShardServer
from tiny_folders import export_tiny_model

from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.images.image_sources import find_unreadable_images, open_image
from modeling_llm2clip.data.records import record_index
from modeling_llm2clip.data.records.data_hashes import describe_images, hash_images
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage, Modality
from modeling_llm2clip.data.remote import file_locations, remote_files
from modeling_llm2clip.data.remote.file_locations import (
    describe_states,
    open_buffered,
    open_file,
    read_range,
)
from modeling_llm2clip.data.remote.remote_access import AccessError, LostFileError
from modeling_llm2clip.data.remote.shard_urls import has_remote_shards
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.evaluation.datasets.dataset_registry import load_dataset
from modeling_llm2clip.training.alignment.align_checks import require_same_images

pytestmark = pytest.mark.usefixtures("own_cache", "new_states")
CONTENT = bytes(range(256)) * 100


def describe(record: CaptionedImage) -> tuple[Any, ...]:
    """A record without the place of its image, which differs from source to source."""
    assert record.image is not None
    image = open_image(record.image)
    return (record.name, record.group_id, record.lang, record.captions, record.long_captions,
            record.keywords, image.tobytes())  # fmt: skip


FORMATS = {write_shards: "{00000..00001}.tar", write_parquet: "part-{0..1}.parquet",
           write_parquet_of_bytes: "part-{0..1}.parquet"}  # fmt: skip
SHARDS = FORMATS[write_shards]


@pytest.mark.parametrize("write", FORMATS)
def test_records_from_a_web_server_are_those_of_the_folder(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = write(tmp_path / "data")
    local = load_records(folder)
    for drop_every in (0, 4):
        with ShardServer(folder, drop_every=drop_every) as server:
            remote = load_records(f"{server.url}/{FORMATS[write]}")
            assert [describe(record) for record in remote] == [describe(r) for r in local]
            assert hash_images(local).startswith(hash_images(remote))
            assert describe_images(remote)["first"].startswith(server.url)
            assert not find_unreadable_images(record.image for record in remote if record.image)


def test_a_list_may_mix_local_and_remote_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    local = load_records(folder)
    with ShardServer(folder) as server:
        shards = tmp_path / "shards.txt"
        for first in (folder, server.url):
            shards.write_text(f"{first}/00000.tar\n{server.url}/00001.tar\n", encoding="utf-8")
            found = load_records(shards)
            assert [describe(record) for record in found] == [describe(record) for record in local]
            # Such data are streamed for training, and not decoded whole before anything starts.
            assert has_remote_shards(str(shards))
    shards.write_text(f"{folder}/00000.tar", encoding="utf-8")
    assert not has_remote_shards(str(shards))


def test_captions_of_json_lines_are_read_and_their_images_are_not(tmp_path: Path) -> None:
    write_lines(tmp_path / "data", LINES)
    local = load_records(tmp_path / "data", require_images=False)
    with ShardServer(tmp_path / "data") as server:
        url = f"{server.url}/captions.jsonl"
        remote = load_records(url, require_images=False)
        assert list(remote) == list(local)
        assert [record.place for record in remote] == [record.place for record in local]
        with pytest.raises(ValueError, match=r"would need one request each\. Pack them"):
            load_records(url)


def test_a_cached_table_is_reused_until_a_file_changes_and_never_if_changes_are_undetectable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 0)
    folder = write_shards(tmp_path / "data")
    with ShardServer(folder) as server:
        url = f"{server.url}/{SHARDS}"
        first = load_records(url)
        num_requests = server.requests.total()
        assert load_records(url).file == first.file
        assert server.requests.total() == num_requests  # heads are not counted
        os.utime(folder / "00000.tar", ns=(1, 1))
        assert load_records(url).file != first.file
    with ShardServer(folder, tags=False) as server:
        url = f"{server.url}/00000.tar"
        assert describe_states([url]) == [None]
        assert load_records(url).file != load_records(url).file  # is built each time


def replace_file(file: Path, content: bytes) -> None:
    """Write another state of a file, of the same size and of another time, which is its tag."""
    found = file.stat()
    assert len(content) == found.st_size and content != file.read_bytes()
    file.write_bytes(content)
    os.utime(file, ns=(found.st_mtime_ns + 10**9, found.st_mtime_ns + 10**9))


def list_captions(source: str | Path) -> list[Any]:
    return [record.captions for record in load_records(source, require_images=False)]


@pytest.mark.parametrize("tags", [True, False])
def test_a_changed_file_is_not_read_from_earlier_blocks(
    tags: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a stale table would be cached under the new state."""
    monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 0)
    folder = write_lines(tmp_path / "data", LINES)
    file = folder / "captions.jsonl"
    with ShardServer(folder, tags=tags) as server:
        url = f"{server.url}/captions.jsonl"
        before = list_captions(url)
        replace_file(file, file.read_bytes().replace(b"square", b"circle"))
        warned = pytest.warns(UserWarning, match=r"captions\.jsonl\. Reload")
        with warned if tags else nullcontext():
            now = list_captions(url)
        assert now == list_captions(folder) != before
        file_locations._open_remote.cache_clear()  # as in a new process
        assert list_captions(url) == now


def pack(folder: Path, images: list[bytes], kind: str) -> Path:
    """Write a shard of images; of Parquet such as has no statistics, since their size may vary."""
    if kind == "tar":
        members = {f"{number}.png": content for number, content in enumerate(images)}
        texts = {f"{number}.txt": b"a text" for number in range(len(images))}
        return write_shard(folder / "0.tar", dict(sorted({**members, **texts}.items())))
    folder.mkdir(exist_ok=True)
    table = pa.table({"image": images, "caption": ["a text"] * len(images)})
    pq.write_table(table, folder / "0.parquet", compression=kind, use_dictionary=False)
    return folder / "0.parquet"


@pytest.mark.parametrize("kind", ["tar", "none", "snappy"])
def test_images_of_a_changed_file_are_those_that_it_has_now(kind: str, tmp_path: Path) -> None:
    """Even if their offsets, which are cached, have changed."""
    image = encode("images/red.png")
    states = [[image + b"a" * size for size in sizes] for sizes in ((600, 1, 2), (1, 2, 600))]
    with ShardServer(tmp_path / "data") as server:
        for number, images in enumerate(states):
            file = pack(tmp_path / "data", images, kind)
            os.utime(file, ns=(number, number))
            assert read_images(load_records(f"{server.url}/{file.name}")) == images


def test_a_file_that_changes_while_it_is_read_is_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_BLOCK_BYTES", 1000)
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    with ShardServer(tmp_path) as server:
        url = f"{server.url}/file"
        with open_file(url) as opened:
            assert opened.read(1000) == CONTENT[:1000]
            replace_file(file, CONTENT[::-1])
            with pytest.raises(LostFileError, match=r"file: the file changed .*Load the data"):
                opened.read(1000)
        describe_states([url])
        assert read_range(url, 0, 3000) == CONTENT[::-1][:3000]


@pytest.mark.parametrize(
    ("scheme", "kind"), [("", "tar"), ("file://", "tar"), ("", "none"), ("file://", "snappy")]
)
def test_an_image_is_not_read_from_a_local_file_that_was_rewritten(
    scheme: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the same size and rows, and would pair old captions with new images."""
    image = encode("images/red.png")
    states = [[image + bytes([number]) for number in order] for order in ((1, 2, 3), (3, 2, 1))]
    file = pack(tmp_path / "data", states[0], kind)
    records = load_records(f"{scheme}{file}")
    assert read_images(records) == states[0]
    content = pickle.dumps(records)
    size, time = file.stat().st_size, file.stat().st_mtime_ns
    pack(tmp_path / "data", states[1], kind)
    assert file.stat().st_size == size
    os.utime(file, ns=(time + 10**9, time + 10**9))
    for state in ({}, file_locations._states):  # in another process, and in this one
        with monkeypatch.context() as patched:
            patched.setattr(file_locations, "_states", state)
            for record in pickle.loads(content):
                with pytest.raises(LostFileError, match="changed while it was in use"):
                    record.image.read_bytes()
    for record in records:
        with pytest.raises(LostFileError, match="changed while it was in use"):
            record.image.read_bytes()
    with pytest.warns(UserWarning, match="Changed since this process last read"):
        assert read_images(load_records(f"{scheme}{file}")) == states[1]


def read_images(records: Any) -> list[bytes]:
    return [record.image.read_bytes() for record in records]


def change_when_described(monkeypatch: pytest.MonkeyPatch, *files: Path) -> None:
    """Replace files once their states were asked, before they are read."""

    def describe_and_change(places: Any) -> Any:
        found = describe_states(places)
        for file in files:
            replace_file(file, file.read_bytes().replace(b"square", b"circle"))
        return found

    monkeypatch.setattr(record_index, "describe_states", describe_and_change)


def test_a_file_that_changes_before_it_is_read_is_not_kept_under_another_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 0)
    folder = write_lines(tmp_path / "data", LINES)
    with ShardServer(folder) as server:
        url = f"{server.url}/captions.jsonl"
        with monkeypatch.context() as patched:
            change_when_described(patched, folder / "captions.jsonl")
            with pytest.raises(LostFileError, match="the file changed while it was in use"):
                load_records(url, require_images=False)
        assert list_captions(url) == list_captions(folder)


@pytest.mark.slow  # starts processes
def test_processes_read_files_in_the_states_that_were_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_index, "_LEAST_BYTES_FOR_PROCESSES", 0)
    folder = write_shards(tmp_path / "data")
    change_when_described(monkeypatch, *folder.iterdir())
    with ShardServer(folder) as server:
        with pytest.raises(DataValidationError, match="its requests fail") as caught:
            load_records(f"{server.url}/{SHARDS}")
    assert "the file changed" in str(caught.value.places)


@pytest.mark.parametrize("block_bytes", [4, 999, 10**6])
def test_any_part_of_a_file_is_read(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_BLOCK_BYTES", block_bytes)
    content = CONTENT[:160] if block_bytes == 4 else CONTENT  # a request for four bytes
    (tmp_path / "file").write_bytes(content)
    with ShardServer(tmp_path) as server:
        for place in (tmp_path / "file", f"{server.url}/file"):
            with open_file(place) as opened:
                for start, size in ((150, 99), (0, 7), (len(content) - 5, 99), (len(content), 1)):
                    opened.seek(start)
                    assert opened.read(size) == content[start : start + size]
                opened.seek(-3, os.SEEK_END)
                opened.seek(1, os.SEEK_CUR)
                assert opened.tell() == len(content) - 2
                assert opened.read() == content[-2:]
            with open_buffered(place) as buffered:
                assert buffered.read() == content
            assert read_range(place, 100, 50) == content[100:150]
            with pytest.raises(OSError, match="5 of 9 bytes"):
                read_range(place, len(content) - 5, 9)


def test_unreachable_files_are_immediate_errors(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    with ShardServer(folder) as server:
        with pytest.raises(LostFileError, match="no-such"):
            load_records(f"{server.url}/no-such.tar")
        server.deny_after = server.requests.total() + 1  # access that is lost on the way
        with pytest.raises(AccessError, match="access denied"):
            load_records(f"{server.url}/{SHARDS}")
    with pytest.raises(AccessError, match="cannot be reached"):
        load_records(f"{server.url}/00000.tar")
    with pytest.raises(ValueError, match=r"is not on this machine\. Only your own records"):
        load_dataset("flickr30k", folder=server.url, lang="en")


@pytest.mark.parametrize(("write", "status"), [(write_shards, 404), (write_parquet, 503)])
def test_a_shard_whose_requests_fail_is_not_called_broken(
    write: Callable[[Path], Path], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "data")
    last = max(file.name for file in folder.iterdir() if file.is_file())
    with ShardServer(folder) as server:

        def describe_and_fail(places: Any) -> Any:
            states = describe_states(places)
            server.status[last] = status
            return states

        monkeypatch.setattr(record_index, "describe_states", describe_and_fail)
        with pytest.raises(DataValidationError) as caught:
            load_records(f"{server.url}/{FORMATS[write]}")
    assert caught.value.counts == {"file missing, or its requests fail": 1}
    (place,) = caught.value.places["file missing, or its requests fail"]
    assert place.startswith(last) and str(status) in place


def read_tensors(file: Path) -> bytes:
    """The part after the header, which says of which images it is: remote ones are not read."""
    content = file.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_extract_gives_the_bytes_of_a_local_run(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    model = export_tiny_model(tmp_path / "model")
    config = ExtractConfig(device="cpu", store_dtype="float32", show_progress=False)
    modalities: tuple[Modality, ...] = ("text", "image")
    with ShardServer(folder) as server:
        url = f"{server.url}/{SHARDS}"
        for modality in modalities:
            stores = [tmp_path / f"{modality}-{name}" for name in ("local", "remote")]
            for store, source in zip(stores, (folder, url), strict=True):
                extract(model, load_records(source), store, config, modality=modality)
            for file in stores[0].glob("*.safetensors"):
                assert read_tensors(stores[1] / file.name) == read_tensors(file)
        for store, source in zip(stores, (url, folder), strict=True):  # are of the same images
            require_same_images(load_records(source), EmbeddingStore.open(store), None)
