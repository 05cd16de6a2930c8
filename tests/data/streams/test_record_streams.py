"""Streams give what the local source gives, each sample once, and go on where they were stopped."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned_files import write_shard
from PIL import Image
from shard_server import ShardServer

from modeling_llm2clip.data.images.image_sources import EncodedImage
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.remote import remote_files
from modeling_llm2clip.data.remote.remote_access import AccessError, LostFileError, RetryPolicy
from modeling_llm2clip.data.remote.shard_urls import drop_signature, name_shards
from modeling_llm2clip.data.sources.shard_streams import ShardColumnsError
from modeling_llm2clip.data.streams.dataset_streams import stream_dataset
from modeling_llm2clip.data.streams.record_streams import (
    RecordStream,
    make_loader,
    read_report,
    stream_records,
)
from modeling_llm2clip.data.streams.stream_report import TooManyLostError
from modeling_llm2clip.data.streams.stream_run import hash_shards

FAST = RetryPolicy(first_wait=0.001)
SHARDS, SAMPLES = 8, 7


def encode_noise(number: int) -> bytes:
    """Images of a few kilobytes, each another one, so that a mixed-up or cut image shows."""
    pixels = np.random.default_rng(number).integers(0, 255, (30, 30, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def describe(shard: int, sample: int) -> dict[str, Any]:
    number = shard * SAMPLES + sample
    return {"captions": [f"caption {number}", f"text {number}"], "group_id": f"g{number // 2}"}


def write_tars(folder: Path) -> Path:
    for shard in range(SHARDS):
        members = {}
        for sample in range(SAMPLES):
            members[f"{sample:04d}.png"] = encode_noise(shard * SAMPLES + sample)
            members[f"{sample:04d}.json"] = json.dumps(describe(shard, sample)).encode()
        write_shard(folder / f"{shard:05d}.tar", members)
    return folder


def write_parquets(folder: Path) -> Path:
    folder.mkdir()
    for shard in range(SHARDS):
        rows = [
            {
                "image": {"bytes": encode_noise(shard * SAMPLES + sample), "path": None},
                **describe(shard, sample),
            }
            for sample in range(SAMPLES)
        ]
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, folder / f"{shard:05d}.parquet", row_group_size=3)
    return folder


def write_json_lines(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    for shard in range(SHARDS):
        lines = []
        for sample in range(SAMPLES):
            name = f"images/{shard}-{sample}.png"
            (folder / name).write_bytes(encode_noise(shard * SAMPLES + sample))
            lines.append(json.dumps({"image": name, **describe(shard, sample)}))
        (folder / f"{shard:05d}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


WRITERS = [write_tars, write_parquets, write_json_lines]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that shards of kilobytes are read in several requests, as those of megabytes are."""
    monkeypatch.setattr(remote_files, "_BLOCK_BYTES", 5000)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return write_tars(tmp_path / "tars")


@pytest.fixture
def served(tars: Path) -> Iterator[ShardServer]:
    with ShardServer(tars) as server:
        yield server


def spell(server: ShardServer, suffix: str = "tar") -> str:
    return f"{server.url}/{{00000..{SHARDS - 1:05d}}}.{suffix}"


def read(record: CaptionedImage) -> tuple[CaptionedImage, bytes]:
    """A record without its address, and its bytes."""
    image = record.image
    assert image is not None
    return replace(record, image=None), image.read_bytes()


def list_names(stream: Any) -> list[str]:
    return [record.name for record in stream]


def flatten(batches: Any) -> list[str]:
    return [record.name for batch in batches for record in batch]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_stream_has_the_samples_of_the_local_source(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = write(tmp_path / "data")
    files = sorted(file for file in folder.iterdir() if file.is_file())
    local = sorted((read(r) for f in files for r in load_records(f)), key=str)
    with ShardServer(folder) as server:
        stream = stream_records(spell(server, files[0].suffix[1:]), buffer_size=5, retry=FAST)
        streamed = list(stream)
    assert sorted(map(read, streamed), key=str) == local
    assert {type(record.image) for record in streamed} == {EncodedImage}
    report = stream.report
    assert (report.samples, report.shards) == (SHARDS * SAMPLES, SHARDS)
    assert (report.lost_samples, report.lost_shards, report.retries) == (0, 0, 0)


def test_a_local_folder_is_a_stream_too(tars: Path) -> None:
    assert sorted(list_names(stream_records(tars))) == [r.name for r in load_records(tars)]


def test_a_command_is_a_shard(tars: Path) -> None:
    source = f"pipe:cat {tars}/{{00000..{SHARDS - 1:05d}}}.tar"
    assert len(list_names(stream_records(source))) == SHARDS * SAMPLES
    failing = stream_records([f"pipe:cat {tars}/00000.tar; false"], retry=FAST, max_lost_share=1)
    assert list_names(failing) == []  # its output is shorter than what is read at once
    assert failing.report.lost_shards == 1
    assert "the command ended with code 1" in failing.report.describe()


def test_the_order_depends_on_seed_and_epoch_alone(tars: Path) -> None:
    stream = stream_records(tars, seed=3, buffer_size=10)
    first = list_names(stream)
    assert list_names(stream) == first
    stream.set_epoch(1)
    second = list_names(stream)
    other = list_names(stream_records(tars, seed=4, buffer_size=10))
    assert first != second != other != first
    assert sorted(first) == sorted(second) == sorted(other)


def test_a_buffer_mixes_neighbors_and_one_of_size_one_keeps_the_order(tars: Path) -> None:
    kept = list_names(stream_records(tars, buffer_size=1))
    shards = list(dict.fromkeys(name.split("/")[0] for name in kept))
    assert kept == [f"{shard}/{sample:04d}.png" for shard in shards for sample in range(SAMPLES)]
    assert shards != sorted(shards)
    mixed = list_names(stream_records(tars, buffer_size=20))
    assert len({name.split("/")[0] for name in mixed[:SAMPLES]}) > 1


@pytest.mark.slow  # eight processes
@pytest.mark.parametrize("drop_every", [0, 20])
def test_two_processes_with_two_workers_see_each_sample_once(
    served: ShardServer, drop_every: int
) -> None:
    served.drop_every = drop_every
    found: Counter[str] = Counter()
    for process in range(2):
        stream = stream_records(
            spell(served), buffer_size=5, process_index=process, num_processes=2, retry=FAST
        )
        loader = make_loader(stream, batch_size=3, num_workers=2)
        found.update(flatten(loader))
        assert read_report(loader.state_dict()).samples == SHARDS * SAMPLES // 2
    assert set(found.values()) == {1} and len(found) == SHARDS * SAMPLES
    assert served.dropped or not drop_every


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("stop", [0, 1, 13, 40, SHARDS * SAMPLES - 1])
def test_a_resumed_stream_is_the_uninterrupted_one(
    write: Callable[[Path], Path], stop: int, tmp_path: Path
) -> None:
    folder = write(tmp_path / "data")

    def make() -> RecordStream:
        files = sorted(str(file) for file in folder.iterdir() if file.is_file())
        return stream_records(files, seed=5, buffer_size=10, retry=FAST)

    whole = make()
    whole.set_epoch(2)
    wanted = list(whole)
    stopped = make()
    stopped.set_epoch(2)
    iterator = iter(stopped)
    head = [next(iterator) for _ in range(stop)]
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = make()
    resumed.load_state_dict(state)
    assert head + list(resumed) == wanted
    assert resumed.report == whole.report


@pytest.mark.slow  # six processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_is_the_uninterrupted_one(served: ShardServer, num_workers: int) -> None:
    def make() -> Any:
        stream = stream_records(spell(served), seed=1, buffer_size=6, retry=FAST)
        return make_loader(stream, batch_size=4, num_workers=num_workers), stream

    (loader, stream), epochs = make(), []
    for epoch in range(2):
        stream.set_epoch(epoch)
        epochs.append(list(loader))
    (stopped, stream), head = make(), []
    iterator = iter(stopped)
    head = [next(iterator) for _ in range(5)]
    state = pickle.loads(pickle.dumps(stopped.state_dict()))
    del iterator
    served.drop_every = 7
    resumed, stream = make()
    resumed.load_state_dict(state)
    assert head + list(resumed) == epochs[0]
    stream.set_epoch(1)
    assert list(resumed) == epochs[1] != epochs[0]


@pytest.mark.slow  # six processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_stopped_between_epochs_begins_the_next_one(tars: Path, num_workers: int) -> None:
    def make() -> Any:
        stream = stream_records(tars, seed=1, buffer_size=6)
        return make_loader(stream, batch_size=4, num_workers=num_workers), stream

    loader, stream = make()
    first = list(loader)
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    stream.set_epoch(1)
    second = list(loader)
    resumed, stream = make()
    resumed.load_state_dict(state)
    stream.set_epoch(1)
    assert list(resumed) == second != first


def test_a_state_of_another_stream_is_refused(tars: Path) -> None:
    stream = stream_records(tars, seed=1)
    next(iter(stream))
    state = stream.state_dict()
    for other, what in (
        (stream_records(tars, seed=2), "seed"),
        (stream_records(tars, seed=1, buffer_size=3), "buffer_size"),
        (stream_records(sorted(map(str, tars.iterdir()))[1:], seed=1), "shards"),
        (stream_records(tars, seed=1, process_index=1, num_processes=2), "reader"),
    ):
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=f"of another stream: {what} differ"):
            iter(other)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_dropped_connections_lose_nothing(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    suffix = next(file.suffix for file in folder.iterdir() if file.is_file())
    with ShardServer(folder) as server:
        source = spell(server, suffix[1:])
        wanted = list(stream_records(source, buffer_size=5, retry=FAST))
        server.drop_every = 3
        stream = stream_records(source, buffer_size=5, retry=FAST)
        assert list(stream) == wanted
        assert server.dropped > 0 and stream.report.retries > 0
        assert "request made again" in stream.report.describe()


def test_a_shard_that_is_cut_is_named_and_the_others_are_read(tars: Path) -> None:
    cut = tars / "00003.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    stream = stream_records(tars, max_lost_share=0.2)
    found = Counter(name.split("/")[0] for name in list_names(stream))
    assert found.pop("00003.tar", 0) < SAMPLES and set(found.values()) == {SAMPLES}
    assert stream.report.lost_shards == 1 and stream.report.shards == SHARDS - 1
    assert "00003.tar before sample" in stream.report.describe()
    with pytest.raises(TooManyLostError, match=r"1 of 8 shards.*\n.*00003\.tar before sample"):
        list(stream_records(tars))


@pytest.mark.parametrize("size", range(1536, 12000, 512))
def test_a_shard_cut_at_a_block_is_noticed(size: int, tmp_path: Path) -> None:
    """Where tarfile takes the end of the file for the end of the archive."""
    write_tars(tmp_path)
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:size])
    stream = stream_records(tmp_path / "cut.tar", max_lost_share=1)
    assert len(list_names(stream)) < SAMPLES and stream.report.lost_shards == 1


def damage_page(file: Path) -> None:
    """Overwrite the header of a page in the second of three row groups."""
    page = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content = file.read_bytes()
    file.write_bytes(content[:page] + b"\xff" * 8 + content[page + 8 :])


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_a_damaged_page_of_parquet_is_a_lost_shard(tmp_path: Path, remote: bool) -> None:
    folder = write_parquets(tmp_path / "data")
    damage_page(folder / "00003.parquet")
    with ShardServer(folder) as server:
        source = spell(server, "parquet") if remote else str(folder)
        stream = stream_records(source, max_lost_share=0.2, retry=FAST)
        found = Counter(name.split("/")[0] for name in list_names(stream))
    assert found.pop("00003.parquet", 0) < SAMPLES and set(found.values()) == {SAMPLES}
    assert len(found) == SHARDS - 1 == stream.report.shards
    assert stream.report.lost_shards == 1
    assert "00003.parquet before sample" in stream.report.describe()


@pytest.mark.parametrize(
    ("status", "error"), [(403, AccessError), (503, TooManyLostError)], ids=["denied", "overloaded"]
)
def test_a_request_that_fails_within_parquet_is_not_taken_for_damage(
    tmp_path: Path, status: int, error: type[Exception]
) -> None:
    with ShardServer(write_parquets(tmp_path / "data")) as server:
        stream = stream_records(spell(server, "parquet"), buffer_size=1, retry=FAST)
        iterator = iter(stream)
        next(iterator)
        for number in range(SHARDS):
            server.status[f"{number:05d}.parquet"] = status
        with pytest.raises(error) as raised:
            list(iterator)
        assert "not a Parquet file" not in str(raised.value)


def prepare_most(record: CaptionedImage) -> str:
    """In place of decoding: the third sample of each shard is broken."""
    if record.name.endswith("/0002.png"):
        raise ValueError(f"{record.name}: broken")
    return record.name


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_others_take_the_place_of_samples_that_cannot_be_prepared(
    tars: Path, num_workers: int
) -> None:
    pytest.importorskip("torchdata")

    def make() -> Any:
        stream = stream_records(tars, seed=1, buffer_size=10)
        return make_loader(stream, batch_size=4, prepare=prepare_most, num_workers=num_workers)

    loader = make()
    batches = list(loader)
    # Four shards of six samples in each of two workers, or eight of six in one.
    assert {len(batch) for batch in batches} == {4}
    names = [f"{shard:05d}.tar/{n:04d}.png" for shard in range(SHARDS) for n in range(SAMPLES)]
    found = sorted(name for batch in batches for name in batch)
    assert found == [name for name in names if not name.endswith("2.png")]
    report = read_report(loader.state_dict())
    assert (report.samples, report.lost_samples) == (SHARDS * (SAMPLES - 1), SHARDS)
    assert report.problems.counts == {"image unreadable": SHARDS}
    assert all("0002.png: broken" in place for place in report.problems.places["image unreadable"])

    stopped = make()
    iterator = iter(stopped)
    head = [next(iterator) for _ in range(5)]
    state = pickle.loads(pickle.dumps(stopped.state_dict()))
    del iterator
    resumed = make()
    resumed.load_state_dict(state)
    assert head + list(resumed) == batches
    assert read_report(resumed.state_dict()).lost_samples == SHARDS


def test_more_samples_that_cannot_be_prepared_than_the_share_stop_a_stream(tars: Path) -> None:
    pytest.importorskip("torchdata")
    stream = stream_records(tars, max_lost_share=0.005)
    loader = make_loader(stream, batch_size=4, prepare=prepare_most)
    with pytest.raises(TooManyLostError, match=r"lost 6 samples .*\n.*image unreadable: 6 "):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_samples_of_dropped_batches_are_counted(
    tars: Path, num_workers: int, drop_last: bool
) -> None:
    pytest.importorskip("torchdata")
    loader = make_loader(
        stream_records(tars), batch_size=5, num_workers=num_workers, drop_last=drop_last
    )
    for _ in range(2):  # each epoch anew
        found = len(flatten(loader))
        report = read_report(loader.state_dict())
        assert found + report.dropped_samples == SHARDS * SAMPLES == report.samples
        # 56 is 1 above a multiple of 5; two workers have 28 each, which is 3 above one.
        assert report.dropped_samples == (2 * 3 if num_workers else 1) * drop_last


def write_columns(folder: Path, *without: Collection[str]) -> Path:
    """A shard of Parquet for each collection of columns, which it lacks."""
    folder.mkdir()
    for shard, columns in enumerate(without):
        row = {
            "image": {"bytes": encode_noise(shard), "path": None}, "captions": ["ein Bild"],
            "long_captions": ["ein langer Satz"], "lang": "de", "group_id": "g", "license": "CC0",
        }  # fmt: skip
        kept = {name: value for name, value in row.items() if name not in columns}
        pq.write_table(pa.Table.from_pylist([kept] * 3), folder / f"{shard:05d}.parquet")
    return folder


@pytest.mark.parametrize("column", ["lang", "group_id", "long_captions", "captions", "image"])
@pytest.mark.parametrize("lacking", [0, 2])
def test_shards_of_other_columns_are_an_error(tmp_path: Path, column: str, lacking: int) -> None:
    """Whoever reads which shard: each compares with the first shard of the source."""
    columns: list[tuple[str, ...]] = [(), (), ()]
    columns[lacking] = (column,)
    folder = write_columns(tmp_path / "data", *columns)
    first, other = ("00000", "0000[12]") if lacking == 0 else ("00000", "00002")
    message = rf"{other}\.parquet.*{first}\.parquet.*: {column}\. Write"
    stopped = 0
    for number in range(3):
        stream = stream_records(
            folder, process_index=number, num_processes=3, max_lost_share=1, require_images=False
        )
        try:
            list(stream)
        except ShardColumnsError as error:
            assert re.search(message, str(error))
            stopped += 1
    assert stopped == (2 if lacking == 0 else 1)


def test_columns_that_no_shard_has_and_notes_may_be_missing(tmp_path: Path) -> None:
    most = ("lang", "group_id", "long_captions")
    folder = write_columns(tmp_path / "data", most, (*most, "license"), most)
    assert {record.lang for record in stream_records(folder)} == {"en"}


def test_another_name_of_the_captions_is_not_another_column(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "data", ())
    table = pq.read_table(folder / "00000.parquet").rename_columns({"captions": "text"})
    pq.write_table(table, folder / "00001.parquet")
    pq.write_table(table.drop_columns(["lang"]).slice(0, 0), folder / "00002.parquet")  # no rows
    assert len(list_names(stream_records(folder))) == 6


def test_columns_are_compared_although_the_first_shard_cannot_be_read(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "data", (), (), ("lang",))
    (folder / "00000.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ShardColumnsError, match=r"00002\.parquet.*00001\.parquet.*: lang\."):
        list(stream_records(folder, max_lost_share=1))
    (folder / "00001.parquet").write_bytes(b"no Parquet")
    assert len(list_names(stream_records(folder, max_lost_share=1))) == 3


@pytest.mark.slow  # two processes
def test_the_last_samples_of_workers_are_in_their_report(tmp_path: Path) -> None:
    """What is broken behind the last good sample comes with no batch."""
    for shard in range(2):
        members = {"0.png": encode_noise(0), "0.txt": b"a caption", "1.png": b"", "1.txt": b" "}
        write_shard(tmp_path / f"{shard}.tar", members)
    loader = make_loader(stream_records(tmp_path), batch_size=4, num_workers=2)
    assert len(flatten(loader)) == 2
    report = read_report(loader.state_dict())
    assert (report.samples, report.lost_samples, report.shards) == (2, 2, 2)


def test_broken_samples_are_counted_up_to_a_share(tmp_path: Path) -> None:
    image = encode_noise(0)
    members = {f"{n:03d}.png": image for n in range(40)}
    texts = {f"{n:03d}.txt": b"a caption" for n in range(40)}
    texts |= {"007.txt": b"\xff", "009.txt": b" \n", "011.txt": b""}
    mixed = {name: content for pair in zip(members.items(), texts.items(), strict=True)
             for name, content in pair}  # fmt: skip
    mixed |= {"000.json": b"{}", "050.gif": image, "050.png": image, "050.txt": b"two"}
    write_shard(tmp_path / "0.tar", mixed)
    stream = stream_records(tmp_path, max_lost_share=0.01)
    names = list_names(stream)
    assert len(names) == 37 == stream.report.samples
    assert stream.report.lost_samples == 5
    assert stream.report.problems.counts == {
        "not UTF-8": 1,
        "blank caption": 2,
        "members of one sample are not next to each other": 1,
        "several images in one sample": 1,
    }
    with pytest.raises(TooManyLostError, match=r"lost 5 samples .*max_lost_share = 0\.004"):
        list(stream_records(tmp_path, max_lost_share=0.004))


def test_an_unknown_field_stops_a_stream_as_it_stops_loading(tmp_path: Path) -> None:
    for shard in range(2):
        members = {}
        for n in range(30):
            members |= {f"{n:02d}.png": encode_noise(0), f"{n:02d}.json": b'{"text": "a", "no": 1}'}
        write_shard(tmp_path / f"{shard}.tar", members)
    with pytest.raises(TooManyLostError, match="unknown field 'no': 11 "):
        list(stream_records(tmp_path))
    assert len(list(stream_records(tmp_path, ignore_fields=["no"]))) == 60


@pytest.mark.slow  # two processes
def test_errors_of_workers_keep_their_type(served: ShardServer, tars: Path) -> None:
    (tars / "00002.tar").write_bytes(b"no tar")
    with pytest.raises(TooManyLostError, match=r"00002\.tar before sample 0") as lost:
        list(make_loader(stream_records(spell(served), retry=FAST), batch_size=2, num_workers=2))
    traceback.clear_frames(lost.tb)  # they hold the loader, with which its workers end
    served.status["00003.tar"] = 403
    stream = stream_records(spell(served), retry=FAST, max_lost_share=1)
    with pytest.raises(AccessError, match=r"00003\.tar: access denied") as denied:
        list(make_loader(stream, batch_size=2, num_workers=2))
    traceback.clear_frames(denied.tb)


def test_one_shard_is_read_up_to_where_it_is_cut(tars: Path) -> None:
    whole = stream_records(tars, buffer_size=1).read_shard(3)
    assert [record.name for record in whole] == [f"00003.tar/{n:04d}.png" for n in range(SAMPLES)]
    cut = tars / "00003.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    part = stream_records(tars).read_shard(3)
    assert 0 < len(part) < SAMPLES and part == whole[: len(part)]
    cut.unlink()
    with pytest.raises(ValueError, match="no such folder or file"):
        stream_records(cut)


def test_the_part_of_a_process_leaves_groups_out_and_counts_them(tars: Path) -> None:
    stream = stream_records(tars)
    held_out = frozenset({"g0", "g1", "g27"})
    own = replace(stream, process_index=1, num_processes=2, seed=4, excluded_groups=held_out)
    other = replace(stream, process_index=0, num_processes=2, seed=4)
    found = list(own)
    assert not {record.group_id for record in found} & {"g0", "g1", "g27"}
    assert len(found) + own.report.excluded_samples == SHARDS * SAMPLES // 2
    assert not {record.name for record in found} & set(list_names(other))


def test_missing_shards_are_lost_not_waited_for(served: ShardServer, tars: Path) -> None:
    (tars / "00002.tar").unlink()
    stream = stream_records(spell(served), retry=RetryPolicy(first_wait=60), max_lost_share=0.2)
    assert len(list(stream)) == (SHARDS - 1) * SAMPLES
    assert "00002.tar before sample 0" in stream.report.describe()
    for number in (0, 1):
        (tars / f"0000{number}.tar").unlink()
    with pytest.raises(LostFileError, match=r"00001\.tar: no such file"):
        stream_records(spell(served))


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_is_an_error_at_once(served: ShardServer, status: int) -> None:
    slow = RetryPolicy(first_wait=60)
    for number in range(SHARDS):
        served.status[f"{number:05d}.tar"] = status
    with pytest.raises(AccessError, match=r"00000\.tar: access denied .*credentials"):
        stream_records(spell(served), retry=slow)
    served.status.clear()
    stream = stream_records(spell(served), retry=slow)
    served.status["00005.tar"] = status  # they may expire while training runs
    with pytest.raises(AccessError, match=r"00005\.tar: access denied"):
        list(stream)


def test_a_server_that_is_not_there_is_an_error_at_once(served: ShardServer) -> None:
    gone = served.url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(AccessError, match="host cannot be reached"):
        stream_records(f"{gone}/{{0..3}}.tar", retry=RetryPolicy(first_wait=60))


def test_a_server_that_stays_down_is_an_error_after_all_attempts(tars: Path) -> None:
    with ShardServer(tars) as server:
        stream = stream_records(spell(server), retry=FAST)
    with pytest.raises(AccessError, match="host cannot be reached"):
        list(stream)


def test_an_overloaded_server_is_tried_again(served: ShardServer) -> None:
    served.status["00004.tar"] = 503
    stream = stream_records(spell(served), retry=FAST, max_lost_share=0.2)
    assert len(list(stream)) == (SHARDS - 1) * SAMPLES
    assert stream.report.retries == FAST.attempts - 1
    assert "00004.tar: 5 attempts failed" in stream.report.describe()


def test_fewer_shards_than_workers_are_refused(tars: Path) -> None:
    pytest.importorskip("torchdata")
    stream = stream_records(tars, num_processes=4)
    with pytest.raises(ValueError, match="8 shards for 4 processes with 3 workers each"):
        make_loader(stream, batch_size=2, num_workers=3)
    with pytest.raises(ValueError, match="persistent_workers keep the epoch"):
        make_loader(stream, batch_size=2, num_workers=1, persistent_workers=True)


def test_resuming_reads_the_buffers_shards_alone(served: ShardServer) -> None:
    """Not all that came before: hours of a stream would be read again."""
    stream = stream_records(spell(served), buffer_size=4, retry=FAST)
    iterator = iter(stream)
    for _ in range(SAMPLES * 5):
        next(iterator)
    state = stream.state_dict()
    served.requests.clear()
    resumed = stream_records(spell(served), buffer_size=4, retry=FAST)
    resumed.load_state_dict(state)
    next(iter(resumed))
    buffered = {shard for shard in state["buffer"][::2]}
    assert len(served.requests) <= len(buffered) + 2 < SHARDS


def test_the_query_of_a_signed_url_is_not_part_of_a_name(served: ShardServer) -> None:
    urls = [f"{served.url}/0000{number}.tar?signature={number}" for number in range(3)]
    names = list_names(stream_records(urls, buffer_size=1, retry=FAST))
    assert {name.partition("/")[0] for name in names} == {"00000.tar", "00001.tar", "00002.tar"}


SIGNATURES = [
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date={n}&X-Amz-Signature=a/{n}",
    "AWSAccessKeyId=k&Expires={n}&Signature=s{n}%3D",
    "X-Goog-Credential=c%2F{n}&X-Goog-Signature={n}",
    "sv=2024&sr=c&se={n}&sp=r&sig=a/b{n}",
    "Policy=p{n}&Signature=s{n}&Key-Pair-Id=k",
]


@pytest.mark.parametrize("signature", SIGNATURES)
def test_a_stream_of_urls_that_are_signed_anew_is_resumed(
    served: ShardServer, signature: str
) -> None:
    def make(number: int) -> RecordStream:
        query = signature.format(n=number)
        urls = [f"{served.url}/0000{n}.tar?v=1&{query}{n}" for n in range(3)]
        return stream_records(urls, seed=1, buffer_size=4, retry=FAST)

    wanted = list_names(make(1))
    stopped = make(1)
    iterator = iter(stopped)
    head = [next(iterator).name for _ in range(5)]
    resumed = make(2)
    resumed.load_state_dict(stopped.state_dict())
    assert head + list_names(resumed) == wanted
    assert {name.partition("/")[0] for name in wanted} == {f"0000{n}.tar" for n in range(3)}


def test_a_query_that_names_the_shard_or_its_version_is_part_of_it() -> None:
    host = "https://x.example/get"
    one = [f"{host}?file={n}.tar&Signature=s{n}" for n in range(2)]
    again = [f"{host}?file={n}.tar&Signature=t{n}" for n in range(2)]
    other = [f"{host}?file={n}.tar&versionId=2&Signature=s{n}" for n in range(2)]
    assert hash_shards(one) == hash_shards(again) != hash_shards(other)
    assert name_shards(one) == name_shards(again) == ["get?file=0.tar", "get?file=1.tar"]
    plain = ["a/0.tar", "https://x.example/1.tar", "s3://b/2.tar?versionId=3", "pipe:cat 3?sig=1"]
    assert [drop_signature(shard) for shard in plain] == plain
    assert (
        drop_signature("https://x.example/0.tar?sp=1&st=2") == "https://x.example/0.tar?sp=1&st=2"
    )


def test_shards_that_differ_in_their_token_alone_have_names_of_their_own() -> None:
    shards = ["https://x.example/get.tar?token=a", "https://x.example/get.tar?token=b"]
    assert len(set(name_shards(shards))) == 2
    assert hash_shards(shards) != hash_shards(shards[::-1])


def test_a_state_of_another_number_of_workers_is_refused(tars: Path) -> None:
    pytest.importorskip("torchdata")

    def make(num_workers: int) -> Any:
        return make_loader(stream_records(tars, seed=1), batch_size=4, num_workers=num_workers)

    alone = make(0)
    next(iter(alone))
    state = alone.state_dict()
    with pytest.raises(ValueError, match=r"num_workers=0, and this one has 2.*use as many"):
        make(2).load_state_dict(state)
    # As two workers save it.
    of_two = {"_snapshot": {"_main_snapshot": {"_num_workers": 2}, "_worker_snapshots": {}}}
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match=f"num_workers=2, and this one has {num_workers}"):
            make(num_workers).load_state_dict(of_two)
    with pytest.raises(ValueError, match="not the state of a loader"):
        make(0).load_state_dict({"epoch": 1})
    make(0).load_state_dict({})


@pytest.mark.slow  # two processes
def test_a_state_of_two_workers_says_so(tars: Path) -> None:
    loader = make_loader(stream_records(tars, seed=1), batch_size=4, num_workers=2)
    next(iter(loader))
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    with pytest.raises(ValueError, match="num_workers=2, and this one has 0"):
        make_loader(stream_records(tars, seed=1), batch_size=4).load_state_dict(state)


def test_the_package_for_web_servers_is_named_where_it_is_missing(
    served: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ImportError, match=r"aiohttp .*modeling_llm2clip\[remote\]"):
        stream_records(spell(served))


def test_torchdata_is_named_where_it_is_missing(
    tars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchdata", None)
    with pytest.raises(ImportError, match=r"torchdata .*modeling_llm2clip\[remote\]"):
        make_loader(stream_records(tars), batch_size=2)


@pytest.mark.parametrize("path", ["", "  ", None])
def test_rows_with_an_empty_path_are_images_of_their_own(tmp_path: Path, path: str | None) -> None:
    """Otherwise all rows would have one name, so be one group, and have no negatives."""
    rows = [
        {"image": {"bytes": encode_noise(n), "path": path}, "caption": f"{n}"} for n in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    streamed = list(stream_records(tmp_path, buffer_size=1))
    assert [record.group_id for record in streamed] == [f"0.parquet/{n}" for n in range(4)]
    assert [r.name for r in streamed] == [r.name for r in load_records(tmp_path)]


def write_one_path(folder: Path, contents: Sequence[int], **fields: list[str]) -> Path:
    """Write rows whose images all have one path; equal numbers are equal images."""
    rows = [
        {
            "image": {"bytes": encode_noise(n), "path": "image.png"},
            "caption": f"text {row}",
            **{name: values[row] for name, values in fields.items()},
        }
        for row, n in enumerate(contents)
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "0.parquet")
    return folder


def test_images_of_one_path_are_not_taken_for_one_group(tmp_path: Path) -> None:
    """They would not be each other's negatives, so that the loss of every batch would be 0."""
    folder = write_one_path(tmp_path / "images", range(14))
    with pytest.raises(TooManyLostError, match=r"path of another image.*: 1[0-9] "):
        list(stream_records(folder))
    dataset = datasets.load_dataset(
        "parquet", data_files=str(folder / "0.parquet"), split="train", streaming=True
    )
    with pytest.raises(TooManyLostError, match="path of another image"):
        list(stream_dataset(dataset))
    of_one_image = write_one_path(tmp_path / "captions", [3] * 14)
    assert len({record.group_id for record in stream_records(of_one_image)}) == 1
    names = [f"g{n}" for n in range(14)]
    in_groups = write_one_path(tmp_path / "groups", range(14), group_id=names)
    assert sorted(record.group_id for record in stream_records(in_groups)) == sorted(names)


def stream_shared_paths(folder: Path) -> RecordStream:
    """Stream 14 images, of which three have one path."""
    if not folder.exists():
        folder.mkdir()
        rows = [
            {
                "image": {
                    "bytes": encode_noise(n),
                    "path": "same.png" if n in (0, 3, 10) else f"{n}.png",
                },
                "caption": f"text {n}",
            }
            for n in range(14)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "0.parquet", row_group_size=4)
    return stream_records(folder, buffer_size=2, max_lost_share=1.0)


@pytest.mark.parametrize("stop", [2, 5, 11])
def test_a_resumed_stream_knows_the_paths_of_images_before(stop: int, tmp_path: Path) -> None:
    """Otherwise a sample that the whole run lost would come in, or one of its samples be lost."""
    folder = tmp_path / "images"
    whole = stream_shared_paths(folder)
    wanted = list(whole)
    assert (len(wanted), whole.report.lost_samples) == (12, 2)
    stopped = stream_shared_paths(folder)
    iterator = iter(stopped)
    head = [next(iterator) for _ in range(stop)]
    resumed = stream_shared_paths(folder)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert list(map(read, head + list(resumed))) == list(map(read, wanted))
    assert resumed.report == whole.report


def test_a_folder_of_several_formats_is_refused_with_a_pattern(tars: Path) -> None:
    write_parquets(tars.parent / "others")
    for file in (tars.parent / "others").iterdir():
        file.rename(tars / file.name)
    # Beside each tar, and of its name, they are notes on it.
    assert len(stream_records(tars).reader.shards) == SHARDS
    (tars / "00000.parquet").rename(tars / "more.parquet")
    match = rf"8 \.tar, 8 \.parquet.*such as {tars}/\*\.tar"
    with pytest.raises(ValueError, match=match):
        stream_records(tars)
    with pytest.raises(ValueError, match="several sources"):
        load_records(tars)
    for source in (f"{tars}/*.tar", f"{tars}/*.parquet"):
        assert len(stream_records(source).reader.shards) == SHARDS


def test_a_folder_of_several_formats_at_a_service_is_refused() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("0.tar", "1.parquet", "captions.jsonl"):
        memory.pipe(f"/mixed/{name}", b"")
    try:
        with pytest.raises(ValueError, match=r"1 \.tar, 1 \.parquet, 1 \.jsonl"):
            stream_records("memory://mixed")
    finally:
        memory.rm("/mixed", recursive=True)


NAMES = ["x#y.png", "50%.png", "a%20b.png", "a b.png", "what?.png", "größe.png", "a+b&c=d.png"]


@pytest.mark.parametrize("query", ["", "?sig=a/b%2Fc"])
def test_names_of_images_beside_json_lines_are_quoted_in_urls(tmp_path: Path, query: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x").write_bytes(encode_noise(99))  # what an unquoted "x#y" would be
    lines = []
    for number, name in enumerate(NAMES):
        (tmp_path / "images" / name).write_bytes(encode_noise(number))
        lines.append(json.dumps({"image": f"images/{name}", "caption": f"{number}"}))
    (tmp_path / "0.jsonl").write_text("\n".join(lines), encoding="utf-8")
    local = [read(record) for record in load_records(tmp_path / "0.jsonl")]
    with ShardServer(tmp_path) as server:
        stream = stream_records(f"{server.url}/0.jsonl{query}", buffer_size=1, retry=FAST)
        assert [read(record) for record in stream] == local
    assert [read(r) for r in stream_records(tmp_path / "0.jsonl", buffer_size=1)] == local


def test_absolute_paths_of_images_are_read_as_the_local_source_reads_them(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encode_noise(1))
    line = json.dumps({"image": str(tmp_path / "images" / "a.png"), "caption": "a"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.jsonl").write_text(line, encoding="utf-8")
    local = [read(record) for record in load_records(tmp_path / "data" / "0.jsonl")]
    assert [read(record) for record in stream_records(tmp_path / "data" / "0.jsonl")] == local


def test_a_byte_order_mark_is_no_part_of_a_text_in_a_tar(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    members = {
        "0.png": encode_noise(0), "0.txt": mark + "größer".encode(),
        "1.png": encode_noise(1), "1.json": mark + b'{"caption": "a"}',
    }  # fmt: skip
    write_shard(tmp_path / "0.tar", members)
    for records in (load_records(tmp_path / "0.tar"), stream_records(tmp_path / "0.tar")):
        assert sorted(record.captions for record in records) == [("a",), ("größer",)]


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    rows = [pa.array(["0"]), pa.array(["a"]), pa.array(["b"])]
    table = pa.Table.from_arrays(rows, names=["group_id", "caption", "caption"])
    pq.write_table(table, tmp_path / "0.parquet")
    with pytest.raises(ShardColumnsError, match="two columns named 'caption'"):
        list(stream_records(tmp_path, require_images=False))
    with pytest.raises(ValueError, match="two columns of one name"):
        load_records(tmp_path, require_images=False)
