"""Finds the files of a source of captioned images, and reads them in independent parts.

| source | what it is |
| --- | --- |
| a folder with `captions.jsonl` or `metadata.jsonl`, or that file | a record per line |
| `*.parquet`: a file, a folder of them, a pattern | a record per row; see `sources/parquet.py` |
| `*.tar`: a file, a folder of them, a pattern | webdataset shards; see `sources/tar_shards.py` |
| `*.json`: a file | COCO's captions as published; see `sources/coco.py` |
| `*.csv`: a file, a pattern | a text per row, for modality text; see `sources/csv_files.py` |
| a `.txt` file | the shards listed in its lines; see `remote/shard_urls.py` |

A pattern contains `*`, `?` or `[…]` (matching files are read in name order), or braces as in
`{00000..00331}.tar`. Images in separate files are next to the source; for COCO, the folder of
images must be specified.

Shards at URLs are specified as for a stream (`remote/shard_urls.py`) and read in place: texts when
the source is read, images when they are opened. Separate image files next to a remote `.jsonl` are
not found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..remote.file_locations import FileLocation, parse_location
from ..remote.remote_access import RetryPolicy
from ..remote.remote_files import PIPE, is_remote
from ..remote.shard_urls import (
    are_download_notes,
    find_base,
    find_format,
    find_local_files,
    list_shards,
    name_shards,
    names_shards,
)
from ..sources.coco import read_coco
from ..sources.csv_files import read_csv_file
from ..sources.json_files import find_line_starts, read_json_lines
from ..sources.parquet import read_parquet_file
from ..sources.tar_shards import read_tar_shard
from ..validation_errors import ErrorCollector
from .records import Modality, RawRecord

_LINES_FILES = ("captions.jsonl", "metadata.jsonl")
_SHOWN_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_SEVERAL_FILES = (".parquet", ".tar")
_CSV, _SHARD_LIST = ".csv", ".txt"
_BYTES_PER_PART = 2**24


@dataclass(frozen=True)
class SourcePart:
    """A part of a source that can be read on its own: a file, or its bytes `start` to `stop`.

    `name` is the file's name in image names and error messages; `first_line` counts from 1.
    """

    file: FileLocation
    name: str
    start: int = 0
    stop: int | None = None
    first_line: int = 1


@dataclass(frozen=True)
class SourceFiles:
    """Files of one format, in reading order.

    Names of shards and images are relative to `base`, which is a folder or the common prefix of all
    URLs.
    """

    files: list[FileLocation]
    base: FileLocation
    suffix: str

    def split(self) -> list[SourcePart]:
        """Split the source into parts, in order."""
        if isinstance(self.base, str):
            names = name_shards([str(file) for file in self.files])
            return [SourcePart(*part) for part in zip(self.files, names, strict=True)]
        files = [Path(file) for file in self.files]
        if self.suffix != ".jsonl":
            return [SourcePart(file, file.relative_to(self.base).as_posix()) for file in files]
        (file,) = files
        starts = list(find_line_starts(file, _BYTES_PER_PART))
        stops = [start for start, _ in starts[1:]] + [file.stat().st_size]
        return [
            SourcePart(file, file.name, start, stop, line)
            for (start, line), stop in zip(starts, stops, strict=True)
        ]

    def read(self, part: SourcePart, errors: ErrorCollector) -> Iterator[RawRecord]:
        if self.suffix == ".parquet":
            return read_parquet_file(part.file, part.name, errors)
        if self.suffix == ".tar":
            return read_tar_shard(part.file, part.name, errors)
        if self.suffix == ".json":
            return read_coco(Path(part.file), errors)
        if self.suffix == _CSV:
            return read_csv_file(Path(part.file), part.name, errors)
        return read_json_lines(
            part.file, errors, start=part.start, stop=part.stop, first_line=part.first_line,
            name=part.name,
        )  # fmt: skip


def find_source(source: str, *, modality: Modality | None = None) -> SourceFiles:
    path = Path(source)
    if not is_remote(source) and path.is_dir():
        return _search_folder(path)
    if is_remote(source) or names_shards(source):
        return _find_shards(source, modality)
    base, files = (path.parent, [path]) if path.is_file() else find_local_files(source)
    if not files:
        raise ValueError(f"{source}: no such folder or file. Correct the path.")
    return SourceFiles([*files], base, _find_suffix(source, files, modality))


def _find_suffix(source: str, files: list[Path], modality: Modality | None) -> str:
    """Return the common suffix of all files; raise if the suffixes differ."""
    several = (*_SEVERAL_FILES, *([_CSV] if modality == "text" else []))
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1 or suffixes[0] not in (".jsonl", *several, ".json"):
        raise ValueError(
            f"{source}: found {', '.join(suffixes)}. Pass a folder, or files of one format: "
            f".jsonl, {', '.join(several)}, or COCO's .json."
        )
    if len(files) > 1 and suffixes[0] not in several:
        raise _refuse_several(source, len(files), suffixes[0])
    return suffixes[0]


def _find_shards(source: str, modality: Modality | None) -> SourceFiles:
    try:
        shards = [source] if PIPE in source else list_shards(source, RetryPolicy())
    except ValueError as error:
        if modality == "text" and find_format(source) == _SHARD_LIST:
            remedy = "A .txt file lists shards; put texts into .csv, .jsonl or .parquet."
            raise ValueError(f"{source}: {error} {remedy}") from error
        raise
    if any(shard.startswith(PIPE) for shard in shards):
        raise ValueError(
            f"{source}: the output of a command can be read only once, from the beginning. Stream "
            "it (align does), or write it to files."
        )
    base, suffix = find_base(shards), find_format(shards[0])
    if any(is_remote(shard) for shard in shards):
        return SourceFiles([parse_location(shard) for shard in shards], base, suffix)
    if len(shards) > 1 and suffix not in _SEVERAL_FILES:
        raise _refuse_several(source, len(shards), suffix)
    return SourceFiles([Path(shard) for shard in shards], Path(base), suffix)


def _refuse_several(source: str, count: int, suffix: str) -> ValueError:
    return ValueError(f"{source}: {count} {suffix} files. Pass one of them.")


def find_image_folder(
    source: SourceFiles, image_dir: str | Path | None, *, required: bool
) -> Path | None:
    """Return the folder of images in separate files; None if there is no such folder."""
    if image_dir is not None:
        if not Path(image_dir).is_dir():
            raise ValueError(
                f"image_dir={str(image_dir)!r} is not a folder. Pass the folder of images."
            )
        return Path(image_dir)
    if source.suffix == ".json":
        if required:
            raise ValueError(
                f"{source.files[0]}: COCO's captions do not say where their images are. Pass "
                "image_dir=<folder>, or require_images=False to read only the captions."
            )
        return None
    if isinstance(source.base, Path):
        return None if source.suffix == ".tar" else source.base
    if source.suffix == ".jsonl" and required:
        raise ValueError(
            f"{source.files[0]}: separate image files would need one request each. Pack them into "
            ".tar or .parquet shards, stream them (align does), pass a local image_dir, or read "
            "only the captions with require_images=False."
        )
    return None


def is_source(folder: Path) -> bool:
    """Return whether a folder holds a source, not just images."""
    return bool(_list_sources(folder))


def _list_sources(folder: Path) -> list[list[Path]]:
    sources = [[folder / name] for name in _LINES_FILES if (folder / name).is_file()]
    for suffix in _SEVERAL_FILES:
        # Case is ignored, as for the files of a pattern.
        if files := sorted(f for f in folder.iterdir() if f.suffix.lower() == suffix):
            sources.append(files)
    of = {files[0].suffix.lower(): [str(file) for file in files] for files in sources}
    if are_download_notes(of.get(".parquet", []), of.get(".tar", [])):
        sources = [files for files in sources if files[0].suffix.lower() != ".parquet"]
    return sources


def _search_folder(folder: Path) -> SourceFiles:
    sources = _list_sources(folder)
    if not sources:
        raise ValueError(
            f"{folder} has no {' or '.join(_LINES_FILES)}, no *.parquet and no *.tar. Pass a "
            f"folder that has one, or a pattern. {describe_line(folder)}"
        )
    if len(sources) > 1:
        names = ", ".join(files[0].name for files in sources)
        raise ValueError(f"{folder} has several sources: {names}. Pass one of them by name.")
    return SourceFiles([*sources[0]], folder, sources[0][0].suffix.lower())


def describe_line(folder: Path) -> str:
    """Show how to write a file of captions, using an image in the folder if there is one."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    name = next((file for file in files if file.lower().endswith(_SHOWN_SUFFIXES)), "cat.jpg")
    line = json.dumps({"image": name, "captions": ["What it shows."]}, ensure_ascii=False)
    return f"For images, write {_LINES_FILES[0]}, one line each: {line} (docs/data-formats.md)."
