"""The rows of an output of `embed`: what is embedded, how it is identified, and its columns.

A text is identified by name, language and number of the caption, `beach.jpg#de#0`; the language is
left out where the dataset has one alone. An image is identified by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from ..configs.encoding_config import EmbeddingColumn
from ..data.captions.caption_columns import CAPTION_COLUMNS, FlatCaptions, flatten_captions
from ..data.images.image_sources import ImageSource
from ..data.key_arrays import count_distinct
from ..data.records.record_table import RecordTable
from ..data.records.shared_images import require_images, select_one_per_image

Array: TypeAlias = np.ndarray[Any, Any]
_SEPARATOR = "#"


class TextRows:
    """A row for every caption of a dataset, the short ones of a record before its long ones.

    Args:
        records: The dataset.
        columns: Columns beside the id.
        rows_per_shard: Rows of every shard but the last.

    Raises:
        ValueError: There are no captions, two records have the same name and language, or a
            language has the sign that separates the parts of an id.
    """

    def __init__(
        self, records: RecordTable, columns: Sequence[EmbeddingColumn], *, rows_per_shard: int
    ) -> None:
        self._records = records
        self._columns = columns
        self._rows_per_shard = rows_per_shard
        _require_unique_records(records)
        self._num_langs = _count_langs(records)
        self._starts, self._num_rows = _find_shards(records, rows_per_shard)
        if not self._num_rows:
            from ..processing_llm2clip import check_texts  # imports torch

            check_texts([])

    def __len__(self) -> int:
        """Number of captions."""
        return self._num_rows

    def read_inputs(self, rows: range) -> list[str]:
        """Read the captions of a shard."""
        parts = (texts.to_pylist() for _, texts, _, _ in self._iterate(rows, CAPTION_COLUMNS))
        return [text for part in parts for text in part]

    def sample(self, size: int) -> list[str]:
        """Read one caption of each of some records, evenly spaced, a short one or a long one."""
        chosen = _space_evenly(len(self._records), size)
        sampled = []
        for number, record in enumerate(self._records.select(chosen)):
            texts = (*record.captions, *record.long_captions)
            sampled += [texts[number % len(texts)]] if texts else []
        return sampled

    def read(self, rows: range) -> pa.Table:
        """Read `id` and the columns of a shard."""
        wanted = [*dict.fromkeys(("name", "lang", *self._columns))]
        wanted = [column for column in wanted if column != "text"]
        names = [*dict.fromkeys((*wanted, *CAPTION_COLUMNS))]
        parts = []
        for batch, texts, items, numbers in self._iterate(rows, names):
            of_rows = batch.select(wanted).take(pa.array(items))
            columns = {"id": self._make_ids(of_rows, numbers)}
            for column in self._columns:
                columns[column] = texts if column == "text" else of_rows.column(column)
            parts.append(pa.table(columns))
        return pa.concat_tables(parts).combine_chunks()

    def _make_ids(self, batch: pa.RecordBatch, numbers: Array) -> pa.Array:
        words = [batch.column("name"), *([batch.column("lang")] if self._num_langs > 1 else [])]
        return pc.binary_join_element_wise(*words, pa.array(numbers).cast(pa.string()), _SEPARATOR)

    def _iterate(
        self, rows: range, names: Sequence[str]
    ) -> Iterator[tuple[pa.RecordBatch, pa.Array, Array, Array]]:
        """Yield records, the captions of a shard in them, and item and number of each caption."""
        shard = rows.start // self._rows_per_shard
        record, skipped = self._starts[shard]
        left = len(rows)
        # The records after the last one of this shard are those of the next.
        stop = self._starts[shard + 1][0] + 1 if shard + 1 < len(self._starts) else None
        chosen = self._records.select(np.arange(record, stop or len(self._records)))
        for batch in chosen.iterate_columns(names):
            flat = flatten_captions(batch)
            items, numbers = _locate(flat)
            part = slice(skipped, skipped + left)
            yield batch, flat.texts[part], items[part], numbers[part]
            left -= len(items[part])
            skipped = max(0, skipped - len(items))
            if not left:
                return


class ImageRows:
    """A row for every image of a dataset; records in several languages share one.

    Args:
        records: The dataset, with images.
        columns: Columns beside the id; those of the first record of an image.

    Raises:
        ValueError: There are no images, a record has none, or a name is that of two images.
    """

    def __init__(self, records: RecordTable, columns: Sequence[EmbeddingColumn]) -> None:
        require_images(records)
        self._records = select_one_per_image(records)
        self._columns = columns

    def __len__(self) -> int:
        """Number of images."""
        return len(self._records)

    def read_inputs(self, rows: range) -> list[ImageSource]:
        """List the addresses of the images of a shard."""
        return self._list_images(np.asarray(rows))

    def sample(self, size: int) -> list[ImageSource]:
        """List the addresses of some images, evenly spaced."""
        return self._list_images(_space_evenly(len(self._records), size))

    def read(self, rows: range) -> pa.Table:
        """Read `id` and the columns of a shard."""
        names = list(dict.fromkeys(("name", *self._columns)))
        table = pa.Table.from_batches(
            self._records.select(np.asarray(rows)).iterate_columns(names)
        ).combine_chunks()
        chosen = [table.column(name) for name in ("name", *self._columns)]
        return pa.table(chosen, names=["id", *self._columns])

    def _list_images(self, rows: Array) -> list[ImageSource]:
        images = self._records.select(rows).iterate_images()
        return [image for image in images if image is not None]  # all have one


def _require_unique_records(records: RecordTable) -> None:
    """Names and languages of a source are unique; those of records in memory may not be."""
    num_keys = count_distinct(partial(records.iterate_numbers, "key"), len(records))
    if num_keys < len(records):
        raise ValueError(
            f"{len(records) - num_keys} records have the name and language of another one, so that "
            "an id would mean several texts. Put all captions of an image in one language into one "
            "record."
        )


def _count_langs(records: RecordTable) -> int:
    langs: set[str] = set()
    for batch in records.iterate_columns(("lang",)):
        langs.update(batch.column(0).unique().to_pylist())
    if wrong := sorted(lang for lang in langs if _SEPARATOR in lang):
        raise ValueError(
            f"lang={wrong[0]!r} has a {_SEPARATOR}, which separates the parts of an id. Give a "
            "language as BCP 47 writes it, such as en or zh-Hans."
        )
    return len(langs)


def _find_shards(records: RecordTable, rows_per_shard: int) -> tuple[list[tuple[int, int]], int]:
    """Find the record in which each shard begins, and how many of its captions are before it."""
    starts: list[tuple[int, int]] = []
    num_records = num_rows = 0
    for short, long in records.iterate_counts():
        counts = short.astype(np.int64) + long
        ends = num_rows + np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else num_rows
        firsts = np.arange(len(starts) * rows_per_shard, total, rows_per_shard)
        items = np.searchsorted(ends, firsts, side="right")
        before = firsts - (ends[items] - counts[items])
        starts += zip((num_records + items).tolist(), before.tolist(), strict=True)
        num_records, num_rows = num_records + len(counts), total
    return starts, num_rows


def _locate(flat: FlatCaptions) -> tuple[Array, Array]:
    """Return item and number in the item of each caption, (T,) int64 each."""
    counts = np.diff(flat.ends)
    items = np.repeat(np.arange(len(counts)), counts)
    return items, np.arange(len(items)) - np.repeat(flat.ends[:-1], counts)


def _space_evenly(count: int, size: int) -> Array:
    return np.linspace(0, count - 1, min(size, count)).round().astype(np.int64)
