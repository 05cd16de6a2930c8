"""Writes a store of embeddings, shard by shard, so that nothing whole is ever lost or written
twice.

Several processes may write one store, started together or not: each shard is held by a lock of the
kernel while it is computed, which goes with the process that holds it, however it ends. Needs a
file system with `flock`: Linux or macOS, local or shared by NFS 4.
"""

from __future__ import annotations

import errno
import fcntl
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

from .embedding_store import find_whole_shards, read_shard_record
from .embedding_store_layout import (
    EMBEDDINGS,
    INDEX_FILE,
    MANIFEST_FILE,
    ShardRecord,
    StoreManifest,
    list_differences,
    read_manifest,
    shard_stem,
    write_atomically,
)

_FOLDER_LOCK = "manifest.lock"
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class EmbeddingStoreWriter:
    """One process's hand on a store; use `EmbeddingStoreWriter.open`."""

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(
        cls, folder: str | Path, manifest: StoreManifest, index: bytes
    ) -> EmbeddingStoreWriter:
        """Begin a store, or go on with the same one.

        Args:
            manifest: what the store will hold; no shards yet.
            index: content of `index.safetensors`; see `pack_index`.
        Raises:
            ValueError: the folder holds another store: every difference, with both values.
            FileExistsError: the folder holds something else.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST_FILE).is_file():
            _require_nothing_else(folder)
            with _lock(folder / _FOLDER_LOCK), _explain_full_disk(folder, "its index"):
                if not (folder / MANIFEST_FILE).is_file():  # nobody was faster
                    write_atomically(folder / INDEX_FILE, index)
                    write_atomically(folder / MANIFEST_FILE, manifest.to_json().encode())
        require_same_store(folder, manifest)
        return cls(folder, manifest)

    def is_done(self, shard: int) -> bool:
        """Whether a shard is whole on the disk."""
        # In this order: what was noted is deleted only after the manifest has it.
        record = read_shard_record(self.folder, shard)
        if record is None:
            return read_manifest(self.folder).complete
        file = self.folder / record.file
        return file.is_file() and file.stat().st_size == record.bytes

    def list_missing(self) -> list[int]:
        """Shards that are not whole yet."""
        if read_manifest(self.folder).complete:
            return []
        return [s for s in range(self.manifest.num_shards) if not self.is_done(s)]

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Hold a shard; False where it is done already, or another process holds it."""
        file = self.folder / f"{shard_stem(shard)}.lock"
        with _lock(file, wait=False) as held:
            yield held and not self.is_done(shard)
            if held and self.is_done(shard):
                file.unlink(missing_ok=True)  # whoever gets it later finds the shard done

    def write_shard(self, shard: int, embeddings: Tensor) -> None:
        """Write the embeddings of a claimed shard.

        Args:
            embeddings: (rows, D) of any float dtype, in the order of the rows.
        Raises:
            ValueError: they are not finite in the dtype of the store, or of another shape.
            OSError: the disk is full; nothing of this shard stays, the others are untouched.
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
            note = json.dumps(asdict(record)).encode()
            write_atomically(self.folder / f"{shard_stem(shard)}.json", note)

    def finish(self) -> bool:
        """Complete the manifest if every shard is whole; returns whether the store is complete.

        Any number of processes may call it.
        """
        with _lock(self.folder / _FOLDER_LOCK):
            manifest = read_manifest(self.folder)
            if not manifest.complete:
                if self.list_missing():
                    return False
                shards = tuple(find_whole_shards(self.folder, manifest))
                manifest = replace(manifest, complete=True, shards=shards)
                with _explain_full_disk(self.folder, "its manifest"):
                    write_atomically(self.folder / MANIFEST_FILE, manifest.to_json().encode())
            self._sweep()
        return True

    def _sweep(self) -> None:
        """Remove what only a store in the making needs."""
        for pattern in ("shard-*.json", "*.tmp", "*.lock"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)


def pack_index(
    texts: Mapping[str, Sequence[str]], rows: Mapping[str, Sequence[Sequence[int]]]
) -> bytes:
    """Put texts of the items and their rows into the content of `index.safetensors`.

    Args:
        texts: `names`, `group_ids`, `langs`, one text per item each.
        rows: `short` and `long`, one list of row numbers an item each.
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


def require_same_store(folder: Path, manifest: StoreManifest) -> None:
    """Raise ValueError naming both values of all in which a folder's store differs from a plan."""
    found = read_manifest(folder)
    differences = list_differences(_list_causes(found), _list_causes(manifest))
    if not differences:  # they follow from the causes, so they tell nothing beside them
        kept, wanted = ({"counts": m.counts, "index": m.index_sha256} for m in (found, manifest))
        differences = list_differences(kept, wanted)
    if differences:
        raise ValueError(
            f"{folder} holds another store: {'; '.join(differences)}. Name a new folder, or give "
            "the model, data and settings that this one was begun with."
        )


def _list_causes(manifest: StoreManifest) -> dict[str, object]:
    """All that decides the bytes of a store."""
    return {
        **manifest.fingerprint,
        **manifest.plan,
        "kind": manifest.kind,
        "stored dtype": manifest.dtype,
        "dim": manifest.dim,
        "rows_per_shard": manifest.rows_per_shard,
    }


def _to_offsets(lengths: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _require_nothing_else(folder: Path) -> None:
    ours = {INDEX_FILE, f"{INDEX_FILE}.tmp", f"{MANIFEST_FILE}.tmp", _FOLDER_LOCK}
    others = sorted({file.name for file in folder.iterdir()} - ours)
    if others and not (folder / MANIFEST_FILE).is_file():  # which another run may just have begun
        raise FileExistsError(
            f"{folder} is not empty and holds no store: {others[:5]}. Name a new folder."
        )


def _require_finite(stored: Tensor, rows: range, embeddings: Tensor) -> None:
    bad = (~torch.isfinite(stored).all(dim=1)).nonzero().flatten().tolist()
    if not bad:
        return
    computed = bool(torch.isfinite(embeddings).all())
    reason = (
        "they do not fit this dtype: store float32" if computed else "the model gives no numbers"
    )
    raise ValueError(
        f"{len(bad)} embeddings are not finite in {stored.dtype}, the first in row "
        f"{rows.start + bad[0]}; {reason}."
    )


@contextmanager
def _lock(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the kernel's lock on a file; yields False where another holds it and we do not wait."""
    with file.open("ab") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held


@contextmanager
def _explain_full_disk(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        raise OSError(
            error.errno,
            f"No room to write {what} ({error.strerror}). Whole shards stay readable "
            "(allow_partial=True). Make room and run the same command again: it goes on there",
            str(folder),
        ) from error
