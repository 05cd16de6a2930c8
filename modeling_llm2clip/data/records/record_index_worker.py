"""Reads parts of a source into columns, here or in processes of their own.

A process is `python -m modeling_llm2clip.data.records.record_index_worker FOLDER NUMBER`, and not
one of `multiprocessing`, which would run the user's script again or fork threads that torch has
started. It reads every n-th part and leaves two files of each: batches, and then the errors of the
data. An error that stops it, such as denied access, is raised in the process that started it.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from ..._extras import MissingExtraError
from ..remote.file_places import parse_place
from ..remote.remote_access import AccessError, LostFileError
from ..validation_errors import ErrorCollector
from .record_columns import ROWS_PER_BATCH, SCHEMA, RecordColumns
from .records import Modality, RawRecord, check_record
from .source_files import SourceFiles, SourcePart

_JOB_FILE = "job.json"
_PACKAGES = Path(__file__).resolve().parents[3]
_SECONDS_BETWEEN_LOOKS = 0.02
_MOST_LAST_WORDS = 2000  # characters
_MOST_CHARACTERS = 8000  # of a message, so that a pipe holds it
# Errors that say all that there is to know; others are shown with where they came from.
_EXPECTED: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (AccessError, LostFileError, MissingExtraError, OSError, ValueError)
}


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
        """Check a record of the source, and add what is left of it to columns."""
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
        """Read a job."""
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
    """Read a part into columns; a record with errors is built from what is left of it."""
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
    folder: Path,
    num_processes: int,
    on_part: Callable[[], object],
) -> Iterator[pa.RecordBatch]:
    """Read parts in several processes, and yield their batches in the order of the parts."""
    shares = [list(range(w, len(parts), num_processes)) for w in range(num_processes)]
    described = [[str(p.file), p.name, p.start, p.stop, p.first_line] for p in parts]
    content = {"job": job.to_json(), "parts": described, "shares": shares}
    (folder / _JOB_FILE).write_text(json.dumps(content), encoding="utf-8")
    with ExitStack() as stack:
        workers = [stack.enter_context(_start(folder, number)) for number in range(num_processes)]
        for number in range(len(parts)):
            _wait_for(folder, number, workers)
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
    with _log_file(folder, number).open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(number)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": paths},
        )
    try:
        yield worker
    finally:
        worker.terminate()
        worker.communicate()


def _wait_for(folder: Path, part: int, workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until a part is written; raise as soon as any process has failed."""
    done = _errors_file(folder, part)
    while not done.is_file():
        for number, worker in enumerate(workers):
            # In this order: a process that has ended may have written the part just before.
            code = worker.poll()
            if code or (code == 0 and number == part % len(workers) and not done.is_file()):
                raise _explain_end(worker, _log_file(folder, number))
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _explain_end(worker: subprocess.Popen[bytes], log: Path) -> Exception:
    """Return the error that ended a process."""
    assert worker.stdout is not None
    if described := worker.stdout.read():
        name, arguments = json.loads(described)
        return _EXPECTED[name](*arguments)
    last_words = log.read_text("utf-8", "replace").strip()[-_MOST_LAST_WORDS:]
    hint = "it said nothing; the operating system ends processes when memory is full"
    return RuntimeError(
        f"A process that reads the data ended with code {worker.returncode}: {last_words or hint}"
    )


def _describe_error(error: Exception) -> tuple[str, list[Any]] | None:
    """Describe an expected error by its type and arguments; None for another one."""
    is_other_value_error = isinstance(error, ValueError) and type(error) is not ValueError
    known = (kind.__name__ for kind in type(error).__mro__ if kind in _EXPECTED.values())
    name = None if is_other_value_error else next(known, None)
    if name is None:
        return None
    if not isinstance(error, OSError) or error.errno is None:
        return name, [str(error)[:_MOST_CHARACTERS]]
    file = None if error.filename is None else str(error.filename)
    return name, [error.errno, str(error.strerror)[:_MOST_CHARACTERS], file]


def _work(folder: Path, worker: int) -> None:
    """Read the parts of one process."""
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


def _run(folder: Path, worker: int) -> None:
    """Read the parts of one process, and write to its output which expected error has ended it."""
    gc.disable()  # nothing here makes cycles, and a collection looks at every text of a batch
    output = os.dup(1)
    os.dup2(2, 1)  # whatever is printed belongs to the log
    try:
        _work(folder, worker)
    except Exception as error:
        described = _describe_error(error)
        if described is None:
            raise
        os.write(output, json.dumps(described).encode())
        sys.exit(1)


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.arrow"


def _errors_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.json"


def _log_file(folder: Path, worker: int) -> Path:
    return folder / f"worker-{worker}.log"


if __name__ == "__main__":
    _run(Path(sys.argv[1]), int(sys.argv[2]))
