"""A stream counts and names lost data, up to a limit; other errors stop it immediately."""

from __future__ import annotations

import re
import resource
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from captioned_files import write_shard
from shard_server import ShardServer
from streamed_shards import (
    FAST,
    SAMPLES,
    SHARDS,
    encode_noise,
    flatten,
    list_names,
    pack_image,
    spell,
    write_parquets,
    write_rows,
    write_tars,
)
from torch import Tensor

from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.remote.remote_access import AccessError, LostFileError, RetryPolicy
from modeling_llm2clip.data.sources.shard_streams import ShardColumnsError
from modeling_llm2clip.data.streams.record_streams import make_loader, read_report, stream_records
from modeling_llm2clip.data.streams.stream_run import TooManyLostError

SLOW = RetryPolicy(first_wait=60)  # a test that waited would not end


def damage_page(file: Path) -> None:
    """Overwrite the header of a page in the second of three row groups."""
    page = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content = file.read_bytes()
    file.write_bytes(content[:page] + b"\xff" * 8 + content[page + 8 :])


@pytest.mark.parametrize("kind", ["truncated tar", "damaged page", "damaged page of a server"])
def test_a_shard_that_ends_early_is_named_and_the_others_are_read(
    kind: str, tmp_path: Path
) -> None:
    suffix = "tar" if kind == "truncated tar" else "parquet"
    folder = (write_tars if suffix == "tar" else write_parquets)(tmp_path / "data")
    broken = folder / f"00003.{suffix}"
    if suffix == "tar":
        broken.write_bytes(broken.read_bytes()[:9000])
    else:
        damage_page(broken)
    with ShardServer(folder) as server:
        source = spell(server, suffix) if "server" in kind else str(folder)
        stream = stream_records(source, max_lost_share=0.2, retry=FAST)
        counts = Counter(name.split("/")[0] for name in list_names(stream))
        assert counts.pop(broken.name, 0) < SAMPLES and set(counts.values()) == {SAMPLES}
        assert stream.report.lost_shards == 1
        assert len(counts) == stream.report.shards == SHARDS - 1
        assert f"{broken.name} before sample" in stream.report.describe()
        with pytest.raises(TooManyLostError, match=rf"1 of 8 shards.*\n.*{broken.name} before sa"):
            list(stream_records(source, retry=FAST))


def test_a_shard_that_is_lost_on_resume_is_counted_once(tars: Path, tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shutil.copy(tars / "00000.tar", shard)
    first, resumed = (stream_records(shard, buffer_size=4, max_lost_share=1) for _ in range(2))
    next(iter(first))
    shard.unlink()
    resumed.load_state_dict(first.state_dict())
    assert list_names(resumed) == []
    assert (resumed.report.lost_shards, resumed.report.shards) == (1, 0)


def test_a_shard_cut_at_a_block_is_noticed(tars: Path, tmp_path: Path) -> None:
    """Where tarfile takes the end of the file for the end of the archive."""
    whole = (tars / "00000.tar").read_bytes()
    for size in range(1536, 12000, 512):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        stream = stream_records(tmp_path / "cut.tar", max_lost_share=1)
        assert len(list_names(stream)) < SAMPLES and stream.report.lost_shards == 1


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


def write_columns(folder: Path, *without: Collection[str]) -> Path:
    """A shard of Parquet for each collection of columns, which it lacks."""
    for shard, columns in enumerate(without):
        row = {
            "image": pack_image(shard), "captions": ["ein Bild"], "lang": "de", "group_id": "g",
            "long_captions": ["ein langer Satz"], "license": "CC0",
        }  # fmt: skip
        kept = {name: value for name, value in row.items() if name not in columns}
        write_rows(folder / f"{shard:05d}.parquet", [kept] * 3)
    return folder


@pytest.mark.parametrize(
    ("column", "lacking"),
    [("lang", 0), ("group_id", 2), ("long_captions", 0), ("captions", 2), ("image", 0)],
)
def test_shards_of_other_columns_are_an_error(tmp_path: Path, column: str, lacking: int) -> None:
    """Every reader compares its shards with the first shard of the source."""
    columns: list[tuple[str, ...]] = [(), (), ()]
    columns[lacking] = (column,)
    folder = write_columns(tmp_path / "data", *columns)
    other = "0000[12]" if lacking == 0 else "00002"
    stopped = 0
    for number in range(3):
        stream = stream_records(
            folder, process_index=number, num_processes=3, max_lost_share=1, require_images=False
        )
        try:
            list(stream)
        except ShardColumnsError as error:
            assert re.search(rf"{other}\.parquet.*00000\.parquet.*: {column}\. Write", str(error))
            stopped += 1
    assert stopped == (2 if lacking == 0 else 1)


def test_columns_that_change_no_record_may_differ(tmp_path: Path) -> None:
    """Columns that no shard has, notes, other names of captions, and an empty shard."""
    most = ("lang", "group_id", "long_captions")
    folder = write_columns(tmp_path / "missing", most, (*most, "license"), most)
    assert {record.lang for record in stream_records(folder)} == {"en"}
    folder = write_columns(tmp_path / "renamed", ())
    table = pq.read_table(folder / "00000.parquet").rename_columns({"captions": "text"})
    pq.write_table(table, folder / "00001.parquet")
    pq.write_table(table.drop_columns(["lang"]).slice(0, 0), folder / "00002.parquet")  # no rows
    assert len(list_names(stream_records(folder))) == 6


@pytest.mark.parametrize("read", [load_records, stream_records])
@pytest.mark.parametrize("name", ["caption", "text", "long_captions"])
def test_ignored_columns_may_differ(read: Callable[..., Any], name: str, tmp_path: Path) -> None:
    """Also if the field goes by another name, and if other captions are chosen."""
    folder = write_columns(tmp_path, ("long_captions",), ("long_captions",))
    first, second = (pq.read_table(file) for file in sorted(folder.iterdir()))
    names = {"captions": "shortSV_captions"}
    pq.write_table(first.rename_columns(names), folder / "00000.parquet")
    second = second.append_column(name, second["captions"]).rename_columns(names)
    pq.write_table(second, folder / "00001.parquet")
    for options in ({"ignore_fields": [name]}, {"caption_fields": ["shortSV_captions"]}):
        assert {record.captions for record in read(folder, **options)} == {("ein Bild",)}
    with pytest.raises(ValueError, match=r"(?s)column.*captions"):
        list(read(folder))


def test_columns_are_compared_although_the_first_shard_cannot_be_read(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "data", (), (), ("lang",))
    (folder / "00000.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ShardColumnsError, match=r"00002\.parquet.*00001\.parquet.*: lang\."):
        list(stream_records(folder, max_lost_share=1))
    (folder / "00001.parquet").write_bytes(b"no Parquet")
    assert len(list_names(stream_records(folder, max_lost_share=1))) == 3


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    rows = [pa.array(["0"]), pa.array(["a"]), pa.array(["b"])]
    table = pa.Table.from_arrays(rows, names=["group_id", "caption", "caption"])
    pq.write_table(table, tmp_path / "0.parquet")
    with pytest.raises(ShardColumnsError, match="two columns named 'caption'"):
        list(stream_records(tmp_path, require_images=False))
    with pytest.raises(ValueError, match="two columns of one name"):
        load_records(tmp_path, require_images=False)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ({"bytes": "text"}, "is not a non-blank text"),
        ({"bytes": b"x", "path": 3}, "image of other types than"),
    ],
)
def test_an_image_of_another_type_is_a_broken_sample(
    image: Any, problem: str, tmp_path: Path
) -> None:
    pq.write_table(pa.Table.from_pylist([{"image": image, "caption": "a"}]), tmp_path / "0.parquet")
    stream = stream_records(tmp_path, max_lost_share=0.0)
    with pytest.raises(ValueError, match=rf"{problem}.*0\.parquet row 0"):
        list(stream)


def test_broken_samples_are_counted_up_to_a_share(tmp_path: Path) -> None:
    image = encode_noise(0)
    members = {f"{n:03d}.png": image for n in range(40)}
    texts = {f"{n:03d}.txt": b"a caption" for n in range(40)}
    texts |= {"007.txt": b"\xff", "009.txt": b" \n", "011.txt": b""}
    mixed = {name: content for pair in zip(members.items(), texts.items(), strict=True)
             for name, content in pair}  # fmt: skip
    mixed["039.json"] = b'{"no": 1}'
    mixed |= {"000.json": b"{}", "050.gif": image, "050.png": image, "050.txt": b"two"}
    write_shard(tmp_path / "0.tar", mixed)
    stream = stream_records(tmp_path, max_lost_share=0.01)
    names = list_names(stream)
    assert len(names) == 36 == stream.report.samples
    assert stream.report.lost_samples == 6
    assert stream.report.problems.counts == {
        "not UTF-8": 1,
        "blank caption": 2,
        "unknown field 'no'": 1,
        "members of one sample are not next to each other": 1,
        "several images in one sample": 1,
    }
    with pytest.raises(TooManyLostError, match=r"lost 6 samples .*max_lost_share = 0\.005"):
        list(stream_records(tmp_path, max_lost_share=0.005))
    assert len(list(stream_records(tmp_path, ignore_fields=["no"]))) == 37


@pytest.mark.slow  # two processes
def test_the_last_samples_of_workers_are_in_their_report(tmp_path: Path) -> None:
    """Broken samples after the last good one come with no batch."""
    for shard in range(2):
        members = {"0.png": encode_noise(0), "0.txt": b"a caption", "1.png": b"", "1.txt": b" "}
        write_shard(tmp_path / f"{shard}.tar", members)
    loader = make_loader(stream_records(tmp_path), batch_size=4, num_workers=2)
    assert len(flatten(loader)) == 2
    report = read_report(loader.state_dict())
    assert (report.samples, report.lost_samples, report.shards) == (2, 2, 2)


@pytest.mark.slow  # four processes
def test_errors_in_workers_keep_their_type(served: ShardServer, tars: Path) -> None:
    (tars / "00002.tar").write_bytes(b"no tar")
    with pytest.raises(TooManyLostError, match=r"00002\.tar before sample 0") as lost:
        list(make_loader(stream_records(spell(served), retry=FAST), batch_size=2, num_workers=2))
    traceback.clear_frames(lost.tb)  # they hold the loader, with which its workers end
    served.status["00003.tar"] = 403
    stream = stream_records(spell(served), retry=FAST, max_lost_share=1)
    with pytest.raises(AccessError, match=r"00003\.tar: access denied") as denied:
        list(make_loader(stream, batch_size=2, num_workers=2))
    traceback.clear_frames(denied.tb)


def test_a_worker_without_shared_memory_is_an_error(tars: Path) -> None:
    pytest.importorskip("torchdata")

    def collate(records: list[Any]) -> dict[str, Tensor]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))  # the worker's
        return {"small": torch.zeros(9), "large": torch.zeros(len(records), 2**14)}

    loader = make_loader(
        stream_records(tars), batch_size=3, num_workers=1, collate=collate, timeout=30
    )
    with pytest.raises(OSError, match=r"no room .* shared memory .*--num-workers 0.*--shm") as full:
        list(loader)
    traceback.clear_frames(full.tb)


@pytest.mark.slow
def test_missing_shards_are_lost_not_waited_for(served: ShardServer, tars: Path) -> None:
    (tars / "00002.tar").unlink()
    stream = stream_records(spell(served), retry=SLOW, max_lost_share=0.2)
    assert len(list(stream)) == (SHARDS - 1) * SAMPLES
    assert "00002.tar before sample 0" in stream.report.describe()
    for number in (0, 1):
        (tars / f"0000{number}.tar").unlink()
    with pytest.raises(LostFileError, match=r"00001\.tar: no such file"):
        stream_records(spell(served))


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_is_an_immediate_error(served: ShardServer, status: int) -> None:
    for number in range(SHARDS):
        served.status[f"{number:05d}.tar"] = status
    with pytest.raises(AccessError, match=r"00000\.tar: access denied .*credentials"):
        stream_records(spell(served), retry=SLOW)
    served.status.clear()
    stream = stream_records(spell(served), retry=SLOW)
    served.status["00005.tar"] = status  # they may expire while training runs
    with pytest.raises(AccessError, match=r"00005\.tar: access denied"):
        list(stream)


def test_a_server_that_is_not_there_is_an_error(tars: Path) -> None:
    """Immediately at first, or after all attempts if the server was there before."""
    with ShardServer(tars) as server:
        gone = server.url.replace("127.0.0.1", "127.0.0.2")
        with pytest.raises(AccessError, match="host cannot be reached"):
            stream_records(f"{gone}/{{0..3}}.tar", retry=SLOW)
        stream = stream_records(spell(server), retry=FAST)
    with pytest.raises(AccessError, match="host cannot be reached"):
        list(stream)


def test_an_overloaded_server_is_tried_again(served: ShardServer) -> None:
    served.status["00004.tar"] = 503
    stream = stream_records(spell(served), retry=FAST, max_lost_share=0.2)
    assert len(list(stream)) == (SHARDS - 1) * SAMPLES
    assert stream.report.retries == FAST.attempts - 1
    assert "00004.tar: 5 attempts failed" in stream.report.describe()
