"""Writes final embeddings as Parquet files, for vector databases.

The rows of a file are collected in `_unfinished/`. The names of `_manifest.json` and of the records
beside it begin with an underscore, so that readers of a folder of Parquet pass over them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..data.atomic_files import hash_file, list_differences, write_atomically
from ..data.store.store_manifest import StoreManifest, read_sealed, write_sealed
from ..image_loading_llm2clip import ImageLimits, get_image_limits
from .embedding_dtypes import VALUE_TYPES, convert_embeddings, count_values, truncate_embeddings
from .embedding_manifest import EmbeddedShard, EmbeddingManifest
from .embedding_rows import ImageRows, TextRows
from .sharded_writer import Array, ShardedWriter, ShardWriter, begin_or_continue, publish_first

_UNFINISHED = "_unfinished"
_LIMITS = "_image_limits.json"
_SHOWN = 5


class ParquetWriter(ShardedWriter[EmbeddingManifest]):
    """One process's access to an output that is being written; use `ParquetWriter.open`.

    Args:
        folder: Folder of the output.
        manifest: What it will hold.
        rows: What it has a row for.
        model_dim: Dimensions of the model's embeddings.
        skip_invalid: Whether images that cannot be decoded are left out.
    """

    LEFTOVERS = ("_complete-*.json", "*.tmp", _UNFINISHED)
    REPAIRS = True

    def __init__(
        self,
        folder: Path,
        manifest: EmbeddingManifest,
        rows: TextRows | ImageRows,
        *,
        model_dim: int,
        skip_invalid: bool,
    ) -> None:
        super().__init__(folder, manifest)
        self.rows = rows
        self._model_dim = model_dim
        self._skip_invalid = skip_invalid

    @classmethod
    def open(
        cls,
        folder: Path,
        planned: EmbeddingManifest,
        begin: Callable[[], EmbeddingManifest],
        rows: TextRows | ImageRows,
        *,
        model_dim: int,
        skip_invalid: bool,
    ) -> ParquetWriter:
        """Begin an output, or continue the same one."""
        found = begin_or_continue(folder, planned, begin)
        if isinstance(rows, ImageRows):
            _require_same_limits(folder / _LIMITS, get_image_limits(), skip_invalid=skip_invalid)
        return cls(folder, found, rows, model_dim=model_dim, skip_invalid=skip_invalid)

    @property
    def collected(self) -> tuple[Path, StoreManifest]:
        """The model's embeddings are collected in float32."""
        shape = StoreManifest(
            content=self.manifest.modality,
            fingerprint={},
            dtype="float32",
            dim=self._model_dim,
            num_rows=self.manifest.num_rows,
            rows_per_shard=self.manifest.rows_per_shard,
            plan={},
        )
        return self.folder / _UNFINISHED, shape

    def write_file(self, shard: int, written: ShardWriter, num_truncated: int) -> EmbeddedShard:
        """Write a file; rows of zeros are images that could not be decoded."""
        embeds = np.array(written.map_rows())
        table = self.rows.read(self.manifest.rows_of_shard(shard))
        is_valid = embeds.any(axis=1)
        skipped = table.column("id").filter(pa.array(~is_valid)).to_pylist()
        if skipped and not self._skip_invalid:
            raise ValueError(
                f"{len(skipped)} images cannot be decoded, among them {skipped[:_SHOWN]}. Repair "
                "or remove them, or skip them (--skip-invalid)."
            )
        kept = truncate_embeddings(embeds[is_valid], self.manifest.dim)
        ranges = self.manifest.read_ranges()
        values, num_clipped = convert_embeddings(kept, self.manifest.dtype, ranges=ranges)
        content = self._encode(table.filter(pa.array(is_valid)), values)
        file = self.folder / self.manifest.name_shard(shard)
        write_atomically(file, content)
        return EmbeddedShard(
            file=file.name,
            shard=shard,
            rows=len(values),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            num_truncated=num_truncated,
            num_clipped=num_clipped,
            skipped=tuple(skipped),
        )

    def check_file(self, record: EmbeddedShard) -> None:
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


def _require_same_limits(file: Path, own: ImageLimits, *, skip_invalid: bool) -> None:
    """Refuse limits of images by which a run would leave out others than those before it.

    As long as no run leaves any out, every image that was encoded was within the limits, and these
    may be raised.
    """
    publish_first(file, _write_limits(own, skips=skip_invalid))
    found = read_sealed(file.read_text(encoding="utf-8"))
    limits = ImageLimits(**found["limits"])
    if limits != own and (found["skips"] or (skip_invalid and not _are_within(limits, own))):
        differences = list_differences(asdict(limits), asdict(own))
        raise ValueError(
            f"{file.parent} holds embeddings of images within other limits: "
            f"{'; '.join(differences)}. Other images would be left out. Give the limits that it "
            "was begun with, or name a new folder."
        )
    if _are_within(limits, own) and (limits != own or skip_invalid > found["skips"]):
        write_atomically(file, _write_limits(own, skips=skip_invalid))


def _are_within(limits: ImageLimits, others: ImageLimits) -> bool:
    first, second = asdict(limits), asdict(others)
    formats = set(first.pop("formats")) <= set(second.pop("formats"))
    return formats and all(first[name] <= second[name] for name in first)


def _write_limits(limits: ImageLimits, *, skips: bool) -> bytes:
    return write_sealed({"limits": asdict(limits), "skips": skips}).encode()
