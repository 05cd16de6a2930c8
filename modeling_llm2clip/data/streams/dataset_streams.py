"""Streams a `datasets.IterableDataset`.

Its shards are shuffled and resumed here, because its own shuffle buffer is lost when it is resumed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Set
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import partial
from itertools import islice
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic_files import hash_json
from ..remote.shard_urls import drop_signature
from ..sources.shard_streams import StreamedSample, read_row, refuse_shared_paths
from .record_streams import RecordStream

if TYPE_CHECKING:
    import datasets
    import torch

_ROWS_OF_STREAM = 16
_NAME = "dataset"


def stream_dataset(
    dataset: datasets.IterableDataset,
    *,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> RecordStream:
    """Stream the samples of an `IterableDataset`.

    A dataset whose shards apart would give other samples than the whole, as after `skip`, `take`,
    `interleave_datasets` or a batched `map`, is one shard, which one worker reads. A state goes on
    with the same files, first row, steps and columns only, of which functions are known by their
    names and other objects by their classes.

    Args:
        dataset: Neither shuffled nor split by node; both is done here.
        columns: Field of a record to the column that holds it; other columns are not read. Default:
            every column, named as the fields of a record.
        options: Options of `RecordStream`, such as `seed` and `buffer_size`.

    Returns:
        The stream; its shards are those of the dataset, or all of it is one.

    Raises:
        ValueError: It is not an `IterableDataset`, or is shuffled or split by node already.

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
            f"{type(dataset).__name__} is not a datasets.IterableDataset. For a Dataset use "
            "records_from_dataset."
        )
    if getattr(dataset, "_distributed", None) is not None:
        raise ValueError(
            "The dataset is split by node, and the stream would split it again. Give the whole "
            "dataset, without split_dataset_by_node; process_index and num_processes are options "
            "of the stream."
        )
    if getattr(dataset, "_shuffling", None) is not None or _is_shuffled(dataset._ex_iterable):
        raise ValueError(
            "The dataset is shuffled, and a run that is resumed could get another order. Give it "
            "without shuffle(); seed and buffer_size are options of the stream."
        )
    return RecordStream(_DatasetShards(dataset, columns), **options)


class _DatasetShards:
    """The shards of an `IterableDataset`."""

    def __init__(self, dataset: Any, columns: Mapping[str, str] | None) -> None:
        import datasets

        dataset = dataset.with_format(None)  # texts are read, whatever a row is for others
        for name, feature in (dataset.features or {}).items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
        self._dataset = dataset
        self._columns = None if columns is None else dict(columns)
        digest = hash_json([_describe(dataset._ex_iterable), self._columns])[:12]
        self.shards = [f"{_NAME} {digest} shard {number}" for number in range(dataset.num_shards)]
        indivisible = _find_indivisible(dataset._ex_iterable)
        self._is_whole = indivisible is not None
        if self._is_whole:
            self.shards = [f"all of the dataset, because of its {indivisible} ({digest})"]

    def read(
        self,
        shard: int,
        first: int,
        on_retry: Callable[[str, str], None],  # noqa: ARG002 (datasets tries again itself)
    ) -> Iterator[StreamedSample]:
        """Yield the samples of a shard."""
        part = self._dataset
        if not self._is_whole:
            part = part.shard(num_shards=len(self.shards), index=shard)
        return refuse_shared_paths(self._read(part, shard), first)

    def _read(self, part: Any, shard: int) -> Iterator[StreamedSample]:
        # Batches, because in a worker a plain iteration would drop other workers' samples.
        batches = part.iter(batch_size=_ROWS_OF_STREAM)
        rows = (
            dict(zip(batch, map(_as_python, values), strict=True))
            for batch in batches
            for values in zip(*batch.values(), strict=True)
        )
        for number, row in enumerate(rows):
            fields = row
            if self._columns is not None:
                fields = {field: row.get(column) for field, column in self._columns.items()}
            image = fields.get("image")
            if not isinstance(image, dict | bytes | str | None):
                raise ValueError(
                    f"{_NAME} shard {shard} row {number}: the image is a {type(image).__name__}, "
                    "decoded before map or by a format. Have it undecoded from the beginning: "
                    "dataset.cast_column(NAME, datasets.Image(decode=False))."
                )
            is_packed = isinstance(image, dict | bytes)
            yield read_row(
                number, f"{_NAME} shard {shard}", fields, {"image"} if is_packed else set()
            )


# Steps of a dataset that do the same to each of its shards as to all of them.
_DIVISIBLE = frozenset(
    ("ExamplesIterable", "ArrowExamplesIterable", "RebatchedArrowExamplesIterable",
     "SelectColumnsIterable", "FormattedExamplesIterable", "TypedExamplesIterable",
     "MappedExamplesIterable", "FilteredExamplesIterable", "RepeatExamplesIterable",
     "InterleavedShardsExamplesIterable", "VerticallyConcatenatedMultiSourcesExamplesIterable")
)  # fmt: skip
_NOT_DESCRIBED = ("decoding_pool", "token_per_repo_id")  # what is open, and replaced keys
_SHOWN_WHOLE = (Decimal, Enum, PurePath, complex, date, range, re.Pattern, slice, time, timedelta)
_COUNTING = {"SkipExamplesIterable": "skip", "TakeExamplesIterable": "take"}


def _list_sources(step: Any) -> list[Any]:
    source = [step.ex_iterable] if hasattr(step, "ex_iterable") else []
    return [*source, *getattr(step, "ex_iterables", ())]


def _is_shuffled(step: Any) -> bool:
    return "Shuffled" in type(step).__name__ or any(map(_is_shuffled, _list_sources(step)))


def _find_indivisible(step: Any) -> str | None:
    """Name a step that counts samples across shards, so that these apart have others; or None."""
    kind = type(step).__name__
    if kind not in _DIVISIBLE:
        return _COUNTING.get(kind, kind.removesuffix("ExamplesIterable"))
    if getattr(step, "with_indices", False):
        return "with_indices"
    if getattr(step, "batched", False) and step.batch_size != 1:
        return "batches across shards"
    found = map(_find_indivisible, _list_sources(step))
    return next((name for name in found if name is not None), None)


def _describe(value: Any) -> Any:
    """Describe a step, or an option of one, for JSON, by what is the same in all processes.

    Functions and classes are described by their names, other objects by their classes, and files
    and tables by their first row too; what a generator yields may come only once.
    """
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, str):
        return drop_signature(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Mapping):
        return [[_describe(name), _describe(item)] for name, item in value.items()]
    if isinstance(value, list | tuple):
        return [_describe(item) for item in value]
    if isinstance(value, Set):
        return sorted(hash_json(_describe(item)) for item in value)
    if isinstance(value, _SHOWN_WHOLE):
        return [type(value).__qualname__, repr(value)]
    if isinstance(value, partial):
        return _describe([value.func, value.args, value.keywords])
    if hasattr(value, "__qualname__"):
        return value.__qualname__
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return _describe(value.get_state())
    if isinstance(value, np.ma.MaskedArray):
        return _describe([value.data, np.ma.getmaskarray(value)])
    if hasattr(value, "tolist"):  # of numpy or torch
        if hasattr(value, "detach"):
            return _describe([str(value.dtype), list(value.shape), _read_tensor(value)])
        array = np.asarray(value)
        if array.dtype.hasobject or array.ndim == 0:
            return _describe(array.tolist())
        return _describe([array.dtype.str, list(array.shape), array.tobytes()])
    if hasattr(value, "shard_data_sources"):
        options = {
            name: option for name, option in vars(value).items()
            if not name.startswith("_") and name not in _NOT_DESCRIBED
        }  # fmt: skip
        generator = _find_generator(value)
        is_read = generator is None and not _list_sources(value)
        rows = islice(value.shard_data_sources(1, 0), 1) if is_read else ()
        return _describe([type(value), options, generator, *rows])
    if type(value).__module__ == "torch":  # a dtype or a device
        return repr(value)
    return [type(value).__qualname__, getattr(value, "num_rows", None)]


def _read_tensor(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor, also of one that numpy cannot hold, such as bfloat16."""
    import torch

    dense = tensor.detach().cpu().to_dense().resolve_conj().resolve_neg()
    return dense.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _find_generator(source: Any) -> Any:
    """Return the user's function that `from_generator` calls, or None."""
    builder: Any = getattr(getattr(source, "generate_examples_fn", None), "__self__", None)
    return builder.config.generator if type(builder).__name__ == "Generator" else None


def _as_python(value: Any) -> Any:
    """Undo the format (numpy, torch) that a dataset had before `map`, of all but pixels."""
    if hasattr(value, "tolist") and value.ndim < 2:
        value = value.tolist()
    return [_as_python(item) for item in value] if isinstance(value, list) else value
