"""Reads parts of a source into columns, here or in processes of their own.

A process is `python -m modeling_llm2clip.data.records.record_index_worker FOLDER NUMBER`, and not
one of `multiprocessing`, which would run the user's script again or fork threads that torch has
started. It reads every n-th part and leaves two files of each: batches, and then the errors.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from ..remote.file_places import parse_place
from ..validation_errors import ErrorCollector
from .record_columns import ROWS_PER_BATCH, SCHEMA, RecordColumns
from .records import Modality, RawRecord, check_record
from .source_files import SourceFiles, SourcePart

_JOB_FILE = "job.json"
_PACKAGES = Path(__file__).resolve().parents[3]
_SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True)
class IndexJob:
    """A source, and how it is read.

    Attributes:
        source: its files.
        image_dir: folder of the images that are files; None if there is none.
        require_images: whether a record without an image is an error.
        ignore_fields: names of further fields, which are not errors.
        modality: what alone is read, so that records need not be pairs; None for both.
    """

    source: SourceFiles
    image_dir: Path | None
    require_images: bool
    ignore_fields: tuple[str, ...]
    modality: Modality | None = None

    def add(self, raw: RawRecord, columns: RecordColumns, errors: ErrorCollector) -> bool:
        """Check a record of the source, and add what is left of it to columns.

        Args:
            raw: what the source has.
            columns: get the record, unless its name or language cannot be read, or one of its texts
                not be stored.
            errors: gets every error of this record.

        Returns:
            Whether it was added.
        """
        record = check_record(
            raw,
            errors,
            image_dir=self.image_dir,
            require_images=self.require_images,
            ignore_fields=self.ignore_fields,
            modality=self.modality,
        )
        if record is None:
            return False
        try:
            columns.add(record)
        except UnicodeEncodeError:
            errors.add("a text has half a character (a lone surrogate)", record.place)
            return False
        return True

    def to_json(self) -> str:
        """Return the job as JSON."""
        fields: dict[str, Any] = {**vars(self), "source": vars(self.source)}
        return json.dumps(fields, default=str)

    @classmethod
    def from_json(cls, text: str) -> IndexJob:
        """Read a job.

        Args:
            text: from `to_json`.
        """
        fields = json.loads(text)
        source = fields["source"]
        files = [parse_place(file) for file in source["files"]]
        return cls(
            source=SourceFiles(files, parse_place(source["base"]), source["suffix"]),
            image_dir=None if fields["image_dir"] is None else Path(fields["image_dir"]),
            require_images=fields["require_images"],
            ignore_fields=tuple(fields["ignore_fields"]),
            modality=fields["modality"],
        )


def read_part(job: IndexJob, part: SourcePart, errors: ErrorCollector) -> Iterator[pa.RecordBatch]:
    """Read a part into columns; a record with errors is built from what is left of it.

    Args:
        job: the source, and how it is read.
        part: one of its parts.
        errors: gets every error.

    Yields:
        Batches of at most `ROWS_PER_BATCH` records.
    """
    columns = RecordColumns()
    for raw in job.source.read(part, errors):
        job.add(raw, columns, errors)
        if len(columns) == ROWS_PER_BATCH:
            yield columns.take_batch()
    if len(columns):
        yield columns.take_batch()


def read_parts_in_processes(
    job: IndexJob,
    parts: Sequence[SourcePart],
    errors: ErrorCollector,
    *,
    num_processes: int,
    on_part: Callable[[], object],
) -> Iterator[pa.RecordBatch]:
    """Read parts in several processes, and yield their batches in the order of the parts.

    Args:
        job: the source, and how it is read.
        parts: its parts.
        errors: gets every error.
        num_processes: how many to start.
        on_part: called after each part.

    Yields:
        Batches of at most `ROWS_PER_BATCH` records.

    Raises:
        RuntimeError: a process ended before its parts were read; its last output is shown.
    """
    with tempfile.TemporaryDirectory(prefix="llm2clip-index-") as name, ExitStack() as stack:
        folder = Path(name)
        shares = [list(range(w, len(parts), num_processes)) for w in range(num_processes)]
        described = [[str(p.file), p.name, p.start, p.stop, p.first_line] for p in parts]
        content = {"job": job.to_json(), "parts": described, "shares": shares}
        (folder / _JOB_FILE).write_text(json.dumps(content), encoding="utf-8")
        workers = [stack.enter_context(_start(folder, number)) for number in range(num_processes)]
        for number in range(len(parts)):
            _wait_for(folder, number, workers[number % num_processes])
            file = _part_file(folder, number)
            with pa.memory_map(str(file)) as mapped:
                yield from pa.ipc.open_stream(mapped)
            errors.extend(ErrorCollector.from_json(_errors_file(folder, number).read_text("utf-8")))
            file.unlink()
            on_part()


@contextmanager
def _start(folder: Path, number: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process, and end it if it is not needed any more."""
    paths = os.pathsep.join([str(_PACKAGES), os.environ.get("PYTHONPATH", "")])
    with (folder / f"worker-{number}.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(number)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": paths},
        )
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait()


def _wait_for(folder: Path, number: int, worker: subprocess.Popen[bytes]) -> None:
    done = _errors_file(folder, number)
    while not done.is_file():
        # In this order: a process that has ended may have written the part just before.
        if worker.poll() is not None and not done.is_file():
            logs = [log.read_text("utf-8", "replace") for log in folder.glob("worker-*.log")]
            raise RuntimeError(
                f"A process that reads the data ended with code {worker.returncode}: "
                f"{' '.join(logs)[-2000:]}"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _work(folder: Path, worker: int) -> None:
    """Read the parts of one process."""
    gc.disable()  # nothing here makes cycles, and a collection looks at every text of a batch
    content = json.loads((folder / _JOB_FILE).read_text(encoding="utf-8"))
    job = IndexJob.from_json(content["job"])
    for number in content["shares"][worker]:
        file, *rest = content["parts"][number]
        errors = ErrorCollector()
        with pa.OSFile(str(_part_file(folder, number)), "wb") as opened:
            with pa.ipc.new_stream(opened, SCHEMA) as stream:
                for batch in read_part(job, SourcePart(parse_place(file), *rest), errors):
                    stream.write_batch(batch)
        unfinished = folder / f"{number}.tmp"
        unfinished.write_text(errors.to_json(), encoding="utf-8")
        unfinished.replace(_errors_file(folder, number))


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.arrow"


def _errors_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.json"


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))
