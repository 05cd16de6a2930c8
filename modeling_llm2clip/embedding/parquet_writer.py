"""Writes final embeddings as Parquet files, for vector databases: truncated, in fewer bits.

A text is identified by name, language and number of the caption, `beach.jpg#de#0`; the language is
left out where the dataset has one alone. An image is identified by its name.

int8 and the two binary dtypes are those of sentence-transformers' `quantize_embeddings`, number for
number. N embeddings, P dimensions of the model, D of what is stored.

The names of `_manifest.json` and of the records beside it begin with an underscore, so that readers
of a folder of Parquet pass over them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor

from .._suggestions import counted, list_first
from ..configs.encoding_config import EmbeddingColumn, EmbeddingDtype
from ..data.atomic_files import hash_file
from ..data.captions.caption_columns import flatten_captions
from ..data.images.image_sources import ImageSource
from ..data.key_arrays import Array, count_distinct
from ..data.records.record_table import (
    CAPTION_COLUMNS,
    RecordTable,
    require_images,
    select_one_per_image,
)
from ..data.store.store_manifest import ShardRecord
from .embedding_manifest import EmbeddingManifest
from .sharded_writer import ShardedWriter

_SEPARATOR = "#"
# Type of the values of a stored embedding.
VALUE_TYPES: dict[EmbeddingDtype, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "binary": np.int8,
    "ubinary": np.uint8,
}
_STEPS = 255
_BITS = 8


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
        """Read a short or long caption of each of some records, which are evenly spaced."""
        chosen = _space_evenly(len(self._records), size)
        sampled = []
        for number, record in enumerate(self._records.select(chosen)):
            texts = (*record.captions, *record.long_captions)
            sampled += [texts[number % len(texts)]] if texts else []
        return sampled

    def read(self, rows: range) -> pa.Table:
        """Read `id` and the columns of a shard."""
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
        """Yield records, the captions of a shard in them, and item and number of each caption."""
        shard = rows.start // self._rows_per_shard
        record, skipped = self._starts[shard]
        left = len(rows)
        # The records after the last one of this shard are those of the next.
        stop = self._starts[shard + 1][0] + 1 if shard + 1 < len(self._starts) else None
        chosen = self._records.select(np.arange(record, stop or len(self._records)))
        for batch in chosen.iterate_columns(names):
            flat = flatten_captions(batch)
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
    """Refuse records in memory that share name and language; those of a source never do."""
    num_keys = count_distinct(partial(records.iterate_numbers, "key"), len(records))
    if num_keys < len(records):
        raise ValueError(
            f"{counted(len(records) - num_keys, 'record')} with the name and language of another "
            "one, so that an id would mean several texts. Put all captions of an image in "
            "one language into one record."
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


def _space_evenly(count: int, size: int) -> Array:
    return np.linspace(0, count - 1, min(size, count)).round().astype(np.int64)


class ParquetWriter(ShardedWriter[EmbeddingManifest]):
    """One process's access to an output that is being written.

    Args:
        folder: Folder of the output.
        manifest: Content of the complete output.
        rows: Ids and columns of its rows.
        skip_invalid: Whether images that cannot be decoded are left out.
    """

    stored_dtype = torch.float32

    def __init__(
        self,
        folder: Path,
        manifest: EmbeddingManifest,
        rows: TextRows | ImageRows,
        *,
        skip_invalid: bool,
    ) -> None:
        super().__init__(folder, manifest)
        self.rows = rows
        self._skip_invalid = skip_invalid

    def encode(self, shard: int, embeds: Tensor) -> tuple[bytes, dict[str, Any]]:
        """Return a file; rows of zeros are images that could not be decoded."""
        table = self.rows.read(self.manifest.rows_of_shard(shard))
        is_valid = embeds.numpy().any(axis=1)
        skipped = table.column("id").filter(pa.array(~is_valid)).to_pylist()
        if skipped and not self._skip_invalid:
            raise ValueError(
                f"{counted(len(skipped), 'image')} cannot be decoded: {list_first(skipped)}. "
                "Repair or remove what is named, or skip it (--skip-invalid)."
            )
        kept = truncate_embeddings(embeds.numpy()[is_valid], self.manifest.dim)
        ranges = self.manifest.read_ranges()
        values, num_clipped = convert_embeddings(kept, self.manifest.dtype, ranges=ranges)
        content = self._encode(table.filter(pa.array(is_valid)), values)
        return content, {
            "rows": len(values), "num_clipped": num_clipped, "skipped": tuple(skipped)
        }  # fmt: skip

    def check_file(self, record: ShardRecord) -> None:
        """Raise ValueError if a file is damaged."""
        if (digest := hash_file(self.folder / record.file)) != record.sha256:
            raise ValueError(f"{record.file}: SHA-256 is {digest}, its record says {record.sha256}")

    def _encode(self, table: pa.Table, values: Array) -> bytes:
        width = count_values(self.manifest.dim, self.manifest.dtype)
        kind = pa.from_numpy_dtype(VALUE_TYPES[self.manifest.dtype])
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind)
        table = table.add_column(1, "embedding", pa.FixedSizeListArray.from_arrays(flat, width))
        table = table.replace_schema_metadata(self.manifest.make_metadata())
        sink = io.BytesIO()
        # Embeddings are random bits: a dictionary and a compressor would only cost time.
        pq.write_table(
            table,
            sink,
            row_group_size=max(1, table.num_rows),
            use_dictionary=False,
            compression="none",
            write_statistics=["id"],
            write_page_checksum=True,
        )
        return sink.getvalue()


def count_values(dim: int, dtype: EmbeddingDtype) -> int:
    """Return how many values a stored embedding has; binary ones have eight dimensions in one."""
    if dtype not in ("binary", "ubinary"):
        return dim
    if dim % _BITS:
        raise ValueError(
            f"dtype={dtype!r} packs eight dimensions into a byte, and {dim} is not a multiple of "
            f"eight. Give truncate_dim={dim // _BITS * _BITS}, or another dtype."
        )
    return dim // _BITS


def truncate_embeddings(embeds: Array, dim: int) -> Array:
    """Keep the first dimensions of (N, P) embeddings, and scale them to unit length again."""
    if dim == embeds.shape[1]:
        return embeds
    kept = embeds[:, :dim]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    if not lengths.all():
        count = int((lengths == 0).sum())
        raise ValueError(
            f"{counted(count, 'embedding')} of zeros in the first {dim} dimensions, without a "
            "direction. Give a larger truncate_dim."
        )
    shortened: Array = (kept / lengths).astype(np.float32)
    return shortened


def measure_ranges(embeds: Array) -> Array:
    """Measure the int8 ranges of (N, D) embeddings: (2, D) smallest and largest values."""
    return np.stack([embeds.min(axis=0), embeds.max(axis=0)])


def convert_embeddings(
    embeds: Array, dtype: EmbeddingDtype, *, ranges: Array | None = None
) -> tuple[Array, int]:
    """Convert embeddings to the dtype in which they are stored; int8 needs ranges.

    Returns the values, (N, D), and how many were outside the int8 ranges: they became the nearest
    number.
    """
    if dtype == "int8":
        assert ranges is not None
        steps = (ranges[1] - ranges[0]) / _STEPS
        steps = np.where(steps == 0, 1, steps)
        levels = np.clip((embeds - ranges[0]) / steps, 0, _STEPS).astype(np.int16)
        outside = (embeds < ranges[0]) | (embeds > ranges[1])
        return (levels - 128).astype(np.int8), int(outside.sum())
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(embeds > 0, axis=-1)
        # Signed, the byte 0 is -128.
        return bits if dtype == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8), 0
    return embeds.astype(VALUE_TYPES[dtype]), 0
