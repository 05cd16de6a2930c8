"""Which files a source of captioned images is, and reading it in independent parts.

| source | what it is |
| --- | --- |
| a folder with `captions.jsonl` or `metadata.jsonl`, or that file | a record per line |
| `*.parquet`: a file, a folder of them, a pattern | a record per row; see `sources/parquet.py` |
| `*.tar`: a file, a folder of them, a pattern | webdataset shards; see `sources/tar_shards.py` |
| `*.json`: a file | COCO's captions as published; see `sources/coco.py` |

A pattern contains `*`, `?` or `[…]`. Files are read in the order of their names. Images that are
files are beside the source, those of COCO in a folder that is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..sources.coco import read_coco
from ..sources.json_files import find_line_starts, read_json_lines
from ..sources.parquet import read_parquet
from ..sources.remote_files import is_remote
from ..sources.tar_shards import read_tar_shards
from ..validation_errors import ErrorCollector
from .records import RawRecord

_LINES_FILES = ("captions.jsonl", "metadata.jsonl")
_SEVERAL_FILES = (".parquet", ".tar")
_BYTES_PER_PART = 2**24


@dataclass(frozen=True)
class SourcePart:
    """What can be read without the rest of a source.

    Attributes:
        file: one of the source's files.
        start: first byte of a range of lines.
        stop: byte after its last one; None for the whole file.
        first_line: number of its first line, from 1.
    """

    file: Path
    start: int = 0
    stop: int | None = None
    first_line: int = 1


@dataclass(frozen=True)
class SourceFiles:
    """Files of one format.

    Attributes:
        files: in the order in which they are read.
        base: folder that the names of shards and images are relative to.
        suffix: of all files, in lower case.
    """

    files: list[Path]
    base: Path
    suffix: str

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in self.files)

    def split(self) -> list[SourcePart]:
        """Split the source into parts, in its order."""
        if self.suffix != ".jsonl":
            return [SourcePart(file) for file in self.files]
        (file,) = self.files
        starts = list(find_line_starts(file, _BYTES_PER_PART))
        stops = [start for start, _ in starts[1:]] + [file.stat().st_size]
        return [
            SourcePart(file, start, stop, line)
            for (start, line), stop in zip(starts, stops, strict=True)
        ]

    def read(self, part: SourcePart, errors: ErrorCollector) -> Iterator[RawRecord]:
        """Yield the raw records of a part.

        Args:
            part: one of `split`.
            errors: gets the errors that belong to no record.
        """
        if self.suffix == ".parquet":
            return read_parquet([part.file], self.base, errors)
        if self.suffix == ".tar":
            return read_tar_shards([part.file], self.base, errors)
        if self.suffix == ".json":
            return read_coco(part.file, errors)
        return read_json_lines(
            part.file, errors, start=part.start, stop=part.stop, first_line=part.first_line
        )


def find_source(source: str) -> SourceFiles:
    """Find the files of a source.

    Args:
        source: a folder, file or pattern; see the top of this file.

    Raises:
        ValueError: the source is missing or ambiguous, or its format is unknown.
    """
    path = Path(source)
    if is_remote(source):
        raise ValueError(
            f"{source} is not on this machine. Stream it by stream_records, or copy it here."
        )
    if path.is_dir():
        return _search_folder(path)
    files, base = [path] if path.is_file() else [], path.parent
    if not files and (wildcard := re.search(r"[*?\[]", source)):
        # Names are relative to the last folder before the first wildcard.
        start = max(source.rfind(mark, 0, wildcard.start()) for mark in ("/", os.sep)) + 1
        base = Path(source[:start])
        files = sorted(file for file in base.glob(source[start:]) if file.is_file())
    if not files:
        raise ValueError(f"{source}: no such folder or file. Correct the path.")
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1 or suffixes[0] not in (".jsonl", *_SEVERAL_FILES, ".json"):
        raise ValueError(
            f"{source}: found {', '.join(suffixes)}. Give a folder, or files of one format: "
            ".jsonl, .parquet, .tar, or COCO's .json."
        )
    if len(files) > 1 and suffixes[0] not in _SEVERAL_FILES:
        raise ValueError(f"{source}: {len(files)} {suffixes[0]} files. Give one of them.")
    return SourceFiles(files, base, suffixes[0])


def find_image_folder(
    source: SourceFiles, image_dir: str | Path | None, *, required: bool
) -> Path | None:
    """Find the folder of the images that are files.

    Args:
        source: files of a source.
        image_dir: the folder, if the user names it.
        required: whether images are wanted.

    Returns:
        The folder; None where the source holds its images, or where none are wanted.

    Raises:
        ValueError: the folder is missing, or has to be named.
    """
    if image_dir is not None:
        if not Path(image_dir).is_dir():
            raise ValueError(
                f"image_dir={str(image_dir)!r} is not a folder. Give the folder of images."
            )
        return Path(image_dir)
    if source.suffix == ".json":
        if required:
            raise ValueError(
                f"{source.files[0]}: COCO's captions do not say where their images are. Give "
                "image_dir=<folder>, or require_images=False to read only the captions."
            )
        return None
    return None if source.suffix == ".tar" else source.base


def _drop_download_notes(sources: list[SourceFiles]) -> list[SourceFiles]:
    """Drop Parquet files that each lie beside a tar of their name: img2dataset's notes on it."""
    tars = {file.stem for source in sources if source.suffix == ".tar" for file in source.files}
    return [
        source
        for source in sources
        if not (source.suffix == ".parquet" and {file.stem for file in source.files} <= tars)
    ]


def is_source(folder: Path) -> bool:
    """Whether a folder holds a source, and not images alone.

    Args:
        folder: an existing folder.
    """
    return bool(_list_sources(folder))


def _list_sources(folder: Path) -> list[SourceFiles]:
    sources = [
        SourceFiles([folder / name], folder, ".jsonl")
        for name in _LINES_FILES
        if (folder / name).is_file()
    ]
    for suffix in _SEVERAL_FILES:
        # In any case, as for a pattern's files.
        if files := sorted(f for f in folder.iterdir() if f.suffix.lower() == suffix):
            sources.append(SourceFiles(files, folder, suffix))
    return _drop_download_notes(sources)


def _search_folder(folder: Path) -> SourceFiles:
    sources = _list_sources(folder)
    if not sources:
        raise ValueError(
            f"{folder} has no {' or '.join(_LINES_FILES)}, no *.parquet and no *.tar. Give the "
            "folder that has, or a pattern."
        )
    if len(sources) > 1:
        names = ", ".join(source.files[0].name for source in sources)
        raise ValueError(f"{folder} has several sources: {names}. Give one of them by its name.")
    return sources[0]
