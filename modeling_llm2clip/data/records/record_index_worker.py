"""Reads parts of a source into columns, here or in processes of their own.

The processes are loky's: those of `multiprocessing` run the user's script again, or fork threads
that torch has started. Batches come back through files, which is faster than pickling them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]

from ..record_fields import Modality, RawRecord
from ..validation_errors import ErrorCollector
from .record_columns import SCHEMA, make_batches
from .records import CheckedRecord, check_record
from .source_files import SourceFiles, SourcePart


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

    def check(self, raw: RawRecord, errors: ErrorCollector) -> CheckedRecord | None:
        """Check a record of the source, as `check_record` does."""
        return check_record(
            raw,
            errors,
            image_dir=self.image_dir,
            require_images=self.require_images,
            ignore_fields=self.ignore_fields,
            modality=self.modality,
        )


def read_part(job: IndexJob, part: SourcePart, errors: ErrorCollector) -> Iterator[pa.RecordBatch]:
    """Read a part into columns; a record with errors is built from what is left of it."""
    checked = (job.check(raw, errors) for raw in job.source.read(part, errors))
    return make_batches(record for record in checked if record is not None)


def read_parts_in_processes(
    job: IndexJob,
    parts: Sequence[SourcePart],
    errors: ErrorCollector,
    *,
    folder: Path,
    num_processes: int,
    on_part: Callable[[], object],
) -> Iterator[pa.RecordBatch]:
    """Read parts in processes that write into an empty folder; yield the batches in their order.

    An error that stops a process is raised as it is; one that is killed is a `RuntimeError`.
    """
    from loky import ProcessPoolExecutor  # type: ignore[import-untyped]

    job = replace(job, source=replace(job.source, files=[]))  # a part has its file
    # Without a garbage collection: it looks at every text of a batch, and there are no cycles.
    pool = ProcessPoolExecutor(num_processes, initializer=gc.disable)
    try:
        files = [folder / f"part-{number:06d}.arrow" for number in range(len(parts))]
        written = [
            pool.submit(_write_part, job, part, file)
            for part, file in zip(parts, files, strict=True)
        ]
        for file, collected in zip(files, written, strict=True):
            found = collected.result()
            with pa.memory_map(str(file)) as mapped:
                yield from pa.ipc.open_stream(mapped)
            errors.extend(found)
            file.unlink()
            on_part()
    finally:
        pool.shutdown(kill_workers=True)


def _write_part(job: IndexJob, part: SourcePart, file: Path) -> ErrorCollector:
    errors = ErrorCollector()
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_stream(opened, SCHEMA) as stream:
        for batch in read_part(job, part, errors):
            stream.write_batch(batch)
    return errors
