"""The manifest of an output of `embed`: what its files hold, and a checksum of each.

The names of `_manifest.json` and of the records beside it begin with an underscore, so that readers
of a folder of Parquet pass over them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..configs.embed_config import EmbeddingDtype
from ..data.atomic_files import is_unfinished
from ..data.store.store_manifest import read_sealed, write_sealed

Array: TypeAlias = np.ndarray[Any, Any]
FORMAT_VERSION = 1
MANIFEST_FILE = "_manifest.json"
METADATA_KEY = b"llm2clip"
_SHOWN = 5
_REMEDY = "Restore it from a copy, or remove the folder and embed again."


@dataclass(frozen=True)
class EmbeddedShard:
    """One complete file.

    Attributes:
        file: Its name in the folder.
        shard: Its number, from 0.
        rows: How many rows it has.
        bytes: Its size.
        sha256: Of the file.
        num_truncated: Texts that were longer than the model reads.
        num_clipped: Values outside the int8 ranges.
        skipped: Ids of images that could not be decoded.
    """

    file: str
    shard: int
    rows: int
    bytes: int
    sha256: str
    num_truncated: int = 0
    num_clipped: int = 0
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class EmbeddingManifest:
    """What an output holds.

    Attributes:
        modality: text or image.
        model: What the user named the model.
        fingerprint: Everything of the model that decides an embedding, the prompt included.
        prompt: Prefix and suffix of a text, as text; empty for images.
        dtype: Of the embeddings.
        dim: Dimensions of an embedding; the binary dtypes have eight in a value.
        columns: Columns beside id and embedding.
        num_rows: Rows that were planned, before images are skipped.
        rows_per_shard: Of every file but the last.
        plan: What else decides the bytes, including a hash of the data.
        ranges: Smallest and largest value of each dimension; for int8 alone.
        complete: Whether every file is there.
        shards: The complete files, in order; empty until the output is complete.
        format_version: Of the files; this code reads `FORMAT_VERSION`.
    """

    modality: str
    model: str
    fingerprint: dict[str, str]
    prompt: str
    dtype: EmbeddingDtype
    dim: int
    columns: tuple[str, ...]
    num_rows: int
    rows_per_shard: int
    plan: dict[str, str]
    ranges: tuple[tuple[float, ...], ...] | None = None
    complete: bool = False
    shards: tuple[EmbeddedShard, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        """Number of files of the complete output."""
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of_shard(self, shard: int) -> range:
        """Return the rows that a file is planned to have.

        Args:
            shard: Its number, from 0.
        """
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def name_shard(self, shard: int) -> str:
        """Return the name of a file.

        Args:
            shard: Its number, from 0.
        """
        return f"embeddings-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def read_ranges(self) -> Array | None:
        """Return the int8 ranges, (2, D) float32."""
        return None if self.ranges is None else np.array(self.ranges, np.float32)

    def list_causes(self) -> dict[str, object]:
        """Return everything that decides the bytes of an output."""
        return {
            **self.fingerprint,
            **self.plan,
            "modality": self.modality,
            "embedding dtype": self.dtype,
            "dimensions (truncate_dim)": self.dim,
            "columns": tuple(self.columns),
            "rows": self.num_rows,
            "rows_per_shard": self.rows_per_shard,
        }

    def make_metadata(self) -> dict[bytes, bytes]:
        """Return the metadata of every file."""
        described = {
            "format_version": self.format_version,
            "modality": self.modality,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "prompt": self.prompt,
            "dtype": self.dtype,
            "dim": self.dim,
            "normalized": True,
            "int8_ranges": self.ranges,
        }
        return {METADATA_KEY: json.dumps(described, sort_keys=True).encode()}

    def to_json(self) -> str:
        """Return the text of `_manifest.json`."""
        return write_sealed(asdict(self))


def is_begun(folder: Path) -> bool:
    """Whether a folder holds an output of `embed`, complete or not.

    Args:
        folder: Any path.
    """
    return (folder / MANIFEST_FILE).is_file()


def require_embedding_folder(folder: Path) -> None:
    """Check that a folder may hold an output: it is new, empty, or holds one already.

    Args:
        folder: Folder of the output.

    Raises:
        FileExistsError: It is a file, or holds other files.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Name a new folder.")
    others = sorted(file.name for file in folder.iterdir() if not is_unfinished(file))
    if others and not is_begun(folder):  # another process may just have begun
        raise FileExistsError(
            f"{folder} is not empty and holds no embeddings: {others[:_SHOWN]}. Name a new folder."
        )


def read_embedding_manifest(folder: Path) -> EmbeddingManifest:
    """Read and check `_manifest.json`.

    Args:
        folder: Output of `embed`, complete or not.

    Raises:
        ValueError: The folder holds no such output, one of another format, or a damaged one.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no embeddings: it has no {MANIFEST_FILE}. Give a folder that "
            "llm2clip embed wrote."
        )
    try:
        found = read_sealed(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, not JSON, or edited
        raise ValueError(f"{file} is damaged ({error}). {_REMEDY}") from error
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r}, this code reads {FORMAT_VERSION}. Upgrade "
            "modeling_llm2clip if the embeddings are newer; otherwise embed again."
        )
    try:
        return _make_manifest(found)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}). {_REMEDY}") from error


def read_shard_record(file: Path) -> EmbeddedShard | None:
    """Read the record that is written once a file is complete.

    Args:
        file: The record.

    Returns:
        The record; None if there is none.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return make_shard_record(read_sealed(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it and embed again.") from error


def make_shard_record(fields: Mapping[str, Any]) -> EmbeddedShard:
    """Make a record from what JSON holds.

    Args:
        fields: Its fields.
    """
    return EmbeddedShard(**{**fields, "skipped": tuple(fields["skipped"])})


def _make_manifest(found: Mapping[str, Any]) -> EmbeddingManifest:
    ranges = found["ranges"]
    return EmbeddingManifest(
        **{
            **found,
            "columns": tuple(found["columns"]),
            "ranges": None if ranges is None else tuple(map(tuple, ranges)),
            "shards": tuple(make_shard_record(shard) for shard in found["shards"]),
        }
    )
