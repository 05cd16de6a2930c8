"""Streams a `datasets.IterableDataset`, using the dataset's own sharding and resuming."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from ..sources.shard_streams import StreamedSample, read_row
from .record_streams import RecordStream
from .stream_run import ShardReader

if TYPE_CHECKING:
    import datasets

_NAME = "dataset"


def stream_dataset(
    dataset: datasets.IterableDataset,
    *,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> RecordStream:
    """Stream the samples of an `IterableDataset`.

    A single reader (one worker in one process) reads the dataset in its own order. Each of several
    readers reads one part, `dataset.shard(num_readers, reader)`, so steps that count rows, such as
    `take`, a batched `map` or row numbers, count within a part. The saved state is the dataset's
    own, so samples in shuffle buffers are lost on resume. The report counts the samples lost from
    this stream's buffer as `not_resumed_samples`. `dataset.shuffle` may lose some samples and
    repeat others, which are not counted. Rows are named by number, so several rows of one image
    need a `group_id`.

    Args:
        dataset: The whole dataset, not split by node: this function splits it between processes.
            Before loading a state, apply the same steps to the dataset: only the columns and the
            number of shards are compared.
        columns: Record field → column that holds the field; other columns are not read. Default:
            all columns, which must be named like the record fields.
        options: Options of `RecordStream`, such as `seed` and `buffer_size`.

    Returns:
        The stream.

    Raises:
        ValueError: `dataset` is not an `IterableDataset`, or lacks a column.

    Examples:
        >>> import datasets
        >>> rows = datasets.load_dataset(
        ...     "json", data_files="my-images/captions.jsonl", split="train", streaming=True
        ... )
        >>> stream = stream_dataset(rows, require_images=False)
        >>> len(list(stream))
        20
    """
    if not hasattr(dataset, "num_shards") or hasattr(dataset, "data"):
        raise ValueError(
            f"{type(dataset).__name__} is not a datasets.IterableDataset. For a Dataset, use "
            "records_from_dataset."
        )
    return RecordStream(_DatasetShards(dataset, columns), **options)


class _DatasetShards(ShardReader):
    """The shards of an `IterableDataset`, or one part of the dataset per reader."""

    has_addresses = False

    def __init__(self, dataset: Any, columns: Mapping[str, str] | None) -> None:
        import datasets

        dataset = dataset.with_format(None)  # plain Python values, whatever format is set
        for name, feature in (dataset.features or {}).items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
        self._dataset = dataset
        self._columns = None if columns is None else dict(columns)
        if dataset.column_names is not None:
            self._require_columns(dataset.column_names)
        self.shards = [f"{_NAME} shard {number}" for number in range(dataset.num_shards)]
        self._parts: list[Any] = []

    def divide(self, num_readers: int, epoch: int) -> _DatasetShards:
        divided = copy(self)
        # New objects, because a resumed one would start from its old state again.
        divided._parts = [
            self._dataset.shard(num_shards=num_readers, index=number)
            if num_readers > 1
            else self._dataset.with_format(None)
            for number in range(num_readers)
        ]
        for part in divided._parts:
            part.set_epoch(epoch)
        described = f"{len(self.shards)} shards of {self._dataset.column_names}, {self._columns}"
        divided.shards = [
            f"{_NAME} part {number} of {num_readers} ({described})" for number in range(num_readers)
        ]
        return divided

    def save(self, shard: int) -> Any:
        return self._parts[shard].state_dict()

    def read(
        self,
        shard: int,
        first: int,
        on_retry: Callable[[str, str], None],  # noqa: ARG002 (datasets retries by itself)
        position: Any = None,
    ) -> Iterator[StreamedSample]:
        if position is not None:
            self._parts[shard].load_state_dict(position)
        return self._read(shard, first)

    def _read(self, shard: int, first: int) -> Iterator[StreamedSample]:
        name = f"{_NAME} part {shard}"
        # In batches: in a worker, plain iteration would skip the samples of other workers.
        for number, batch in enumerate(self._parts[shard].iter(batch_size=1), first):
            row = {column: values[0] for column, values in batch.items()}
            if self._columns is not None:
                self._require_columns(row)
                row = {field: row[column] for field, column in self._columns.items()}
            image = row.get("image")
            if not isinstance(image, dict | bytes | str | None):
                raise ValueError(
                    f"{name} row {number}: the image is a {type(image).__name__}, decoded by map "
                    "or a format. Turn off decoding first: "
                    "dataset.cast_column(NAME, datasets.Image(decode=False))."
                )
            packed = {"image"} if isinstance(image, dict | bytes) else set()
            sample = read_row(number, name, row, packed)
            # Name rows by number: in many datasets, all images have the same path.
            raw = sample.raw and sample.raw._replace(default_name=f"{name}/{number}")
            yield sample._replace(raw=raw)

    def _require_columns(self, names: Collection[str]) -> None:
        if missing := set((self._columns or {}).values()) - set(names):
            raise ValueError(
                f"The dataset has no column {', '.join(sorted(missing))}, only {', '.join(names)}. "
                "Correct the `columns` argument."
            )
