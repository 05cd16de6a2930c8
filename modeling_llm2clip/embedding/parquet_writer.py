"""Writes final embeddings as Parquet files, for vector databases: truncated, in fewer bits.

int8 and the two binary dtypes are those of sentence-transformers' `quantize_embeddings`, number for
number. N embeddings, P dimensions of the model, D of what is stored.

The rows of a file are collected in `_unfinished/`. The names of `_manifest.json` and of the records
beside it begin with an underscore, so that readers of a folder of Parquet pass over them.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..configs.embed_config import EmbeddingDtype
from ..data.atomic_files import hash_file, list_differences, write_atomically
from ..data.store.store_manifest import StoreManifest, read_sealed, write_sealed
from ..image_loading_llm2clip import ImageLimits, get_image_limits
from .embedding_manifest import EmbeddedShard, EmbeddingManifest
from .embedding_rows import ImageRows, TextRows
from .sharded_writer import Array, ShardedWriter, ShardWriter, publish_first

_UNFINISHED = "_unfinished"
_LIMITS = "_image_limits.json"
_SHOWN = 5
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


class ParquetWriter(ShardedWriter[EmbeddingManifest]):
    """One process's access to an output that is being written.

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


def require_same_limits(folder: Path, *, skip_invalid: bool) -> None:
    """Refuse limits of images by which a run would leave out others than those before it.

    As long as no run leaves any out, every image that was encoded was within the limits, and these
    may be raised.
    """
    file, own = folder / _LIMITS, get_image_limits()
    stated = write_sealed({"limits": asdict(own), "skips": skip_invalid}).encode()
    publish_first(file, stated)
    found = read_sealed(file.read_text(encoding="utf-8"))
    limits = ImageLimits(**found["limits"])
    if limits != own and (found["skips"] or (skip_invalid and not _are_within(limits, own))):
        differences = list_differences(asdict(limits), asdict(own))
        raise ValueError(
            f"{folder} holds embeddings of images within other limits: "
            f"{'; '.join(differences)}. Other images would be left out. Give the limits that it "
            "was begun with, or name a new folder."
        )
    if _are_within(limits, own) and (limits != own or skip_invalid > found["skips"]):
        write_atomically(file, stated)


def _are_within(limits: ImageLimits, others: ImageLimits) -> bool:
    first, second = asdict(limits), asdict(others)
    formats = set(first.pop("formats")) <= set(second.pop("formats"))
    return formats and all(first[name] <= second[name] for name in first)


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
            f"{count} embeddings are zero in their first {dim} dimensions, and have no direction "
            "there. Give a larger truncate_dim."
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
