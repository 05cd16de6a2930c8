"""Updates an index to match its folder: new, changed and removed images, and nothing else.

A file whose size and times are those of the last run is not read. One that was touched, renamed or
copied is read and not encoded, because its content has an embedding already. Images are committed
some at a time, so that a run that is stopped or killed is continued by the next one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from .._suggestions import counted
from ..configs.encoding_config import IndexConfig
from ..data.remote.remote_access import raise_disk_failure
from ..model_folders.training_images import ImageTally
from .image_encoding import encode_readable_images
from .index_database import ImageFacts, IndexDatabase
from .query_encoding import QueryEncoder

_COMMITTED_AT_ONCE = 512
_SHOWN = 8
_WRITTEN = "was written while it was read. Index again."
_FactsAndEmbedding: TypeAlias = tuple[ImageFacts, np.ndarray[Any, Any]]


@dataclass
class UpdateCounts:
    """The effect of an update.

    Attributes:
        unchanged: Images that were there already.
        added: New images, copies and renamed ones included.
        changed: Images of the same path and other content.
        removed: Images that are no longer in the folder, or can no longer be read.
        encoded: Images that the model was run on.
        errors: Path and error of each image that cannot be read.
    """

    unchanged: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    encoded: int = 0
    errors: dict[Path, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{counted(self.unchanged + self.added + self.changed, 'image')}: {self.added:,} new, "
            f"{self.changed:,} changed, {self.unchanged:,} unchanged; {self.removed:,} removed. "
            f"Encoded {self.encoded:,}."
        )

    @property
    def has_changed(self) -> bool:
        return self.added + self.changed + self.removed > 0

    def describe_errors(self) -> str:
        """Count and name the images that cannot be read, at least one."""
        lines = "\n".join([*self.errors.values()][:_SHOWN] + ["…"] * (len(self.errors) > _SHOWN))
        return f"Not in the index: {counted(len(self.errors), 'unreadable image')}:\n{lines}"


@dataclass(frozen=True)
class _KnownFile:
    stat: str
    sha256: str


@dataclass
class FolderUpdate:
    """Writes embeddings of new and changed images, and removes those of images that are gone.

    Attributes:
        database: The index, which this process may write.
        image_dir: Its folder.
        encoder: Its model; the vision tower is loaded if there is anything to encode.
        config: How images are encoded.
        tally: Tally that the encoded images are added to.
        counts: What was done so far, and the images that cannot be read.
    """

    database: IndexDatabase
    image_dir: Path
    encoder: QueryEncoder
    config: IndexConfig
    tally: ImageTally
    counts: UpdateCounts = field(default_factory=UpdateCounts)

    def __post_init__(self) -> None:
        self._known = {
            path: _KnownFile(stat, sha256)
            for batch in self.database.iterate(["path", "stat", "sha256"])
            for path, stat, sha256 in zip(*(c.to_pylist() for c in batch.columns), strict=True)
        }
        self._digests = Counter(file.sha256 for file in self._known.values())  # of all rows

    def run(self, paths: Sequence[Path]) -> UpdateCounts:
        """Update the index for all image files of its folder."""
        named = self._name(paths)
        # Before a file is read, so that one that is written meanwhile is noticed.
        self._stats = self._read_stats(named)
        waiting = [
            (name, named[name])
            for name, stat in self._stats.items()
            if name not in self._known or self._known[name].stat != describe_stat(stat)
        ]
        self.counts.unchanged = len(self._stats) - len(waiting)
        with tqdm(
            total=len(waiting), unit=" images", disable=not (self.config.show_progress and waiting)
        ) as progress:
            for start in range(0, len(waiting), _COMMITTED_AT_ONCE):
                part = dict(waiting[start : start + _COMMITTED_AT_ONCE])
                self._write_part(part, progress)
                progress.update(start + len(part) - progress.n)
        if len(self.counts.errors) == len(paths):
            raise ValueError(self.counts.describe_errors())
        unreadable = {self._relative(path) for path in self.counts.errors}
        gone = [name for name in self._known if name not in named or name in unreadable]
        self.database.remove(gone)
        self.counts.removed = len(gone)
        if waiting or gone:
            with self.database.changing() as table:
                table.optimize()
        return self.counts

    def _write_part(self, part: dict[str, Path], progress: tqdm[Any]) -> None:
        digests, found = self._read(part, progress)
        self._refuse_written(part)
        kept = [name for name in digests if part[name] not in self.counts.errors]
        touched = [
            name
            for name in kept
            if name in self._known and self._known[name].sha256 == digests[name]
        ]
        if touched:
            self.database.note_touched(self._describe_files(touched))
            self.counts.unchanged += len(touched)
        if written := [name for name in kept if name not in touched]:
            self._write(written, digests, found)

    def _write(
        self, names: list[str], digests: dict[str, str], found: dict[str, _FactsAndEmbedding]
    ) -> None:
        facts = [found[digests[name]][0] for name in names]
        rows = {
            **self._describe_files(names),
            "sha256": [digests[name] for name in names],
            "bytes": [self._stats[name].st_size for name in names],
            "width": [fact.width for fact in facts],
            "height": [fact.height for fact in facts],
            "taken": [fact.taken for fact in facts],
        }
        self.database.write(rows, np.stack([found[digests[name]][1] for name in names]))
        changed = [self._known[name].sha256 for name in names if name in self._known]
        self._digests.update(digests[name] for name in names)
        for digest in changed:
            self._digests[digest] -= 1
            if not self._digests[digest]:
                del self._digests[digest]
        num_changed = len(changed)
        self.counts.changed += num_changed
        self.counts.added += len(names) - num_changed

    def _describe_files(self, names: list[str]) -> dict[str, list[Any]]:
        """Return the columns that depend on the file and not on its content."""
        stats = [self._stats[name] for name in names]
        return {
            "path": names,
            "modified": [datetime.fromtimestamp(s.st_mtime, timezone.utc) for s in stats],
            "stat": [describe_stat(stat) for stat in stats],
        }

    def _read(
        self, part: dict[str, Path], progress: tqdm[Any]
    ) -> tuple[dict[str, str], dict[str, _FactsAndEmbedding]]:
        """Read each file once; returns digests by name, and facts and embeddings by digest.

        What the index does not know by its digest is encoded, of equal files the first.
        """
        read = encode_readable_images(
            self.encoder.model,
            list(part.values()),
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
            progress=progress,
            tally=self.tally,
            known=self._digests,
        )
        self.counts.encoded += len(read.paths)
        self.counts.errors |= read.errors
        digests = {name: read.digests[path] for name, path in part.items() if path in read.digests}
        found = self.database.find_by_digest(
            [digest for digest in set(digests.values()) if digest in self._digests]
        )
        rows = zip(read.paths, read.facts, read.embeds.numpy(), strict=True)
        found |= {read.digests[path]: (facts, row) for path, facts, row in rows}
        broken = {read.digests[path]: path for path in read.errors if path in read.digests}
        for name, digest in digests.items():
            if digest in broken:  # and so is every copy of it
                error = read.errors[broken[digest]]
                self.counts.errors[part[name]] = error.replace(
                    str(broken[digest]), str(part[name]), 1
                )
        return digests, found

    def _refuse_written(self, part: dict[str, Path]) -> None:
        """Record an error for each file that was written while it was read."""
        for name, path in part.items():
            if path in self.counts.errors:
                continue
            found = _read_stat(path)
            if isinstance(found, OSError) or describe_stat(found) != describe_stat(
                self._stats[name]
            ):
                self.counts.errors[path] = f"{path}: {_WRITTEN}"

    def _read_stats(self, named: dict[str, Path]) -> dict[str, os.stat_result]:
        """Read size and times of files, and record an error for each that cannot be read."""
        stats = {}
        for name, path in named.items():
            found = _read_stat(path)
            if isinstance(found, OSError):
                self.counts.errors[path] = f"{path}: cannot be read ({found.strerror or found})."
            else:
                stats[name] = found
        return stats

    def _name(self, paths: Sequence[Path]) -> dict[str, Path]:
        """Name each file by its path below the folder, which must be Unicode."""
        named = {}
        for path in paths:
            name = self._relative(path)
            try:
                name.encode()
            except UnicodeEncodeError:
                self.counts.errors[path] = f"{name!r}: its name is not Unicode. Rename it."
            else:
                named[name] = path
        return named

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.image_dir).as_posix()


def describe_stat(stat: os.stat_result) -> str:
    """Return size and times of a file, which change whenever it is written."""
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"


def _read_stat(path: Path) -> os.stat_result | OSError:
    """Return size and times of a file, or why it has none; raise if the disk fails."""
    try:
        return path.stat()
    except OSError as error:
        raise_disk_failure(error, path)
        return error
