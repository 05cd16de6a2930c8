"""Build the index of a folder, or update it with only the new, changed and removed images.

A file whose size and timestamps are unchanged since the last run is not read. A file that was
touched, renamed or copied is read but not encoded, because its content already has an embedding.
Images are committed in batches, so a run continues where an interrupted or killed run stopped.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .._suggestions import counted, list_first
from ..configs.encoding_config import IndexConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.records.record_loading import find_example_data
from ..data.remote.remote_access import raise_disk_failure
from ..data.sealed_manifest import list_differences
from ..encoding.devices import find_device
from ..model_folders.training_images import ImageTally, describe_far_images
from .ann_index import (
    FEWEST_ROWS,
    MIN_RECALL,
    describe_ann,
    needs_training,
    train_ann,
    tune_ann,
)
from .image_encoding import encode_readable_images
from .image_files import list_images
from .index_about import FACTS, About
from .index_database import IndexDatabase, join_fingerprints, lock_database, require_place
from .index_encoding import IndexEncoder
from .model_identity import (
    find_whole_model,
    fingerprint_whole_model,
    hash_file_facts,
    name_model,
    require_same_model,
    restore_tally,
    store_tally,
)

# Number of everyday captions used to measure recall; more captions change the mean by less than
# 0.01.
_NUM_QUERIES = 200
# Images per commit: the most that a killed run loses. Larger on a GPU, which idles at the start of
# each commit until the first images are decoded.
_COMMITTED_AT_ONCE, _COMMITTED_BY_GPU = 512, 8192

Report = Callable[[str], object]


def build_index(
    model: str | Path,
    image_dir: Path,
    location: str,
    config: IndexConfig,
    *,
    updates_ann: bool = True,
    skip_invalid: bool = True,
    report: Report | None = None,
) -> tuple[IndexDatabase, IndexEncoder]:
    """Index a folder, or update its index; return the database and its encoder.

    Without `updates_ann`, the approximate index is left alone. Without `skip_invalid`, unreadable
    images raise an error once all other images are indexed.
    """
    find_device(config.device, precision=config.precision)  # fails early if it is missing
    require_place(location, is_new=True)
    files = list_images(image_dir)
    warn = report or partial(warnings.warn, stacklevel=3)
    say = report or (lambda _: None)
    if skipped := files.describe_skipped():
        warn(skipped)
    folder = find_whole_model(model)
    source: dict[str, Any] = {
        "model": name_model(model),
        "model_files": hash_file_facts(folder),
        "image_dir": str(image_dir.resolve()),
    }
    with lock_database(location):  # another process may be creating its tables
        database = _open(model, folder, source, location)
        encoder = IndexEncoder(folder, config.device, config.precision, config.jpeg_decoding)
        tally = restore_tally(database.about)

        def note_place() -> None:
            """Record the locations of the model and the images, and the tally of encoded images."""
            about = replace(database.about, **source, tally=store_tally(tally))
            if about != database.about:
                database.write_about(about)

        update = FolderUpdate(database, image_dir, encoder, config, tally)
        try:
            update.run(files.readable)
        except KeyboardInterrupt:
            note_place()
            warn(f"The images encoded so far are in {location}. Run the same call to continue.")
            raise
        say(str(update))
        if update.errors:
            warn(update.describe_errors())
        has_changed = update.added + update.changed + update.removed > 0
        if updates_ann:
            _update_ann(database, encoder, config, has_changed=has_changed, report=say)
        note_place()
    if update.errors and not skip_invalid:
        raise ValueError(
            "Some images cannot be read. Repair or remove them, or skip them (--skip-invalid)."
        )
    if far := describe_far_images(folder, tally):
        warn(far)
    return database, encoder


def _open(model: str | Path, folder: Path, source: dict[str, Any], location: str) -> IndexDatabase:
    database = IndexDatabase(
        location,
        lambda: About(
            **source,
            fingerprint=join_fingerprints(fingerprint_whole_model(folder)),
            width=LLM2CLIPConfig.from_pretrained(folder).projection_dim,
        ),
    )
    require_same_model(database, model, folder)
    indexed = database.about.image_dir
    if indexed != source["image_dir"] and Path(indexed).is_dir() and database.count():
        raise ValueError(
            f"{location} is the index of {indexed}; indexing {source['image_dir']} would remove "
            "those images from it. Choose a new database, or index a folder that contains both."
        )
    return database


def _update_ann(
    database: IndexDatabase,
    encoder: IndexEncoder,
    config: IndexConfig,
    *,
    has_changed: bool,
    report: Report,
) -> None:
    """Train, tune or drop the approximate index, depending on the number of images."""
    about = database.about
    if config.ann == "never" or (config.ann == "auto" and database.count() < FEWEST_ROWS):
        if about.ann is not None:
            report(f"ann={config.ann}: dropped the approximate index; searches are now exact.")
            database.drop_ann()
            database.write_about(replace(about, ann=None))
        return
    is_used = about.ann is not None and about.ann.is_used
    trains = needs_training(database) or (config.ann == "always" and not is_used)
    if not trains and not (is_used and has_changed):
        return
    queries = encoder.encode_texts(choose_texts(_NUM_QUERIES))
    always, ann = config.ann == "always", about.ann
    if ann is not None and not trains:
        ann = tune_ann(database, ann, queries)
        trains = not always and ann.recall_at_10 < MIN_RECALL
    if ann is None or trains:
        if ann is not None:
            # Searches during training must not use the settings tuned for the old partitions.
            database.write_about(replace(about, ann=None))
        ann = train_ann(database, queries, always=always, report=report)
    else:
        report(describe_ann(ann))
    database.write_about(replace(about, ann=ann))


def choose_texts(count: int) -> list[str]:
    """Choose distinct English captions of the example images, the same captions in every call."""
    captions: set[str] = set()
    for name in ("photographs", "emoji"):
        file = find_example_data() / name / "captions.jsonl"
        lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        captions |= {line["captions"][0] for line in lines if line["lang"] == "en"}
    return random.Random(0).sample(sorted(captions), count)


@dataclass
class FolderUpdate:
    """Writes the embeddings of new and changed images, and removes deleted images.

    `added` includes copied and renamed images, `removed` includes images that can no longer be
    read, and `encoded` counts the images that the model was run on.
    """

    database: IndexDatabase
    image_dir: Path
    encoder: IndexEncoder
    config: IndexConfig
    tally: ImageTally
    unchanged: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    encoded: int = 0
    errors: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stats: dict[str, os.stat_result] = {}  # by name: the path relative to the folder
        self._known = {  # `stat` and SHA-256 of each indexed file
            path: (stat, sha256)
            for batch in self.database.iterate(["path", "stat", "sha256"])
            for path, stat, sha256 in zip(*(c.to_pylist() for c in batch.columns), strict=True)
        }
        if repeated := self.database.count() - len(self._known):
            raise ValueError(
                f"{self.database.location} is damaged: {counted(repeated, 'row')} with a duplicate "
                "path. Remove it and index the images again."
            )
        self._digests = Counter(sha256 for _, sha256 in self._known.values())  # of all rows

    def __str__(self) -> str:
        return (
            f"{counted(self.unchanged + self.added + self.changed, 'image')}: {self.added:,} new, "
            f"{self.changed:,} changed, {self.unchanged:,} unchanged; {self.removed:,} removed. "
            f"Encoded {self.encoded:,}."
        )

    def describe_errors(self) -> str:
        count = counted(len(self.errors), "unreadable image")
        return f"Not in the index: {count}:\n" + list_first(self.errors.values(), "\n")

    def run(self, paths: Sequence[Path]) -> None:
        # Stat before reading, so a file that is written in between is noticed next time.
        for path in paths:
            self._read_stat(path)
        waiting = [
            name
            for name, stat in self._stats.items()
            if name not in self._known or self._known[name][0] != describe_stat(stat)
        ]
        self.unchanged = len(self._stats) - len(waiting)
        if waiting:
            self._settle_precision()
        else:  # only queries are encoded: decode them as the indexed images were
            self.encoder.jpeg_decoding = (
                "scaled" if "jpeg decoding" in self.database.about.precision else "full"
            )
        with tqdm(
            total=len(waiting), unit=" images", disable=not (self.config.show_progress and waiting)
        ) as progress:
            on_cpu = self.encoder.model.device.type == "cpu"
            size = _COMMITTED_AT_ONCE if on_cpu else _COMMITTED_BY_GPU
            for start in range(0, len(waiting), size):
                part = waiting[start : start + size]
                self._write_part({name: self.image_dir / name for name in part}, progress)
                progress.update(start + len(part) - progress.n)
        if len(self.errors) == len(paths):
            raise ValueError(self.describe_errors())
        gone = [
            name
            for name in self._known
            if name not in self._stats or self.image_dir / name in self.errors
        ]
        self.database.remove(gone)
        self.removed = len(gone)
        if waiting or gone:
            self.database.optimize()

    def _settle_precision(self) -> None:
        """Record the image encoding; raise ValueError if indexed images were encoded otherwise."""
        about, precision = self.database.about, self.encoder.describe_encoding()
        if self._known and (differences := list_differences(about.precision, precision)):
            raise ValueError(
                f"{self.database.location} was indexed with other settings: "
                f"{'; '.join(differences)}. Run llm2clip index with the original device, precision "
                "(--precision float32 if none is recorded) and JPEG decoding, or choose a new "
                "database."
            )
        if about.precision != precision:
            self.database.write_about(replace(about, precision=precision))

    def _read_stat(self, path: Path) -> None:
        """Read a file's size and timestamps; record an error on failure or a non-Unicode name."""
        name = path.relative_to(self.image_dir).as_posix()
        try:
            name.encode()
            self._stats[name] = path.stat()
        except UnicodeEncodeError:
            self.errors[path] = f"{name!r}: its file name is not valid Unicode. Rename it."
        except OSError as error:
            raise_disk_failure(error, path)
            self.errors[path] = f"{path}: cannot be read ({error.strerror or error})."

    def _write_part(self, part: dict[str, Path], progress: tqdm[Any]) -> None:
        digests, contents = self._read(part, progress)
        names = [name for name in digests if part[name] not in self.errors]
        if not names:
            return
        stats = [self._stats[name] for name in names]
        images = [contents[digests[name]] for name in names]
        rows = {
            "path": names,
            "modified": [datetime.fromtimestamp(s.st_mtime, timezone.utc) for s in stats],
            "stat": [describe_stat(stat) for stat in stats],
            "sha256": [digests[name] for name in names],
            "bytes": [stat.st_size for stat in stats],
            **{column: [image[column] for image in images] for column in FACTS},
        }
        self.database.write(rows, np.stack([image["embedding"] for image in images]))
        earlier = [self._known[name][1] for name in names if name in self._known]
        same = sum(name in self._known and self._known[name][1] == digests[name] for name in names)
        self._digests.update(digests[name] for name in names)
        self._digests.subtract(earlier)
        self._digests += Counter()  # drop digests that no row has
        self.unchanged += same  # touched, or copied from a backup
        self.changed += len(earlier) - same
        self.added += len(names) - len(earlier)

    def _read(
        self, part: dict[str, Path], progress: tqdm[Any]
    ) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Read each file once; return digests by name, and `FACTS` and embeddings by digest.

        A file is encoded if its digest is not in the index; duplicate files are encoded only once.
        """
        read = encode_readable_images(
            self.encoder.model,
            list(part.values()),
            batch_size=self.config.batch_size,
            progress=progress,
            tally=self.tally,
            known=self._digests,
        )
        self.encoded += len(read.paths)
        self.errors |= read.errors
        digests = {name: read.digests[path] for name, path in part.items() if path in read.digests}
        contents = self.database.find_by_digest(
            [digest for digest in set(digests.values()) if digest in self._digests]
        )
        for path, facts, embed in zip(read.paths, read.facts, read.embeds.numpy(), strict=True):
            contents[read.digests[path]] = {**facts, "embedding": embed}
        broken = {read.digests[path]: path for path in read.errors if path in read.digests}
        for name, digest in digests.items():
            if digest in broken:  # every copy is broken, too
                error = read.errors[broken[digest]]
                self.errors[part[name]] = error.replace(str(broken[digest]), str(part[name]), 1)
        return digests, contents


def describe_stat(stat: os.stat_result) -> str:
    """Return a file's size and timestamps as text; any write to the file changes the text."""
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
