"""Reads the samples of one shard sequentially, including their image bytes.

Samples are numbered within their shard, including broken samples, so shard and number identify a
sample.
"""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..images.image_sources import EncodedImage
from ..record_fields import RawRecord
from ..remote.remote_access import AccessError, LostFileError
from ..remote.remote_files import RemoteFile
from ..remote.shard_urls import find_format, name_beside
from .download_notes import (
    KEY,
    choose_download_columns,
    find_failure,
    is_download,
)
from .json_files import number_lines, parse_object
from .parquet import is_image_type
from .tar_shards import (
    SEVERAL_IMAGES,
    BoundedHeader,
    TarSample,
    iterate_members,
    read_member,
    require_end,
    split_member,
)

_TAR_BUFFER = 2**18
_ROWS_AT_ONCE = 16
_SHARED_PATH = "path of another image, and no 'file_name' or 'group_id'"


class StreamedSample(NamedTuple):
    """A sample of a shard, broken or not.

    Attributes:
        number: Number in its shard, from 0.
        place: Location of the sample, for messages.
        raw: Fields, and the image in memory; None if the sample is broken or skipped.
        problem: The error; empty if there is none.
        is_skipped: Whether the sample is a row whose image was never downloaded.
    """

    number: int
    place: str
    raw: RawRecord | None
    problem: str = ""
    is_skipped: bool = False


class ShardColumnsError(ValueError):
    """Two shards of a source have different columns; the message names both and the columns."""


ShardColumns: TypeAlias = tuple[str, frozenset[str]]  # name of the shard, fields of its records


class BrokenShardError(Exception):
    """A shard ends early or is damaged; the samples before that point are good."""


def read_shard(
    file: RemoteFile,
    name: str,
    *,
    first: int = 0,
    on_columns: Callable[[ShardColumns], None] | None = None,
) -> Iterator[StreamedSample]:
    """Yield the samples of a shard from number `first`."""
    suffix = find_format(file.url)
    if suffix == ".parquet":
        yield from refuse_shared_paths(_read_parquet(file, name, on_columns), first)
        return
    with file.open_stream() as stream:
        samples = _read_tar(stream, name) if suffix == ".tar" else _read_lines(stream, file, name)
        for sample in samples:
            if sample.number >= first:
                yield sample


class _KeepingTail:
    """Forwards a stream and keeps its last bytes, which include the end of the archive."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._tail = b""
        self._total = 0

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._total += len(content)
        self._tail = (self._tail + content)[-2 * _TAR_BUFFER :]
        return content

    def require_end(self, offset: int) -> None:
        """Raise tarfile.ReadError unless at least a block of zeros, and only zeros, follow."""
        rest = self._tail[len(self._tail) - (self._total - offset) :]
        require_end(rest, self._stream, offset)


def _read_tar(stream: BinaryIO, name: str) -> Iterator[StreamedSample]:
    """Yield samples whose members are adjacent, as webdataset writes them."""
    kept = _KeepingTail(stream)
    number, key = 0, None
    sample = TarSample()
    seen: set[str] = set()
    try:
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=kept, mode="r|", bufsize=_TAR_BUFFER, tarinfo=BoundedHeader
        ) as archive:
            for member in iterate_members(archive):
                of_member, extension = split_member(member.name)
                if of_member != key:
                    if key is not None:
                        yield _finish(number, name, key, sample)
                        number += 1
                    key, sample = of_member, TarSample()
                    if key in seen:
                        sample.problem = "members of one sample are not next to each other"
                    seen.add(key)
                make_image = partial(_read_image, archive, member, name)
                problem = sample.add(archive, member, extension, make_image)
                sample.problem = sample.problem or problem
            kept.require_end(archive.offset)
    except tarfile.TarError as error:
        raise BrokenShardError(f"not a tar shard, or compressed, or broken ({error})") from error
    if key is not None:
        yield _finish(number, name, key, sample)


def _read_image(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> EncodedImage:
    return EncodedImage(f"{name}: {member.name}", read_member(archive, member))


def _finish(number: int, name: str, key: str, sample: TarSample) -> StreamedSample:
    problem = sample.problem or (SEVERAL_IMAGES if len(sample.images) > 1 else "")
    record = None if problem else sample.make_record(name, key)
    return StreamedSample(number, f"{name}: {key}", record, problem)


def _read_parquet(
    file: RemoteFile,
    name: str,
    on_columns: Callable[[ShardColumns], None] | None,
) -> Iterator[StreamedSample]:
    source = file.open_seekable()  # outside of `try`: a full disk ends the run
    try:
        with closing(source), pq.ParquetFile(source) as opened:
            columns = _find_columns(opened, name)
            if on_columns is not None and columns is not None:
                on_columns(columns)
            images = {field.name for field in opened.schema_arrow if is_image_type(field.type)}
            batches = opened.iter_batches(_ROWS_AT_ONCE) if opened.metadata.num_row_groups else ()
            for number, row in enumerate(chain.from_iterable(b.to_pylist() for b in batches)):
                yield read_row(number, name, row, images)
    except (ShardColumnsError, AccessError, LostFileError):
        raise  # AccessError and LostFileError were already retried
    except (pa.ArrowException, ValueError, OSError) as error:  # OSError: a damaged page
        raise BrokenShardError(f"not a Parquet file, or broken ({error})") from error


def read_row(number: int, name: str, row: Mapping[str, Any], images: set[str]) -> StreamedSample:
    """Make a sample from a row of Parquet or of a `datasets` object."""
    place = f"{name} row {number}"
    fields = dict(row)
    is_downloaded = is_download(row)
    if is_downloaded:
        if failure := find_failure(row):
            return StreamedSample(number, place, None, failure, is_skipped=True)
        fields = {field: row[column] for field, column in choose_download_columns(row).items()}
        images = images | {"image"}
    default_name, image = f"{name}/{row.get(KEY, number) if is_downloaded else number}", None
    value = fields.get("image")
    if "image" in images and value is not None:
        fields.pop("image")
        content = value.get("bytes") if isinstance(value, dict) else value
        path = value.get("path") if isinstance(value, dict) else None
        if not (isinstance(content, bytes | bytearray | None) and isinstance(path, str | None)):
            return StreamedSample(number, place, None, "image of other types than {bytes, path}")
        if content is not None:
            image = EncodedImage(place, bytes(content))
            # Many writers leave the path empty; that must not give all images one name.
            default_name = f"{name}/{path}" if path and path.strip() else default_name
        elif path is not None:
            fields["image"] = path
    fields = {name: value for name, value in fields.items() if value is not None}
    return StreamedSample(
        number, place, RawRecord(place, fields, packed=image, default_name=default_name)
    )


def refuse_shared_paths(samples: Iterable[StreamedSample], first: int) -> Iterator[StreamedSample]:
    """Mark a sample as broken if another image has the same path, and therefore the same group.

    Some programs write the same path for all images. Several rows of one image, one per caption,
    are valid. `samples` must start at the shard's beginning, because the result depends on the
    images before `first`.
    """
    checksums: dict[str, int] = {}
    for sample in samples:
        is_shared = _has_shared_path(sample, checksums)
        if sample.number >= first:
            yield sample._replace(raw=None, problem=_SHARED_PATH) if is_shared else sample


def _has_shared_path(sample: StreamedSample, checksums: dict[str, int]) -> bool:
    """Return whether an earlier, different image has the same path; otherwise record the path."""
    raw = sample.raw
    if raw is None or not raw.default_name or not isinstance(raw.packed, EncodedImage):
        return False
    if not raw.fields.keys().isdisjoint(("file_name", "group_id")):
        return False
    checksum = zlib.crc32(raw.packed.content)
    return checksums.setdefault(raw.default_name, checksum) != checksum


def _read_lines(stream: BinaryIO, file: RemoteFile, name: str) -> Iterator[StreamedSample]:
    """Yield a sample per JSON line; every image next to the shard takes a separate request."""
    for number, (line_number, line) in enumerate(number_lines(stream)):
        place = f"{name} line {line_number}"
        fields = parse_object(line)
        if isinstance(fields, str):
            yield StreamedSample(number, place, None, fields)
            continue
        fields = {key: value for key, value in fields.items() if value is not None}
        path = fields.get("image", fields.get("file_name"))
        image = None
        if isinstance(path, str) and path.strip():
            url = name_beside(file.url, path)
            try:
                with replace(file, url=url, info=None).open_stream() as opened:
                    image = EncodedImage(url, opened.read())
            except LostFileError as error:
                yield StreamedSample(number, f"{place} ({error})", None, "image missing")
                continue
        yield StreamedSample(number, place, RawRecord(place, fields, packed=image))


def _find_columns(opened: Any, name: str) -> ShardColumns | None:
    """Return the columns of an open shard as fields; None if the shard has no rows."""
    if not opened.metadata.num_rows:
        return None
    columns = opened.schema_arrow.names
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise ShardColumnsError(f"{name} has two columns named {repeated[0]!r}. Rename one.")
    fields = choose_download_columns(columns) if is_download(columns) else columns
    return name, frozenset(fields)


def read_columns(file: RemoteFile, name: str) -> ShardColumns | None:
    """Return the columns of a shard as fields; None if the shard is unreadable or empty."""
    try:
        with closing(file.open_seekable()) as source, pq.ParquetFile(source) as opened:
            return _find_columns(opened, name)
    except (AccessError, ShardColumnsError):
        raise
    except (LostFileError, pa.ArrowException, OSError, ValueError):
        return None
