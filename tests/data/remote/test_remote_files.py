"""The same shards through every protocol: S3, the Hub, web servers, commands."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from captioned_files import write_shard
from hub_server import HubFile, HubServer
from PIL import Image
from shard_server import ShardServer

from modeling_llm2clip.data.remote import remote_access, remote_files
from modeling_llm2clip.data.remote.remote_access import (
    AccessError,
    LostFileError,
    RetryPolicy,
    describe,
    sort_failure,
    try_request,
)
from modeling_llm2clip.data.remote.remote_files import RemoteFile
from modeling_llm2clip.data.remote.shard_urls import expand_braces, find_base, list_shards
from modeling_llm2clip.data.streams.record_streams import make_loader, stream_records

FAST = RetryPolicy(first_wait=0.001)
CONTENT = bytes(range(256)) * 100


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of three samples."""
    Image.new("RGB", (9, 6), "red").save(tmp_path / "red.png")
    image = (tmp_path / "red.png").read_bytes()
    for shard in range(2):
        members = {}
        for sample in range(3):
            members |= {f"{sample}.png": image, f"{sample}.txt": f"{shard} {sample}".encode()}
        write_shard(tmp_path / "data" / f"{shard}.tar", members)
    return tmp_path / "data"


CAPTIONS = sorted(f"{shard} {sample}" for shard in range(2) for sample in range(3))


def captions_of(source: Any, **options: Any) -> list[str]:
    stream = stream_records(source, retry=FAST, **options)
    return sorted(record.captions[0] for record in stream)


@pytest.fixture
def bucket(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server on loopback, with the shards in `bucket/data`."""
    moto = pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1",
                "EC2_METADATA_DISABLED": "true", "ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "MAX_ATTEMPTS": "1"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    filesystem.makedirs("bucket", exist_ok=True)  # moto keeps it in this process
    for file in shards.iterdir():
        filesystem.pipe_file(f"bucket/data/{file.name}", file.read_bytes())
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield server
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.mark.slow  # moto takes seconds to start
@pytest.mark.usefixtures("bucket")
def test_s3_is_read() -> None:
    for source in ("s3://bucket/data", "s3://bucket/data/*.tar", "s3://bucket/data/{0..1}.tar"):
        assert captions_of(source) == CAPTIONS
    loader = make_loader(stream_records("s3://bucket/data"), batch_size=2, num_workers=2)
    assert sorted(record.captions[0] for batch in loader for record in batch) == CAPTIONS
    with pytest.raises(LostFileError, match=r"s3://bucket/none/0\.tar: no such file"):
        stream_records("s3://bucket/none/0.tar", retry=FAST)


@pytest.mark.slow
@pytest.mark.usefixtures("bucket")
def test_missing_s3_credentials_are_an_immediate_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(AccessError, match=r"s3://bucket/data/0\.tar: access denied.*credentials"):
        stream_records("s3://bucket/data/0.tar", retry=RetryPolicy(first_wait=60))


@pytest.fixture
def hub(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback, with the shards in `datasets/owner/pairs`."""
    from huggingface_hub import HfFileSystem, constants

    with HubServer() as server:
        repository = server.create_repository("owner/pairs")
        files = {f"data/{file.name}": HubFile(file.read_bytes()) for file in shards.iterdir()}
        repository.add_commit("main", "shards", files)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        HfFileSystem.clear_instance_cache()
        yield server
        HfFileSystem.clear_instance_cache()


def test_the_hub_is_read_and_a_private_dataset_denied_at_once(hub: HubServer) -> None:
    base = "hf://datasets/owner/pairs/data"
    for source in (base, f"{base}/*.tar", f"{base}/{{0..1}}.tar"):
        assert captions_of(source) == CAPTIONS
    hub.repositories["owner/pairs"].private = True
    with pytest.raises(AccessError, match=r"hf://datasets/owner/pairs/data/0\.tar: access denied"):
        stream_records(f"{base}/0.tar", retry=RetryPolicy(first_wait=60))


@pytest.mark.usefixtures("shards")
def test_a_text_file_can_list_shards(tmp_path: Path) -> None:
    with ShardServer(tmp_path) as server:
        (tmp_path / "list.txt").write_text(
            f"# the shards\n{server.url}/data/{{0..1}}.tar\n\n", encoding="utf-8"
        )
        assert captions_of(tmp_path / "list.txt") == CAPTIONS
        assert captions_of(f"{server.url}/list.txt") == CAPTIONS


def test_a_silent_server_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "_SILENT_SECONDS", 0.2)
    (tmp_path / "file").write_bytes(CONTENT)
    retries: list[str] = []
    with ShardServer(tmp_path) as server:
        server.stall_every = 3
        for _ in range(4):
            file = RemoteFile(
                f"{server.url}/file", FAST, on_retry=lambda url, _: retries.append(url)
            )
            stream = file.open_stream()
            assert stream.read(len(CONTENT) + 1) == CONTENT
            stream.close()
    assert retries


def test_a_file_that_gets_shorter_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_BLOCK_BYTES", 1000)
    place = tmp_path / "file"
    place.write_bytes(CONTENT)
    with ShardServer(tmp_path, tags=False) as server:
        file = RemoteFile(f"{server.url}/file", FAST)
        assert file.describe().size == len(CONTENT)
        place.write_bytes(CONTENT[:5000])
        with pytest.raises(LostFileError, match="file: the file changed while it was in use"):
            file.read_range(4000, 8000)


def test_tags_of_each_reply_are_refused_with_a_remedy_and_weak_ones_are_not_compared(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with ShardServer(tmp_path, tags="varying") as server:
        with pytest.raises(LostFileError, match="if its server changes the tag"):
            RemoteFile(f"{server.url}/file", FAST).read_range(0, 9)
    with ShardServer(tmp_path, tags="weak") as server:
        for _ in range(3):
            assert RemoteFile(f"{server.url}/file", FAST).open_stream().read() == CONTENT


@pytest.mark.parametrize("place", ["file", "memory"])
def test_a_file_that_changes_between_two_opens_is_an_error(place: str, tmp_path: Path) -> None:
    """Only the time changes, not the size."""
    url = f"{place}://{tmp_path}/file"
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(path, CONTENT)
    file = RemoteFile(url, FAST)
    assert file.read_range(0, 99) == CONTENT[:99]
    again = RemoteFile(url, FAST, info=file.info)
    filesystem.pipe_file(path, CONTENT[::-1])
    with pytest.raises(LostFileError, match="the file changed while it was in use"):
        again.read_range(0, 99)
    assert RemoteFile(url, FAST).read_range(0, 99) == CONTENT[::-1][:99]


@pytest.mark.parametrize(
    ("ranges", "packs"), [(True, "willing"), (True, "always"), (False, "willing")]
)
def test_a_file_without_range_requests_is_refused_with_a_remedy(
    ranges: bool, packs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has no ranges, or compresses the file against the client's wish."""
    monkeypatch.setattr(remote_files, "_BLOCK_BYTES", 1000)  # less than the file has
    content = b"compressible " * 500
    (tmp_path / "file").write_bytes(content)
    with ShardServer(tmp_path, ranges=ranges) as server:
        server.packs = packs
        url = f"{server.url}/file"
        if ranges and packs == "willing":
            assert RemoteFile(url, FAST).open_stream().read() == content
            return
        with pytest.raises(AccessError, match=rf"stream tar shards .*pipe:curl -sf {url}"):
            RemoteFile(url, FAST).open_stream().read()
        assert RemoteFile(f"pipe:curl -sf --compressed {url}", FAST).open_stream().read() == content


def test_a_server_that_sends_another_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with ShardServer(tmp_path) as server:
        server.shift = 7
        with pytest.raises(AccessError, match=r"sent bytes 7-\d+/25600 when bytes 0-\d+ was"):
            RemoteFile(f"{server.url}/file", FAST).read_range(0, 100)


def test_a_pipeline_that_is_not_read_to_its_end_is_ended() -> None:
    """Only its shell is a child of this process, not the command that writes."""
    stream = RemoteFile("pipe:(echo text; sleep 5) | cat", FAST).open_stream()
    assert stream.readline() == b"text\n"
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(RetryPolicy(5, 0.5, 3.0), [0.5, 1.0, 2.0, 3.0]), (RetryPolicy(1), []), (RetryPolicy(0), [])],
    ids=["five", "one", "none"],
)
def test_waits_double_and_end(
    policy: RetryPolicy, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote_access, "time", SimpleNamespace(sleep=waits.append))
    calls: list[Exception] = []

    def fail(error: Exception) -> None:
        calls.append(error)
        raise error

    attempts = len(expected) + 1  # at least one is made
    message = f"x: {attempts} attempts failed, the last with TimeoutError: slow"
    with pytest.raises(LostFileError, match=message):
        try_request("x", lambda: fail(TimeoutError("slow")), policy)
    assert len(calls) == attempts and waits == expected
    with pytest.raises(TypeError, match="a bug"):  # which is not taken for one of the network
        try_request("x", lambda: fail(TypeError("a bug")), policy)
    assert len(calls) == attempts + 1


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class _StatusError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (_StatusError(401), "denied"),
        (_StatusError(404), "missing"),
        (_StatusError(416), "missing"),
        (_StatusError(429), "passing"),
        (_StatusError(503), "passing"),
        (PermissionError("Access Denied"), "denied"),
        (_StatusError(400), "denied"),  # of S3, for expired credentials
        (FileNotFoundError("gone"), "missing"),
        (ConnectionRefusedError("refused"), "unreachable"),
        (socket.gaierror("no such host"), "unreachable"),
        (ConnectionResetError("reset"), "passing"),
        (TimeoutError(), "passing"),
        (_caused(FileNotFoundError("a"), _StatusError(403)), "denied"),
        (_caused(FileNotFoundError("a"), ConnectionResetError("reset")), "passing"),
        (_caused(FileNotFoundError("a"), ConnectionRefusedError("refused")), "unreachable"),
    ],
)  # fmt: skip
def test_failures_are_classified_by_their_causes(error: Exception, kind: str) -> None:
    assert sort_failure(error) == kind
    assert describe(error)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{00..02}.tar", ["00.tar", "01.tar", "02.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{098..101}", ["098", "099", "100", "101"]),
        ("{2..1}", ["2", "1"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{x}", ["x"]),
    ],
)
def test_braces_are_spelled_as_a_shell_does(pattern: str, names: list[str]) -> None:
    assert list(expand_braces(pattern)) == names


def test_names_are_relative_to_what_all_shards_share() -> None:
    assert find_base(["s3://b/x/1.tar", "s3://b/x/2.tar"]) == "s3://b/x/"
    assert find_base(["s3://b/x/1.tar", "s3://b/y/1.tar"]) == "s3://b/"
    assert find_base(["s3://b/x/1.tar", "gs://b/y/1.tar"]) == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://host/folder", "web servers do not list files"),
        ("nowhere/x.tar", "no such folder or file"),
        (["a.tar", "a.tar"], r"a\.tar occurs twice"),
        (["a.tar", "b.parquet"], r"found \.parquet, \.tar\. All shards must have one format"),
        ("odd://host/a.tar", "Protocol not known"),
    ],
)
def test_invalid_sources_are_refused(
    source: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.tar", "b.parquet"):
        (tmp_path / name).touch()
    with pytest.raises((ValueError, AccessError), match=message):
        list_shards(source, FAST)
        stream_records(source, retry=FAST)
