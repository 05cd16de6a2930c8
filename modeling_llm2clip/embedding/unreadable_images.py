"""Name all unreadable images when encoding hits the first one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..data.images.image_sources import UnreadableImagesError, find_unreadable_images
from ..data.validation_errors import ErrorCollector
from .input_rows import InputRows
from .sharded_writer import ShardedWriter

_ADVICE = (
    "Then run again with a new folder. --check-images decodes every image before computing "
    "anything."
)


@contextmanager
def name_unreadable_images(
    rows: InputRows,
    writer: ShardedWriter[Any] | None = None,
    *,
    source: str,
    show_progress: bool = False,
) -> Iterator[None]:
    """Turn the error of one unreadable image into a DataValidationError that names all.

    Decodes the images of the shards that `writer` still lacks, or all images if it is None.
    """
    try:
        yield
    except UnreadableImagesError:
        errors = ErrorCollector()
        shards = [range(len(rows))]
        if writer is not None:
            shards = [*map(writer.manifest.inputs_of_shard, writer.list_missing())]
        for shard in shards:
            images: list[Any] = rows.read_inputs(shard)
            for error in find_unreadable_images(images, show_progress=show_progress).values():
                errors.add("image unreadable", error)
        errors.raise_if_any(source, advice=_ADVICE)
        raise  # for example, the image processor refuses a size
