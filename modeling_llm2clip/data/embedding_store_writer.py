"""Writes an embedding store shard by shard, so that no complete shard is lost or written twice.

Several processes may write one store, started together or not. The kernel locks a shard for the
process that computes it and releases it when that process ends, however it ends. Needs a file
system with `flock`: Linux or macOS, local or NFS 4.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors
from torch import Tensor

from .atomic_files import list_differences, lock_file, write_atomically
from .embedding_store import (
    EMBEDDINGS,
    INDEX_FILE,
    MANIFEST_FILE,
    ShardRecord,
    StoreManifest,
    read_manifest,
    shard_stem,
)

_FOLDER_LOCK = "manifest.lock"
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHOWN = 5


class EmbeddingStoreWriter:
    """One process's access to a store that is being written; use `EmbeddingStoreWriter.open`.

    Attributes:
        folder: folder of the store.
        manifest: what the store will hold.
    """

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(
        cls, folder: str | Path, manifest: StoreManifest, index: bytes
    ) -> EmbeddingStoreWriter:
        """Begin a store, or continue the same one.

        Args:
            folder: a new or empty folder, or that of the store to continue.
            manifest: what the store will hold; no shards yet.
            index: content of `index.safetensors`; see `pack_index`.

        Returns:
            The writer.

        Raises:
            ValueError: the folder holds another store; every difference is named, with both values.
            FileExistsError: the folder holds other files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST_FILE).is_file():
            _require_nothing_else(folder)
            with _lock(folder / _FOLDER_LOCK), _explain_full_disk(folder, "its index"):
                if not (folder / MANIFEST_FILE).is_file():  # no other process was faster
                    write_atomically(folder / INDEX_FILE, index)
                    write_atomically(folder / MANIFEST_FILE, manifest.to_json().encode())
        _require_same_store(folder, manifest)
        return cls(folder, manifest)

    def is_done(self, shard: int) -> bool:
        """Whether a shard is complete on disk.

        Args:
            shard: its number, from 0.
        """
        # In this order: a shard's record is deleted only after the manifest has it.
        record = _read_shard_record(self.folder, shard)
        if record is None:
            return read_manifest(self.folder).complete
        file = self.folder / record.file
        return file.is_file() and file.stat().st_size == record.bytes

    def list_missing(self) -> list[int]:
        """List the shards that are not complete yet."""
        if read_manifest(self.folder).complete:
            return []
        return [s for s in range(self.manifest.num_shards) if not self.is_done(s)]

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Lock a shard while it is computed.

        Args:
            shard: its number, from 0.

        Yields:
            Whether to compute it: False if it is complete, or another process has locked it.
        """
        file = self.folder / f"{shard_stem(shard)}.lock"
        with _lock(file, wait=False) as held:
            yield held and not self.is_done(shard)
            if held and self.is_done(shard):
                file.unlink(missing_ok=True)  # whoever locks it later finds the shard complete

    def write_shard(self, shard: int, embeddings: Tensor) -> None:
        """Write the embeddings of a claimed shard.

        Args:
            shard: its number, from 0.
            embeddings: (rows, D) of any float dtype, in the order of the rows.

        Raises:
            ValueError: the shape is wrong, or values are not finite in the store's dtype.
            OSError: the disk is full. Nothing of this shard stays; the others are untouched.
        """
        rows = self.manifest.rows_of_shard(shard)
        if tuple(embeddings.shape) != (len(rows), self.manifest.dim):
            raise ValueError(
                f"Shard {shard} takes embeddings of shape {(len(rows), self.manifest.dim)}, got "
                f"{tuple(embeddings.shape)}."
            )
        stored = embeddings.to("cpu", getattr(torch, self.manifest.dtype)).contiguous()
        _require_finite(stored, rows, embeddings)
        content = save_tensors({EMBEDDINGS: stored})
        name = f"{shard_stem(shard)}.safetensors"
        digest = hashlib.sha256(content).hexdigest()
        record = ShardRecord(name, rows.start, len(rows), len(content), digest)
        with _explain_full_disk(self.folder, f"shard {shard} of {self.manifest.num_shards}"):
            write_atomically(self.folder / name, content)
            encoded = json.dumps(asdict(record)).encode()
            write_atomically(self.folder / f"{shard_stem(shard)}.json", encoded)

    def finish(self) -> bool:
        """Complete the manifest if every shard is complete; any number of processes may call it.

        Returns:
            Whether the store is complete.
        """
        with _lock(self.folder / _FOLDER_LOCK):
            manifest = read_manifest(self.folder)
            if not manifest.complete:
                if self.list_missing():
                    return False
                shards = tuple(find_complete_shards(self.folder, manifest))
                manifest = replace(manifest, complete=True, shards=shards)
                with _explain_full_disk(self.folder, "its manifest"):
                    write_atomically(self.folder / MANIFEST_FILE, manifest.to_json().encode())
            self._sweep()
        return True

    def _sweep(self) -> None:
        """Remove what only an unfinished store needs."""
        for pattern in ("shard-*.json", "*.tmp", "*.lock"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)


def pack_index(
    texts: Mapping[str, Sequence[str]], rows: Mapping[str, Sequence[Sequence[int]]]
) -> bytes:
    """Pack the items' texts and rows into the content of `index.safetensors`.

    Args:
        texts: `names`, `group_ids` and `langs`, each one text per item.
        rows: `short` and `long`, each one list of row numbers per item.

    Returns:
        The content of the file.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, column in texts.items():
        encoded = [text.encode("utf-8") for text in column]
        arrays[f"{name}_offsets"] = _to_offsets([len(text) for text in encoded])
        arrays[name] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    for name, lists in rows.items():
        arrays[f"{name}_offsets"] = _to_offsets([len(numbers) for numbers in lists])
        arrays[f"{name}_rows"] = np.array([n for numbers in lists for n in numbers], np.int64)
    return save_arrays(arrays)


def find_complete_shards(folder: Path, manifest: StoreManifest) -> list[ShardRecord]:
    """Find which shards of an unfinished store are complete.

    Args:
        folder: folder of the store.
        manifest: its manifest.

    Returns:
        The complete shards, by first row.

    Raises:
        ValueError: the record of a shard is damaged.
    """
    found = (_read_shard_record(folder, shard) for shard in range(manifest.num_shards))
    return [record for record in found if record is not None]


def _read_shard_record(folder: Path, shard: int) -> ShardRecord | None:
    """Read the record that is written once a shard is complete; None if there is none."""
    file = folder / f"{shard_stem(shard)}.json"
    try:
        return ShardRecord(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:  # not complete yet, or already in the manifest
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it and extract again.") from error


def _require_same_store(folder: Path, manifest: StoreManifest) -> None:
    """Raise ValueError naming both values of everything in which a store differs from a plan."""
    found = read_manifest(folder)
    differences = list_differences(_list_causes(found), _list_causes(manifest))
    if not differences:  # these follow from the causes, so they add nothing beside them
        kept, wanted = ({"counts": m.counts, "index": m.index_sha256} for m in (found, manifest))
        differences = list_differences(kept, wanted)
    if differences:
        raise ValueError(
            f"{folder} holds another store: {'; '.join(differences)}. Name a new folder, or give "
            "the model, data and configuration that this one was begun with."
        )


def _list_causes(manifest: StoreManifest) -> dict[str, object]:
    """Return everything that decides the bytes of a store."""
    return {
        **manifest.fingerprint,
        **manifest.plan,
        "content": manifest.content,
        "stored dtype": manifest.dtype,
        "dim": manifest.dim,
        "rows_per_shard": manifest.rows_per_shard,
    }


def _to_offsets(lengths: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _require_nothing_else(folder: Path) -> None:
    ours = {INDEX_FILE, f"{INDEX_FILE}.tmp", f"{MANIFEST_FILE}.tmp", _FOLDER_LOCK}
    others = sorted({file.name for file in folder.iterdir()} - ours)
    if others and not (folder / MANIFEST_FILE).is_file():  # another process may just have begun
        raise FileExistsError(
            f"{folder} is not empty and holds no store: {others[:_SHOWN]}. Name a new folder."
        )


def _require_finite(stored: Tensor, rows: range, embeddings: Tensor) -> None:
    bad = (~torch.isfinite(stored).all(dim=1)).nonzero().flatten().tolist()
    if not bad:
        return
    if torch.isfinite(embeddings).all():
        reason = "they do not fit this dtype: store float32"
    else:
        reason = "the model computes NaN or infinity: check it with llm2clip doctor"
    raise ValueError(
        f"{len(bad)} embeddings are not finite in {stored.dtype}, the first in row "
        f"{rows.start + bad[0]}; {reason}."
    )


@contextmanager
def _lock(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a file while the block runs; yields whether it is locked."""
    with file.open("ab") as opened:
        yield lock_file(opened, wait=wait)


@contextmanager
def _explain_full_disk(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        raise OSError(
            error.errno,
            f"No room to write {what} ({error.strerror}). Complete shards stay. Free some space "
            "and run the same command again; it continues",
            str(folder),
        ) from error
