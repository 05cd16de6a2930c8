"""Reads webdataset's tar shards: the members `KEY.jpg`, `KEY.json` and `KEY.txt` form one sample.

`KEY.json` holds the fields of a record. `KEY.txt` is the caption if the JSON has none; otherwise
`KEY.txt` is ignored, because download tools write the same caption into both.

The shards are read with Python's tarfile, not with `webdataset`, which streams sequentially:
training samples images at random, and all stages must agree on the order of images. Headers and
texts are read once; for an image, only its offset and size are kept. Loading an image is then one
read at that offset, without unpacking the shard. Compressed tars have no such offsets and are
refused.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

from ..images.image_sources import IMAGE_SUFFIXES, PackedImage, TarImage
from ..record_fields import CAPTION_FIELDS, RawRecord
from ..remote.file_locations import FileLocation, open_buffered
from ..remote.remote_access import AccessError, name_reading_error
from ..validation_errors import ErrorCollector
from .download_notes import drop_download_notes
from .json_files import BYTE_ORDER_MARK, parse_object

SEVERAL_IMAGES = "several images in one sample"
_MOST_BYTES, _MOST_OF_TEXT = 2**40, 2**30
# `tarfile` reads these into memory, whatever size they claim.
_MOST_OF = dict.fromkeys(
    (
        tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
    ),
    2**24,
)  # fmt: skip


class BoundedHeader(tarfile.TarInfo):
    """A tar header whose size is plausible."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> BoundedHeader:
        header = super().frombuf(buf, encoding, errors)
        _require_size(header, _MOST_OF.get(header.type, _MOST_BYTES))
        return header


@dataclass
class TarSample:
    """The members of one sample read so far: images, `.json` and `.txt`.

    `problem` describes an error in a member; empty if there is none.
    """

    images: list[PackedImage] = field(default_factory=list)
    fields: dict[str, Any] | None = None
    text: str | None = None
    member: str | None = None
    problem: str = ""

    def add(
        self,
        archive: tarfile.TarFile,
        member: tarfile.TarInfo,
        extension: str,
        make_image: Callable[[], PackedImage],
    ) -> str:
        """Add a member; return the error, or an empty string."""
        if not member.isreg() or member.issparse():
            return "member is not a plain file"
        if extension in IMAGE_SUFFIXES:
            self.images.append(make_image())
            self.member = member.name
            return ""
        if extension not in ("json", "txt"):
            return f"unknown member .{extension}"
        _require_size(member, _MOST_OF_TEXT)
        content = read_member(archive, member)
        return self._add_fields(content) if extension == "json" else self._add_text(content)

    def _add_fields(self, content: bytes) -> str:
        if self.fields is not None:
            return "several .json in one sample"
        fields = parse_object(content.removeprefix(BYTE_ORDER_MARK))
        if isinstance(fields, str):
            return fields
        self.fields = fields
        return ""

    def _add_text(self, content: bytes) -> str:
        if self.text is not None:
            return "several .txt in one sample"
        try:
            self.text = content.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
        except UnicodeDecodeError:
            return "not UTF-8"
        return ""

    def make_record(self, name: str, key: str) -> RawRecord:
        """Make the record; `.txt` is the caption if the JSON has none."""
        fields = drop_download_notes(self.fields or {})
        if self.text is not None and not CAPTION_FIELDS & set(fields):
            fields["caption"] = self.text
        image = self.images[0] if self.images else None
        return RawRecord(
            f"{name}: {key}", fields, packed=image, default_name=f"{name}/{self.member or key}"
        )


def read_tar_shard(shard: FileLocation, name: str, errors: ErrorCollector) -> Iterator[RawRecord]:
    """Yield a raw record per sample, in the order of their first members."""
    for key, sample in _index_shard(shard, name, errors).items():
        if len(sample.images) > 1:
            errors.add(SEVERAL_IMAGES, f"{name}: {key}")
        elif not sample.problem:
            yield sample.make_record(name, key)


def _index_shard(shard: FileLocation, name: str, errors: ErrorCollector) -> dict[str, TarSample]:
    """Read all headers and texts of a shard once; skip the images."""
    samples: dict[str, TarSample] = {}
    try:
        with (
            open_buffered(shard) as opened,
            tarfile.open(fileobj=opened, mode="r:", tarinfo=BoundedHeader) as archive,
        ):
            for member in iterate_members(archive):
                key, extension = split_member(member.name)
                sample = samples.setdefault(key, TarSample())
                problem = sample.add(
                    archive,
                    member,
                    extension,
                    partial(TarImage, shard, member.name, member.offset_data, member.size),
                )
                if problem:
                    sample.problem = problem
                    errors.add(problem, f"{name}: {member.name}")
            opened.seek(archive.offset)
            require_end(opened.read(tarfile.BLOCKSIZE), opened, archive.offset)
    except AccessError:
        raise
    except (tarfile.TarError, OSError) as error:
        kind = name_reading_error(error) or "not a tar shard, or compressed, or broken"
        errors.add(kind, f"{name} ({error})")
        for sample in list(samples.values())[-1:]:
            sample.problem = kind  # its other members may be missing
    return samples


def iterate_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield all members except folders."""
    for member in archive:
        _require_size(member, _MOST_BYTES)  # a PAX header may override the size
        if not member.isdir():
            yield member


def _require_size(header: tarfile.TarInfo, most: int) -> None:
    """Refuse absurd or negative sizes; a negative size makes tarfile loop forever."""
    if not 0 <= header.size <= most:
        raise tarfile.ReadError(f"the header of {header.name!r} claims {header.size:,} bytes")


def require_end(rest: bytes, opened: BinaryIO | io.BufferedReader, offset: int) -> None:
    """Raise tarfile.ReadError unless only the end of the archive follows the members.

    Without this check, `tarfile` silently stops at a damaged or truncated header, and after the
    first of several concatenated archives.
    """
    is_whole = len(rest) >= tarfile.BLOCKSIZE
    while is_whole and rest:
        is_whole = not rest.strip(b"\0")
        rest = opened.read(2**20)
    if not is_whole:
        raise tarfile.ReadError(f"the archive is truncated or damaged at byte {offset}")


def split_member(member: str) -> tuple[str, str]:
    """Split a member's name into key and extension at its first dot, as webdataset does."""
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    content = stream.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"the archive ends within {member.name}")
    return content
