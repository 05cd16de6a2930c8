"""Reads webdataset's tar shards: the members `KEY.jpg`, `KEY.json` and `KEY.txt` are one sample.

`KEY.json` holds fields of a record; `KEY.txt` is the caption of a sample whose JSON has none. It is
not read beside one that has, because downloading tools write the same caption into both.

Python's own tarfile reads them, not `webdataset`, which streams shards from front to back: training
here samples images at random, and its stages must agree on their order. So the headers and texts
are read once, and of an image only offset and size are kept. An image is later one read at that
offset, from a shard that is never unpacked. Compressed tars have no such offsets and are refused.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..image_sources import IMAGE_SUFFIXES, TarImage
from ..records import CAPTION_FIELDS, RawRecord
from ..validation_errors import ErrorCollector
from .json_files import parse_object

# What img2dataset writes beside the caption; its `key` is the sample's name, not what it shows.
_DOWNLOAD_NOTES = frozenset(
    "key url status error_message exif sha256 md5 "
    "width height original_width original_height".split()
)


@dataclass
class _Sample:
    """The members of one sample that have been read so far."""

    images: list[TarImage] = field(default_factory=list)
    fields: dict[str, Any] | None = None
    text: str | None = None
    is_broken: bool = False


def read_tar_shards(
    shards: Sequence[Path], base: Path, errors: ErrorCollector
) -> Iterator[RawRecord]:
    """Yield a raw record per sample, in the order of the shards and of their members.

    Args:
        shards: uncompressed tar files, in their order.
        base: folder that names are relative to.
        errors: gets shards and members that cannot be read.

    Yields:
        The records of the samples without such errors.
    """
    for shard in shards:
        name = shard.relative_to(base).as_posix()
        for key, sample in _index_shard(shard, name, errors).items():
            place = f"{name}: {key}"
            if len(sample.images) > 1:
                errors.add("several images in one sample", place)
            elif not sample.is_broken:
                image = sample.images[0] if sample.images else None
                member = image.member if image else key
                yield RawRecord(
                    place, _merge(sample), packed=image, default_name=f"{name}/{member}"
                )


def _index_shard(shard: Path, name: str, errors: ErrorCollector) -> dict[str, _Sample]:
    """Read every header of a shard once, and the texts; skip the images."""
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                key, extension = _split(member.name)
                sample = samples.setdefault(key, _Sample())
                if problem := _add_member(sample, archive, member, shard, extension):
                    sample.is_broken = True
                    errors.add(problem, f"{name}: {member.name}")
            _require_end(shard, archive.offset)
    except (tarfile.TarError, OSError) as error:
        errors.add("not a tar shard, or compressed, or broken", f"{name} ({error})")
        for sample in list(samples.values())[-1:]:
            sample.is_broken = True  # its other members may be missing
    return samples


def _require_end(shard: Path, offset: int) -> None:
    """Raise tarfile.ReadError unless the members are followed by nothing but the archive's end.

    At a header that is damaged, truncated or that follows another archive's end, `tarfile` stops as
    if there were no more.
    """
    with shard.open("rb") as opened:
        opened.seek(offset)
        rest = opened.read(tarfile.BLOCKSIZE)
        is_whole = len(rest) == tarfile.BLOCKSIZE
        while is_whole and rest:
            is_whole = not rest.strip(b"\0")
            rest = opened.read(2**20)
    if not is_whole:
        raise tarfile.ReadError(f"the archive is truncated or damaged at byte {offset}")


def _split(member: str) -> tuple[str, str]:
    """Split a member's name as webdataset does, at the first dot of its last part."""
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _add_member(
    sample: _Sample,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    shard: Path,
    extension: str,
) -> str:
    """Add a member to its sample; return its error, empty if there is none."""
    if not member.isreg() or member.issparse():
        return "member is not a plain file"
    if extension in IMAGE_SUFFIXES:
        image = TarImage(shard, member.name, member.offset_data, member.size)
        sample.images.append(image)
        return ""
    if extension not in ("json", "txt"):
        return f"unknown member .{extension}"
    stream = archive.extractfile(member)
    if stream is None:
        return "member is not a plain file"
    content = stream.read()
    return _add_fields(sample, content) if extension == "json" else _add_text(sample, content)


def _add_fields(sample: _Sample, content: bytes) -> str:
    if sample.fields is not None:
        return "several .json in one sample"
    fields = parse_object(content)
    if isinstance(fields, str):
        return fields
    sample.fields = {
        name: value
        for name, value in fields.items()
        if value is not None and name not in _DOWNLOAD_NOTES
    }
    return ""


def _add_text(sample: _Sample, content: bytes) -> str:
    if sample.text is not None:
        return "several .txt in one sample"
    try:
        sample.text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return ""


def _merge(sample: _Sample) -> dict[str, Any]:
    """Return the sample's fields, with its `.txt` as the caption if they have none."""
    fields = dict(sample.fields or {})
    if sample.text is not None and not CAPTION_FIELDS & set(fields):
        fields["caption"] = sample.text
    return fields
