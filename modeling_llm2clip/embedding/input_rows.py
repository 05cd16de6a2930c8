"""Read the texts or images of an output shard by shard.

A shard holds `rows_per_shard` consecutive captions or images of the dataset. `embed` writes a row
with an id for each caption or image. `extract` writes the distinct captions of a shard, and an
index from captions to rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from .._suggestions import counted
from ..configs.encoding_config import EmbeddingColumn
from ..data.captions.sentence_views import add_views
from ..data.images.image_sources import ImageSource
from ..data.key_arrays import Array, count_distinct
from ..data.records.record_columns import CAPTION_COLUMNS, flatten_captions
from ..data.records.record_table import (
    RecordTable,
    find_first_records,
    require_images,
    select_one_per_image,
)
from ..data.records.records import Modality
from ..data.store.store_index import make_batch
from ..processing_llm2clip import check_texts

_SEPARATOR = "#"
_ITEM_COLUMNS = ("name", "group_id", "lang", "key", "group_key", "text_keys")


class TextRows:
    """The captions of a dataset; short captions come before long ones in each record.

    Args:
        records: The dataset.
        rows_per_shard: Captions in every shard but the last.
        columns: Columns to write besides the id. None for a store, which has no ids and reads each
            distinct caption of a shard once.
        counts: Batches of the numbers of short and long captions per record, sentence views
            included. None to count the captions of `records`.
        num_views: Sentence views per long caption.

    Raises:
        ValueError: With `columns`: two records have the same name and language, or a language
            contains the character that separates the parts of an id.
    """

    def __init__(
        self,
        records: RecordTable,
        rows_per_shard: int,
        *,
        columns: Sequence[EmbeddingColumn] | None = None,
        counts: Iterable[tuple[Array, Array]] | None = None,
        num_views: int = 0,
    ) -> None:
        self._records = records
        self._rows_per_shard = rows_per_shard
        self._columns = columns
        self._num_views = num_views
        self._num_langs = 0 if columns is None else _count_langs(records)
        counts = records.iterate_counts() if counts is None else counts
        self._starts, self._num_rows = _find_shards(counts, rows_per_shard)

    def __len__(self) -> int:
        return self._num_rows

    def read_inputs(self, rows: range) -> list[str]:
        """Read the captions of a shard."""
        parts = (texts.to_pylist() for _, texts, _, _ in self._iterate(rows, CAPTION_COLUMNS))
        texts = [text for part in parts for text in part]
        return list(dict.fromkeys(texts)) if self._columns is None else texts

    def sample(self, size: int) -> list[str]:
        """Read one short or long caption from each of `size` evenly spaced records."""
        chosen = _space_evenly(len(self._records), size)
        sampled = []
        for number, record in enumerate(self._records.select(chosen)):
            texts = (*record.captions, *record.long_captions)
            sampled += [texts[number % len(texts)]] if texts else []
        return sampled

    def read(self, rows: range) -> pa.Table:
        """Read `id` and the columns of a shard."""
        assert self._columns is not None
        fields = [*dict.fromkeys(("name", "lang", *self._columns))]
        fields = [column for column in fields if column != "text"]
        names = [*dict.fromkeys((*fields, *CAPTION_COLUMNS))]
        parts = []
        for batch, texts, items, numbers in self._iterate(rows, names):
            taken = batch.select(fields).take(pa.array(items))
            words = map(taken.column, ("name", "lang") if self._num_langs > 1 else ("name",))
            number = pa.array(numbers).cast(pa.string())
            columns = {"id": pc.binary_join_element_wise(*words, number, _SEPARATOR)}
            for column in self._columns:
                columns[column] = texts if column == "text" else taken.column(column)
            parts.append(pa.table(columns))
        return pa.concat_tables(parts).combine_chunks()

    def _iterate(
        self, rows: range, names: Sequence[str]
    ) -> Iterator[tuple[pa.RecordBatch, pa.Array, Array, Array]]:
        """Yield batches of records with the shard's captions, and each caption's row and number."""
        shard = rows.start // self._rows_per_shard
        record, skipped = self._starts[shard]
        left = len(rows)
        # The next shard may begin in the last record of this one.
        stop = self._starts[shard + 1][0] + 1 if shard + 1 < len(self._starts) else None
        chosen = self._records.select(np.arange(record, stop or len(self._records)))
        for batch in chosen.iterate_columns(names):
            flat = flatten_captions(add_views(batch, self._num_views))
            counts = np.diff(flat.ends)
            items = np.repeat(np.arange(len(counts)), counts)
            numbers = np.arange(len(items)) - np.repeat(flat.ends[:-1], counts)
            part = slice(skipped, skipped + left)
            yield batch, flat.texts[part], items[part], numbers[part]
            left -= len(items[part])
            skipped = max(0, skipped - len(items))
            if not left:
                return


class ImageRows:
    """The images of a dataset; an image with records in several languages is listed once.

    Args:
        records: The dataset, with images.
        columns: Columns to write besides the id, from the first record of each image.

    Raises:
        ValueError: Two images have the same name.
    """

    def __init__(self, records: RecordTable, columns: Sequence[EmbeddingColumn] = ()) -> None:
        self._records = select_one_per_image(records)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._records)

    def read_inputs(self, rows: range) -> list[ImageSource]:
        """List the sources of a shard's images: paths, URLs or packed images."""
        return self._list_images(np.asarray(rows))

    def sample(self, size: int) -> list[ImageSource]:
        """List the sources of `size` evenly spaced images of the dataset."""
        return self._list_images(_space_evenly(len(self._records), size))

    def read(self, rows: range) -> pa.Table:
        names = list(dict.fromkeys(("name", *self._columns)))
        table = pa.Table.from_batches(
            self._records.select(np.asarray(rows)).iterate_columns(names)
        ).combine_chunks()
        chosen = [table.column(name) for name in ("name", *self._columns)]
        return pa.table(chosen, names=["id", *self._columns])

    def _list_images(self, rows: Array) -> list[ImageSource]:
        images = self._records.select(rows).iterate_images()
        return [image for image in images if image is not None]  # none are None


InputRows: TypeAlias = TextRows | ImageRows


def require_inputs(records: RecordTable, modality: Modality) -> None:
    """Raise ValueError if there are no captions, or if a record lacks an image."""
    if modality == "image":
        require_images(records)
    elif not any(short.any() or long.any() for short, long in records.iterate_counts()):
        check_texts([])


def index_texts(
    records: RecordTable, rows_per_shard: int, num_views: int
) -> Iterator[pa.RecordBatch]:
    """Yield the index of a caption store, which stores each distinct caption once per shard."""
    seen: dict[str, int] = {}  # captions of the shard, in order of first occurrence
    num_texts = first_row = 0
    for batch in records.iterate_columns((*_ITEM_COLUMNS, *CAPTION_COLUMNS)):
        viewed = add_views(batch.select([*CAPTION_COLUMNS, "text_keys"]), num_views)
        flat = flatten_captions(viewed)
        rows = np.empty(len(flat.texts), np.int64)
        for place, text in enumerate(flat.texts.to_pylist()):
            if num_texts % rows_per_shard == 0:
                first_row += len(seen)
                seen.clear()
            num_texts += 1
            rows[place] = first_row + seen.setdefault(text, len(seen))
        yield make_batch(batch, flat.num_short, flat.ends, rows, viewed.column("text_keys"))


def index_images(records: RecordTable) -> Iterator[pa.RecordBatch]:
    """Yield the index of an image store; records of one image share a row."""
    firsts = find_first_records(records)
    numbers = (np.cumsum(firsts == np.arange(len(records)), dtype=firsts.dtype) - 1)[firsts]
    start = 0
    for batch in records.iterate_columns(_ITEM_COLUMNS):
        rows = numbers[start : start + len(batch)]
        start += len(rows)
        yield make_batch(batch, np.ones(len(rows), np.int32), np.arange(len(rows) + 1), rows)


def _count_langs(records: RecordTable) -> int:
    """Count the languages; require a unique name and language per record."""
    num_keys = count_distinct(partial(records.iterate_numbers, "key"), len(records))
    if num_keys < len(records):
        raise ValueError(
            f"{counted(len(records) - num_keys, 'record')} with the name and language of another "
            "record, so ids would not be unique. Put all captions of an image in one language into "
            "one record."
        )
    langs: set[str] = set()
    for batch in records.iterate_columns(("lang",)):
        langs.update(batch.column(0).unique().to_pylist())
    if wrong := sorted(lang for lang in langs if _SEPARATOR in lang):
        raise ValueError(
            f"lang={wrong[0]!r} contains {_SEPARATOR}, which separates the parts of an id. Use a "
            "BCP 47 tag, such as en or zh-Hans."
        )
    return len(langs)


def _find_shards(
    all_counts: Iterable[tuple[Array, Array]], rows_per_shard: int
) -> tuple[list[tuple[int, int]], int]:
    """Find each shard's first record, and how many of that record's captions to skip."""
    starts: list[tuple[int, int]] = []
    num_records = num_rows = 0
    for short, long in all_counts:
        counts = short.astype(np.int64) + long
        ends = num_rows + np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else num_rows
        firsts = np.arange(len(starts) * rows_per_shard, total, rows_per_shard)
        items = np.searchsorted(ends, firsts, side="right")
        before = firsts - (ends[items] - counts[items])
        starts += zip((num_records + items).tolist(), before.tolist(), strict=True)
        num_records, num_rows = num_records + len(counts), total
    return starts, num_rows


def _space_evenly(count: int, size: int) -> Array:
    return np.linspace(0, count - 1, min(size, count)).round().astype(np.int64)
