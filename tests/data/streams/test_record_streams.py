"""Streams yield the samples of the local source, shuffled, and resume where they stopped."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import datasets
import pytest
from captioned_files import write_shard
from shard_server import ShardServer
from streamed_shards import (
    FAST,
    SAMPLES,
    SHARDS,
    WRITERS,
    encode_noise,
    flatten,
    list_names,
    pack_image,
    read,
    spell,
    stop_and_resume,
    write_parquets,
    write_rows,
)

from modeling_llm2clip.data.images.image_sources import EncodedImage
from modeling_llm2clip.data.records.dataset_objects import records_from_dataset
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.remote.shard_urls import drop_signature, name_shards
from modeling_llm2clip.data.streams.dataset_streams import stream_dataset
from modeling_llm2clip.data.streams.record_streams import (
    RecordStream,
    make_loader,
    read_report,
    stream_records,
)
from modeling_llm2clip.data.streams.stream_run import TooManyLostError, hash_shards

none_or_two_workers = pytest.mark.parametrize(
    "num_workers", [0, pytest.param(2, marks=pytest.mark.slow)]
)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_stream_has_the_samples_of_the_local_source_and_dropped_connections_lose_none(
    suffix: str, tmp_path: Path
) -> None:
    folder = WRITERS[suffix](tmp_path / "data")
    files = [folder / f"{number:05d}.{suffix}" for number in range(3)]
    local = sorted((read(r) for f in files for r in load_records(f)), key=str)
    with ShardServer(folder) as server:
        source = f"{server.url}/{{00000..00002}}.{suffix}"
        stream = stream_records(source, buffer_size=5, retry=FAST)
        streamed = list(stream)
        server.drop_every = 3
        again = stream_records(source, buffer_size=5, retry=FAST)
        assert list(again) == streamed
        assert server.dropped > 0 and again.report.retries > 0
    assert "request repeated" in again.report.describe()
    assert sorted(map(read, streamed), key=str) == local
    assert {type(record.image) for record in streamed} == {EncodedImage}
    report = stream.report
    assert (report.samples, report.shards) == (3 * SAMPLES, 3)
    assert (report.lost_samples, report.lost_shards, report.retries) == (0, 0, 0)


def test_a_local_folder_and_the_output_of_a_command_are_streams_too(tars: Path) -> None:
    names = [record.name for record in load_records(tars)]
    assert sorted(list_names(stream_records(tars))) == names
    source = f"pipe:cat {tars}/{{00000..{SHARDS - 1:05d}}}.tar"
    assert len(list_names(stream_records(source))) == SHARDS * SAMPLES
    failing = stream_records([f"pipe:cat {tars}/00000.tar; false"], retry=FAST, max_lost_share=1)
    assert list_names(failing) == []  # its output is shorter than what is read at once
    assert failing.report.lost_shards == 1
    assert "the command ended with code 1" in failing.report.describe()


def test_the_order_depends_only_on_seed_and_epoch(tars: Path) -> None:
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


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_resumed_stream_is_the_uninterrupted_one(suffix: str, tmp_path: Path) -> None:
    folder = WRITERS[suffix](tmp_path / "data")

    epochs = chain((2,), cycle((2, 0, 0)))  # a state has its epoch, whatever a resumed stream's is

    def make() -> RecordStream:
        files = sorted(map(str, folder.glob(f"*.{suffix}")))
        stream = stream_records(files, seed=5, buffer_size=10, retry=FAST)
        stream.set_epoch(next(epochs))
        return stream

    whole = make()
    expected = list(whole)
    for stop in (0, 1, 13, 40, SHARDS * SAMPLES - 1):
        yielded, resumed = stop_and_resume(make, stop)
        assert yielded == expected, stop
        assert resumed.report == whole.report


def test_resuming_reads_only_the_shards_of_the_buffer(served: ShardServer) -> None:
    """Otherwise hours of a stream would be re-read."""
    stream = stream_records(spell(served), buffer_size=4, retry=FAST)
    iterator = iter(stream)
    for _ in range(SAMPLES * 5):
        next(iterator)
    state = stream.state_dict()
    served.requests.clear()
    resumed = stream_records(spell(served), buffer_size=4, retry=FAST)
    resumed.load_state_dict(state)
    next(iter(resumed))
    assert len(served.requests) <= len(set(state["buffer"][::2])) + 2 < SHARDS


@pytest.mark.slow  # eight processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_is_the_uninterrupted_one(served: ShardServer, num_workers: int) -> None:
    def make(epoch: int = 0, num_workers: int = num_workers) -> Any:
        stream = stream_records(spell(served), seed=1, buffer_size=6, retry=FAST)
        stream.set_epoch(epoch)
        return make_loader(stream, batch_size=4, num_workers=num_workers)

    loader, epochs = make(), []
    for epoch in range(2):
        loader.dataset.stream.set_epoch(epoch)
        epochs.append(list(loader))
        if epoch == 0:
            between = loader.state_dict()
    assert epochs[0] != epochs[1]
    served.drop_every = 7
    batches, resumed = stop_and_resume(make, 5)
    assert batches == epochs[0]
    resumed.dataset.stream.set_epoch(1)
    assert list(resumed) == epochs[1]
    # Stopped between two epochs, a loader begins the next one.
    next_one = make(epoch=1)
    next_one.load_state_dict(between)
    assert list(next_one) == epochs[1]


def test_a_state_of_another_loader_is_refused(tars: Path) -> None:
    pytest.importorskip("torchdata")
    loader = make_loader(stream_records(tars), batch_size=4)
    next(iter(loader))
    with pytest.raises(ValueError, match=r"num_workers=0, but this loader has 2.*Use the same"):
        make_loader(stream_records(tars), batch_size=4, num_workers=2).load_state_dict(
            loader.state_dict()
        )
    of_two = {"_snapshot": {"_main_snapshot": {"_num_workers": 2}, "_worker_snapshots": {}}}
    with pytest.raises(ValueError, match="num_workers=2, but this loader has 0"):
        loader.load_state_dict(of_two)
    with pytest.raises(ValueError, match="not the state of a loader"):
        loader.load_state_dict({"epoch": 1})
    loader.load_state_dict({})


def test_a_state_of_another_stream_is_refused(tars: Path) -> None:
    stream = stream_records(tars, seed=1)
    next(iter(stream))
    state = stream.state_dict()
    for other, differing in (
        (stream_records(tars, seed=2), "seed"),
        (stream_records(tars, seed=1, buffer_size=3), "buffer_size"),
        (stream_records(sorted(map(str, tars.iterdir()))[1:], seed=1), "shards"),
        (stream_records(tars, seed=1, process_index=1, num_processes=2), "reader"),
    ):
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=f"to another stream: {differing} differ"):
            iter(other)


@pytest.mark.parametrize("is_served", [False, True])
def test_a_shard_that_changed_since_the_state_was_saved_is_refused(
    is_served: bool, tars: Path, served: ShardServer
) -> None:
    """Sample numbers would mean other samples. A copy with the same bytes is accepted."""

    def resume() -> list[CaptionedImage]:
        source = spell(served) if is_served else str(tars)
        stream = stream_records(source, buffer_size=3, retry=FAST)
        stream.load_state_dict(state)
        return list(stream)

    stream = stream_records(spell(served) if is_served else str(tars), buffer_size=3, retry=FAST)
    iterator = iter(stream)
    next(iterator)
    state = json.loads(json.dumps(stream.state_dict()))
    rest = [*iterator]
    shard = tars / f"{state['buffer'][0]:05d}.tar"
    if not is_served:  # its tag would be another one
        shard.touch()
        assert resume() == rest
    shard.write_bytes(tars.joinpath(f"{(state['buffer'][0] + 1) % SHARDS:05d}.tar").read_bytes())
    os.utime(shard, (1, 1))
    with pytest.raises(ValueError, match=r"\.tar has changed since the state was saved"):
        resume()


def prepare_most(record: CaptionedImage) -> str:
    """Pretend to decode; the third sample of each shard is broken."""
    if record.name.endswith("/0002.png"):
        raise ValueError(f"{record.name}: broken")
    return record.name


@none_or_two_workers
def test_samples_that_cannot_be_prepared_are_replaced_by_others(
    tars: Path, num_workers: int
) -> None:
    pytest.importorskip("torchdata")

    def make(max_lost_share: float = 0.01) -> Any:
        stream = stream_records(tars, seed=1, buffer_size=10, max_lost_share=max_lost_share)
        return make_loader(stream, batch_size=4, prepare=prepare_most, num_workers=num_workers)

    loader = make()
    batches = list(loader)
    # Four shards of six samples in each of two workers, or eight of six in one.
    assert {len(batch) for batch in batches} == {4}
    names = [f"{shard:05d}.tar/{n:04d}.png" for shard in range(SHARDS) for n in range(SAMPLES)]
    yielded = sorted(name for batch in batches for name in batch)
    assert yielded == [name for name in names if not name.endswith("2.png")]
    report = read_report(loader.state_dict())
    assert (report.samples, report.lost_samples) == (SHARDS * (SAMPLES - 1), SHARDS)
    assert report.problems.counts == {"image unreadable": SHARDS}
    assert all("0002.png: broken" in place for place in report.problems.places["image unreadable"])
    again, resumed = stop_and_resume(make, 5)
    assert again == batches
    assert read_report(resumed.state_dict()).lost_samples == SHARDS
    if not num_workers:
        with pytest.raises(TooManyLostError, match=r"lost 6 samples .*\n.*image unreadable: 6 "):
            list(make(max_lost_share=0.005))


@none_or_two_workers
def test_the_samples_of_dropped_batches_are_counted(tars: Path, num_workers: int) -> None:
    pytest.importorskip("torchdata")
    for drop_last in (False, True):
        stream = stream_records(tars)
        loader = make_loader(stream, batch_size=5, num_workers=num_workers, drop_last=drop_last)
        for _ in range(2):  # each epoch anew
            num_yielded = len(flatten(loader))
            report = read_report(loader.state_dict())
            assert num_yielded + report.dropped_samples == SHARDS * SAMPLES == report.samples
            # 56 is 1 above a multiple of 5; two workers have 28 each, which is 3 above one.
            assert report.dropped_samples == (2 * 3 if num_workers else 1) * drop_last


def test_fewer_shards_than_workers_are_refused(tars: Path) -> None:
    pytest.importorskip("torchdata")
    stream = stream_records(tars, num_processes=4)
    with pytest.raises(ValueError, match="8 shards for 4 processes with 3 workers each"):
        make_loader(stream, batch_size=2, num_workers=3)
    with pytest.raises(ValueError, match="persistent_workers cannot be used"):
        make_loader(stream, batch_size=2, num_workers=1, persistent_workers=True)


def test_excluded_groups_are_skipped_and_counted(tars: Path) -> None:
    stream = stream_records(tars)
    held_out = frozenset({"g0", "g1", "g27"})
    part = replace(stream, process_index=1, num_processes=2, seed=4, excluded_groups=held_out)
    other = replace(stream, process_index=0, num_processes=2, seed=4)
    records = list(part)
    assert not {record.group_id for record in records} & held_out
    assert len(records) + part.report.excluded_samples == SHARDS * SAMPLES // 2
    assert not {record.name for record in records} & set(list_names(other))


SIGNATURES = [
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date={n}&X-Amz-Signature=a/{n}",
    "AWSAccessKeyId=k&Expires={n}&Signature=s{n}%3D",
    "X-Goog-Credential=c%2F{n}&X-Goog-Signature={n}",
    "sv=2024&sr=c&se={n}&sp=r&sig=a/b{n}",
    "Policy=p{n}&Signature=s{n}&Key-Pair-Id=k",
]


def test_a_stream_of_urls_with_new_signatures_is_resumed(served: ShardServer) -> None:
    def sign(signature: str, number: int) -> list[str]:
        query = signature.format(n=number)
        return [f"{served.url}/0000{n}.tar?v=1&{query}{n}" for n in range(3)]

    for signature in SIGNATURES:
        signed, anew = sign(signature, 1), sign(signature, 2)
        assert signed != anew and hash_shards(signed) == hash_shards(anew)
        assert name_shards(signed) == name_shards(anew) == [f"0000{n}.tar" for n in range(3)]
    numbers = iter(range(4))  # another signature at each start

    def make() -> RecordStream:
        urls = sign(SIGNATURES[0], next(numbers))
        return stream_records(urls, seed=1, buffer_size=4, retry=FAST)

    expected = list_names(make())
    yielded, _ = stop_and_resume(make, 5)
    assert list_names(yielded) == expected


def test_a_query_that_names_the_shard_or_its_version_is_part_of_it() -> None:
    host = "https://x.example/get"
    signed = [f"{host}?file={n}.tar&Signature=s{n}" for n in range(2)]
    again = [f"{host}?file={n}.tar&Signature=t{n}" for n in range(2)]
    other = [f"{host}?file={n}.tar&versionId=2&Signature=s{n}" for n in range(2)]
    assert hash_shards(signed) == hash_shards(again) != hash_shards(other)
    assert name_shards(signed) == name_shards(again) == ["get?file=0.tar", "get?file=1.tar"]
    unknown = [f"https://x.example/{n}.tar?signature={n}" for n in range(2)]
    assert name_shards(unknown) == ["0.tar", "1.tar"]
    plain = ["a/0.tar", "https://x.example/1.tar", "s3://b/2.tar?versionId=3", "pipe:cat 3?sig=1",
             "https://x.example/0.tar?sp=1&st=2"]  # fmt: skip
    assert [drop_signature(shard) for shard in plain] == plain
    # Shards that differ in their token alone have names of their own.
    tokens = ["https://x.example/get.tar?token=a", "https://x.example/get.tar?token=b"]
    assert len(set(name_shards(tokens))) == 2
    assert hash_shards(tokens) != hash_shards(tokens[::-1])


def test_a_package_that_is_missing_is_named_with_its_extra(
    served: ShardServer, tars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ImportError, match=r"aiohttp .*modeling_llm2clip\[remote\]"):
        stream_records(spell(served))
    monkeypatch.setitem(sys.modules, "torchdata", None)
    with pytest.raises(ImportError, match=r"torchdata .*modeling_llm2clip\[remote\]"):
        make_loader(stream_records(tars), batch_size=2)


@pytest.mark.parametrize("path", ["", "  ", None])
def test_rows_with_an_empty_path_are_images_of_their_own(tmp_path: Path, path: str | None) -> None:
    """Otherwise all rows would be one group, without negatives."""
    rows = [{"image": pack_image(n, path), "caption": f"{n}"} for n in range(4)]
    write_rows(tmp_path / "0.parquet", rows)
    streamed = list(stream_records(tmp_path, buffer_size=1))
    assert [record.group_id for record in streamed] == [f"0.parquet/{n}" for n in range(4)]
    assert [r.name for r in streamed] == [r.name for r in load_records(tmp_path)]


def test_different_images_with_one_path_are_not_one_group(tmp_path: Path) -> None:
    """They would not be each other's negatives, so the loss of every batch would be 0."""

    def write(name: str, numbers: Any, **fields: list[str]) -> Path:
        rows = [
            {"image": pack_image(n, "image.png"), "caption": f"text {row}",
             **{name: values[row] for name, values in fields.items()}}
            for row, n in enumerate(numbers)
        ]  # fmt: skip
        write_rows(tmp_path / name / "0.parquet", rows)
        return tmp_path / name

    folder = write("images", range(14))
    with pytest.raises(TooManyLostError, match=r"path of another image.*: 1[0-9] "):
        list(stream_records(folder))
    rows = datasets.load_dataset("parquet", data_files=str(folder / "0.parquet"), split="train")

    def make() -> RecordStream:
        return stream_dataset(rows.to_iterable_dataset(), buffer_size=1)

    whole = list(make())  # rows of a dataset are named by their numbers, as in its table
    assert len({record.group_id for record in whole}) == len(records_from_dataset(rows)) == 14
    assert stop_and_resume(make, 5)[0] == whole
    of_one_image = write("captions", [3] * 14)
    assert len({record.group_id for record in stream_records(of_one_image)}) == 1
    names = [f"g{n}" for n in range(14)]
    in_groups = write("groups", range(14), group_id=names)
    assert sorted(record.group_id for record in stream_records(in_groups)) == sorted(names)


def test_a_resumed_stream_knows_the_paths_of_images_before(tmp_path: Path) -> None:
    """Otherwise a sample that the whole run lost would come in, or one of its samples be lost."""
    rows = [
        {"image": pack_image(n, "same.png" if n in (0, 3, 10) else f"{n}.png"), "caption": f"{n}"}
        for n in range(14)
    ]
    write_rows(tmp_path / "0.parquet", rows, row_group_size=4)

    def make() -> RecordStream:
        return stream_records(tmp_path, buffer_size=2, max_lost_share=1.0)

    whole = make()
    expected = list(map(read, whole))
    assert (len(expected), whole.report.lost_samples) == (12, 2)
    for stop in (2, 5, 11):
        yielded, resumed = stop_and_resume(make, stop)
        assert list(map(read, yielded)) == expected
        assert resumed.report == whole.report


def test_a_folder_of_several_formats_is_refused_with_a_pattern(tars: Path) -> None:
    for file in write_parquets(tars.parent / "others").iterdir():
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


NAMES = ["x#y.png", "50%.png", "a%20b.png", "a b.png", "what?.png", "größe.png", "a+b&c=d.png"]


def test_images_next_to_json_lines_may_have_any_names(tmp_path: Path) -> None:
    """URLs quote them; an absolute path means the same as in a local source."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "x").write_bytes(encode_noise(99))  # what an unquoted "x#y" would be
    for number, name in enumerate(NAMES):
        (images / name).write_bytes(encode_noise(number))
    paths = [f"images/{name}" for name in NAMES]
    for file, lines in (("0.jsonl", paths), ("absolute.jsonl", [str(images / NAMES[0])])):
        content = [json.dumps({"image": path, "caption": f"{n}"}) for n, path in enumerate(lines)]
        (tmp_path / file).write_text("\n".join(content), encoding="utf-8")
        local = [read(record) for record in load_records(tmp_path / file)]
        assert [read(r) for r in stream_records(tmp_path / file, buffer_size=1)] == local
    local = [read(record) for record in load_records(tmp_path / "0.jsonl")]
    with ShardServer(tmp_path) as server:
        for query in ("", "?sig=a/b%2Fc"):
            stream = stream_records(f"{server.url}/0.jsonl{query}", buffer_size=1, retry=FAST)
            assert [read(record) for record in stream] == local


def test_a_name_means_the_same_file_to_a_stream_and_to_a_table(tmp_path: Path) -> None:
    """A link is followed before `..`, whitespace counts, and braces in a folder's name stay."""
    folder, elsewhere = tmp_path / "{v1}", tmp_path / "elsewhere" / "sub"
    for number, images in enumerate((folder, tmp_path / "v1", elsewhere.parent)):
        images.mkdir()
        for name in (" a.png", "a.png"):
            (images / name).write_bytes(encode_noise(2 * number + len(name) % 2))
    elsewhere.mkdir()
    (folder / "sub").symlink_to(elsewhere)
    names = ["./a.png", " a.png", "sub/../a.png", "sub/.././/./ a.png"]
    lines = [json.dumps({"image": name, "caption": f"{n}"}) for n, name in enumerate(names)]
    for images in (folder, tmp_path / "v1"):
        (images / "captions.jsonl").write_text("\n".join(lines[: 4 if images == folder else 1]))
    for source in (folder, folder / "captions.jsonl", folder / "*.jsonl"):
        local = [record.image.read_bytes() for record in load_records(source)]  # type: ignore[union-attr]
        streamed = stream_records(source, buffer_size=1)
        assert [record.image.read_bytes() for record in streamed] == local  # type: ignore[union-attr]
    assert len(set(local)) == 4


def test_a_byte_order_mark_is_not_part_of_a_text_in_a_tar(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    members = {
        "0.png": encode_noise(0), "0.txt": mark + "größer".encode(),
        "1.png": encode_noise(1), "1.json": mark + b'{"caption": "a"}',
    }  # fmt: skip
    write_shard(tmp_path / "0.tar", members)
    for records in (load_records(tmp_path / "0.tar"), stream_records(tmp_path / "0.tar")):
        assert sorted(record.captions for record in records) == [("a",), ("größer",)]
