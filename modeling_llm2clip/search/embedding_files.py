"""Writes the Parquet files of an output of `embed`, each complete or absent.

The embeddings of a file are collected in `_unfinished/`, batch by batch, so that a killed run loses
a few batches and no more. Files are independent: any number of processes may write different ones.
The last of them to end completes the manifest.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from torch import Tensor

from ..data.atomic_files import (
    hash_file,
    list_differences,
    sync_folder,
    write_atomically,
)
from ..data.store.embedding_store_writer import plan_manifest
from ..data.store.store_manifest import StoreManifest, read_sealed, write_sealed
from ..data.store.store_shard_writer import ShardWriter, explain_full_store
from ..image_loading_llm2clip import ImageLimits, get_image_limits
from .embedding_dtypes import VALUE_TYPES, convert_embeddings, count_values, truncate_embeddings
from .embedding_manifest import (
    MANIFEST_FILE,
    EmbeddedShard,
    EmbeddingManifest,
    is_begun,
    read_embedding_manifest,
    read_shard_record,
    require_embedding_folder,
)
from .embedding_rows import ImageRows, TextRows

Array: TypeAlias = np.ndarray[Any, Any]
_UNFINISHED = "_unfinished"
_RECORD = "_complete-"
_LIMITS = "_image_limits.json"
_SHOWN = 5


class EmbeddingFolderWriter:
    """One process's access to an output that is being written; use `EmbeddingFolderWriter.open`.

    Args:
        folder: Folder of the output.
        manifest: What it will hold.
        rows: What it has a row for.
        model_dim: Dimensions of the model's embeddings.
        skip_invalid: Whether images that cannot be decoded are left out.
    """

    def __init__(
        self,
        folder: Path,
        manifest: EmbeddingManifest,
        rows: TextRows | ImageRows,
        *,
        model_dim: int,
        skip_invalid: bool,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.rows = rows
        self._model_dim = model_dim
        self._skip_invalid = skip_invalid

    @classmethod
    def open(
        cls,
        folder: Path,
        planned: EmbeddingManifest,
        rows: TextRows | ImageRows,
        *,
        model_dim: int,
        skip_invalid: bool,
        measure: Callable[[], Array | None],
    ) -> EmbeddingFolderWriter:
        """Begin an output, or continue the same one.

        Args:
            folder: A new or empty folder, or that of the output to continue.
            planned: What it will hold, without int8 ranges.
            rows: What it has a row for.
            model_dim: Dimensions of the model's embeddings.
            skip_invalid: Whether images that cannot be decoded are left out.
            measure: Measures int8 ranges, (2, D); called for an output that is not begun.

        Raises:
            ValueError: The folder holds another output; every difference is named, with both
                values. Or images are left out of it that are beyond other limits.
            FileExistsError: The folder holds other files.
            OSError: The disk is full.
        """
        if not is_begun(folder):
            require_embedding_folder(folder)
            ranges = measure()
            if ranges is not None:
                planned = replace(planned, ranges=tuple(map(tuple, ranges.tolist())))
            folder.mkdir(parents=True, exist_ok=True)
            _publish_first(folder / MANIFEST_FILE, planned.to_json().encode())
        found = read_embedding_manifest(folder)
        if differences := list_differences(found.list_causes(), planned.list_causes()):
            raise ValueError(
                f"{folder} holds other embeddings: {'; '.join(differences)}. Name a new folder, or "
                "give the model, data and options that this one was begun with."
            )
        if isinstance(rows, ImageRows):
            _require_same_limits(folder / _LIMITS, get_image_limits(), skip_invalid=skip_invalid)
        return cls(folder, found, rows, model_dim=model_dim, skip_invalid=skip_invalid)

    def is_done(self, shard: int) -> bool:
        """Whether a file is complete on disk.

        Args:
            shard: Its number, from 0.
        """
        record = read_shard_record(self._record_file(shard))
        if record is None:  # not complete yet, or already in the manifest
            shards = read_embedding_manifest(self.folder).shards
            record = shards[shard] if shards else None
        return record is not None and self._has_file(record)

    def list_missing(self) -> list[int]:
        """List the files that are not complete yet."""
        records = self._find_records()
        return [
            shard
            for shard in range(self.manifest.num_shards)
            if shard not in records or not self._has_file(records[shard])
        ]

    def open_shard(self, shard: int, batches: Sequence[Array]) -> EmbeddingFileWriter:
        """Begin a file, or continue it after the batches that an interrupted run computed.

        Args:
            shard: Its number, from 0.
            batches: Places in the shard of the rows of each batch, each place once.

        Raises:
            OSError: The disk is full. Nothing else is changed.
        """
        unfinished = self.folder / _UNFINISHED
        unfinished.mkdir(exist_ok=True)
        with explain_full_store(self.folder, self.manifest.name_shard(shard)):
            collected = ShardWriter(unfinished, self._plan_collected(), shard, batches)
        return EmbeddingFileWriter(self, shard, collected)

    def write_file(self, shard: int, embeds: Array, num_truncated: int) -> None:
        """Write a file, and the record that it is complete.

        Args:
            shard: Its number, from 0.
            embeds: (rows, P) float32 of unit length; zeros where an image could not be decoded.
            num_truncated: Texts that were longer than the model reads.

        Raises:
            ValueError: An image could not be decoded, and these are not skipped.
            OSError: The disk is full.
        """
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
        record = EmbeddedShard(
            file=self.manifest.name_shard(shard),
            shard=shard,
            rows=len(values),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            num_truncated=num_truncated,
            num_clipped=num_clipped,
            skipped=tuple(skipped),
        )
        with explain_full_store(self.folder, record.file):
            write_atomically(self.folder / record.file, content)
            write_atomically(self._record_file(shard), write_sealed(asdict(record)).encode())

    def finish(self) -> bool:
        """Complete the manifest if every file is there.

        Returns:
            Whether the output is complete.

        Raises:
            ValueError: Files of a complete output are damaged; they are named.
            OSError: The disk is full.
        """
        records = self._find_records()
        shards = [records[shard] for shard in sorted(records) if self._has_file(records[shard])]
        if len(shards) < self.manifest.num_shards:
            return False
        if damaged := [s.file for s in shards if hash_file(self.folder / s.file) != s.sha256]:
            raise ValueError(
                f"{self.folder}: {len(damaged)} files are damaged, among them {damaged[:_SHOWN]}. "
                "Delete these and run the same command again, which computes them anew."
            )
        self.manifest = replace(self.manifest, complete=True, shards=tuple(shards))
        self._publish_complete()
        for shard in range(self.manifest.num_shards):
            self._record_file(shard).unlink(missing_ok=True)
        for file in self.folder.glob("*.tmp"):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)
        return True

    def _publish_complete(self) -> None:
        file = self.folder / MANIFEST_FILE
        own = _write_beside(file, self.manifest.to_json().encode())
        try:
            own.replace(file)
        except FileNotFoundError:  # another partition ended just now, and removed all leftovers
            if not read_embedding_manifest(self.folder).complete:
                raise
        sync_folder(self.folder)

    def _find_records(self) -> dict[int, EmbeddedShard]:
        """Find the records of files: beside them, or in the manifest once all were complete."""
        found = [read_shard_record(file) for file in self.folder.glob(f"{_RECORD}*.json")]
        # The manifest afterwards: another process may just have moved the records there.
        shards = [*read_embedding_manifest(self.folder).shards, *filter(None, found)]
        return {record.shard: record for record in shards}

    def _has_file(self, record: EmbeddedShard) -> bool:
        file = self.folder / record.file
        return file.is_file() and file.stat().st_size == record.bytes

    def _record_file(self, shard: int) -> Path:
        return self.folder / f"{_RECORD}{shard:05d}.json"

    def _plan_collected(self) -> StoreManifest:
        """Describe what is collected: the model's embeddings, in float32."""
        planned = plan_manifest(
            self.manifest.modality,
            fingerprint={},
            dtype="float32",
            dim=self._model_dim,
            rows_per_shard=self.manifest.rows_per_shard,
            plan={},
        )
        return replace(planned, num_rows=self.manifest.num_rows)

    def _encode(self, table: pa.Table, values: Array) -> bytes:
        width = count_values(self.manifest.dim, self.manifest.dtype)
        kind = pa.from_numpy_dtype(VALUE_TYPES[self.manifest.dtype])
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind)
        embeddings = pa.FixedSizeListArray.from_arrays(flat, width)
        table = table.add_column(1, "embedding", embeddings)
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


class EmbeddingFileWriter:
    """Collects the batches of one file, in their order; a context manager.

    Args:
        output: The output that it belongs to.
        shard: Its number, from 0.
        collected: Keeps the batches on disk.
    """

    def __init__(self, output: EmbeddingFolderWriter, shard: int, collected: ShardWriter) -> None:
        self._output = output
        self._shard = shard
        self._collected = collected

    @property
    def num_done(self) -> int:
        """Batches that are computed."""
        return self._collected.num_done

    def __enter__(self) -> EmbeddingFileWriter:
        self._collected.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._collected.__exit__(kind, error, traceback)

    def write(self, embeddings: Tensor) -> None:
        """Keep the next batch.

        Args:
            embeddings: (rows of the batch, P) float32 of unit length; zeros where an image could
                not be decoded.
        """
        self._collected.write(embeddings)

    def seal(self, num_truncated: int = 0) -> None:
        """Write the file, all of whose batches are computed.

        Args:
            num_truncated: How many of its texts were longer than the model reads.
        """
        self._output.write_file(self._shard, self._collected.read(), num_truncated)
        self._collected.discard()


def _require_same_limits(file: Path, own: ImageLimits, *, skip_invalid: bool) -> None:
    """Refuse limits of images by which a run would leave out others than those before it.

    As long as no run leaves any out, every image that was encoded was within the limits, and these
    may be raised.
    """
    _publish_first(file, _write_limits(own, skips=skip_invalid))
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


def _publish_first(file: Path, content: bytes) -> None:
    """Write a file atomically unless another process has; int8 ranges may differ in a last bit."""
    own = _write_beside(file, content)
    try:
        os.link(own, file)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        own.replace(file)
    finally:
        own.unlink(missing_ok=True)
    sync_folder(file.parent)


def _write_beside(file: Path, content: bytes) -> Path:
    """Write what may become a file; several processes may do so at the same time."""
    own = file.with_name(f"{file.name}.{uuid4().hex}.tmp")
    with explain_full_store(file.parent, "its manifest"):
        write_atomically(own, content)
    return own
