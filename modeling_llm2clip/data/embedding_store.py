"""Opens and reads a store of embeddings; memory does not grow with the store.

What lies in the folder: `data/embedding_store_layout.py`.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from .embedding_store_layout import (
    EMBEDDINGS,
    INDEX_FILE,
    STORED_DTYPES,
    ShardRecord,
    StoreManifest,
    hash_file,
    list_differences,
    map_index,
    read_manifest,
    read_places,
    require_size,
    shard_stem,
)

_ERRORS_SHOWN = 5
# Pages of a mapped file count as resident once touched, and the kernel maps 64 KiB around each
# touched place. The maps are dropped when they may have come to this many bytes.
_MOST_MAPPED_BYTES = 2**27
_TOUCHED_AROUND = 2**16

Rows = Sequence[int] | np.ndarray[Any, Any] | Tensor


class TextColumn(Sequence[str]):
    """One text an item, decoded when it is asked for."""

    def __init__(
        self, blob: np.ndarray[Any, np.dtype[np.uint8]], offsets: np.ndarray[Any, Any]
    ) -> None:
        self._blob = blob
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> list[str]: ...
    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        item = _check_item(item, len(self))
        start, stop = int(self._offsets[item]), int(self._offsets[item + 1])
        return self._blob[start:stop].tobytes().decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class EmbeddingStore:
    """Embeddings of a data set's captions or images, on the disk.

    Use `EmbeddingStore.open`. It may be handed to worker processes: it is opened again there.

    Attributes:
        folder: where it lies.
        manifest: what it holds and which model made it.
        names, group_ids, langs: one text per item; name and language together identify an item.
    """

    def __init__(
        self, folder: Path, manifest: StoreManifest, shards: Mapping[int, tuple[Path, int]]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards = dict(shards)  # file, and offset of its embeddings
        self._index = map_index(folder / INDEX_FILE)
        self.names, self.group_ids, self.langs = (
            TextColumn(self._index[name], self._index[f"{name}_offsets"])
            for name in ("names", "group_ids", "langs")
        )
        self._maps: dict[int, np.memmap[Any, Any]] = {}
        self._mapped_bytes = 0

    @classmethod
    def open(
        cls, folder: str | Path, *, check: str = "fast", allow_partial: bool = False
    ) -> EmbeddingStore:
        """Open a store.

        Args:
            check: `"fast"` compares sizes and headers of all files with the manifest; `"full"`
                also reads everything and compares every SHA-256.
            allow_partial: take a store that is not complete, with the shards that are whole.
        Raises: ValueError naming every damaged or missing file, or what makes it no store that
            this code reads.
        """
        if check not in ("fast", "full"):
            raise ValueError(f"check must be 'fast' or 'full', got {check!r}.")
        folder = Path(folder)
        manifest = read_manifest(folder)
        records = manifest.shards if manifest.complete else find_whole_shards(folder, manifest)
        if not manifest.complete and not allow_partial:
            raise ValueError(
                f"{folder} is not complete: {len(records)} of {manifest.num_shards} shards. Run "
                "the same extraction again, which continues, or open it with allow_partial=True."
            )
        errors: list[str] = []
        _collect(errors, partial(_check_index, folder, manifest, check))
        shards: dict[int, tuple[Path, int]] = {}
        for record in records:
            shard = record.first_row // manifest.rows_per_shard
            file = folder / record.file
            offset = _collect(errors, partial(_check_shard, folder, manifest, record, check))
            shards[shard] = (file, offset or 0)
        if errors:
            shown = "; ".join(errors[:_ERRORS_SHOWN])
            raise ValueError(
                f"{folder}: {len(errors)} damaged files: {shown}. Delete the store and extract it "
                "again, or bring these files back from a copy."
            )
        return cls(folder, manifest, shards)

    def __reduce__(self) -> tuple[Callable[..., EmbeddingStore], tuple[Path, bool]]:
        return _reopen, (self.folder, not self.manifest.complete)

    def __len__(self) -> int:
        """Number of items."""
        return self.manifest.num_items

    def read(self, rows: Rows) -> Tensor:
        """Read rows in any order, some perhaps several times.

        Args:
            rows: (N,) row numbers of the store.
        Returns: (N, D) float32 on the CPU.
        Raises: ValueError for row numbers that the store does not have, or not yet.
        """
        wanted = self._check_rows(rows)
        manifest = self.manifest
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        shards, starts = np.unique(ordered // manifest.rows_per_shard, return_index=True)
        stops = [*starts, len(ordered)][1:]
        pieces = [
            (shard, order[start:stop], ordered[start:stop] - shard * manifest.rows_per_shard)
            for shard, start, stop in zip(shards.tolist(), starts, stops, strict=True)
        ]
        for shard, _, within in pieces:
            self._announce(shard, within)
        stored = np.empty((len(wanted), manifest.dim), dtype=STORED_DTYPES[manifest.dtype][1])
        for shard, places, within in pieces:
            stored[places] = self._map(shard)[within]
            self._forget_pages(len(within))
        embeddings = torch.from_numpy(stored)
        if manifest.dtype == "bfloat16":
            embeddings = embeddings.view(torch.bfloat16)
        return embeddings.float()

    def rows_of(self, item: int, *, long: bool = False) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows of an item's captions, short or long ones; of an image store its one row.

        Returns: (number of captions,) int64, in the order of the record's captions.
        """
        item = _check_item(item, len(self))
        kind = "long" if long else "short"
        start, stop = self._index[f"{kind}_offsets"][item : item + 2].tolist()
        return np.array(self._index[f"{kind}_rows"][start:stop])

    def has_rows(self, rows: Rows) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which rows can be read: all of them, unless the store is not complete."""
        wanted = _to_row_numbers(rows, self.manifest.num_rows)
        return np.isin(wanted // self.manifest.rows_per_shard, list(self._shards))

    def require_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Raise ValueError naming both values of every entry in which the makers differ."""
        if differences := list_differences(self.manifest.fingerprint, fingerprint):
            raise ValueError(
                f"{self.folder} was made by another model or with other settings: "
                f"{'; '.join(differences)}. Extract it again with this model, or use the model "
                "that made it."
            )

    def _check_rows(self, rows: Rows) -> np.ndarray[Any, np.dtype[np.int64]]:
        wanted = _to_row_numbers(rows, self.manifest.num_rows)
        if not self.manifest.complete and not (there := self.has_rows(wanted)).all():
            raise ValueError(
                f"{self.folder}: {int((~there).sum())} rows are not extracted yet, among them "
                f"{wanted[~there][:_ERRORS_SHOWN].tolist()}."
            )
        return wanted

    def _map(self, shard: int) -> np.memmap[Any, Any]:
        mapped = self._maps.get(shard)
        if mapped is None:
            file, offset = self._shards[shard]
            mapped = np.memmap(
                file,
                dtype=STORED_DTYPES[self.manifest.dtype][1],
                mode="r",
                offset=offset,
                shape=(len(self.manifest.rows_of_shard(shard)), self.manifest.dim),
            )
            if hasattr(mmap, "MADV_RANDOM"):  # without it the kernel reads far ahead of each row
                mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
            self._maps[shard] = mapped
        return mapped

    def _announce(self, shard: int, within: np.ndarray[Any, Any]) -> None:
        """Tell the kernel which rows come next: the disk then reads them side by side."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        mapped = self._map(shard)
        page, row_bytes = mmap.ALLOCATIONGRANULARITY, mapped.strides[0]
        begin = self._shards[shard][1] % page  # of the embeddings, in the map
        for first_page in np.unique((begin + within * row_bytes) // page).tolist():
            mapped._mmap.madvise(  # type: ignore[attr-defined]
                mmap.MADV_WILLNEED, first_page * page, row_bytes + page
            )

    def _forget_pages(self, num_rows: int) -> None:
        row_bytes = self.manifest.dim * np.dtype(STORED_DTYPES[self.manifest.dtype][1]).itemsize
        self._mapped_bytes += num_rows * (row_bytes + _TOUCHED_AROUND)
        if self._mapped_bytes > _MOST_MAPPED_BYTES:
            self._maps.clear()
            self._mapped_bytes = 0


def find_whole_shards(folder: Path, manifest: StoreManifest) -> list[ShardRecord]:
    """Read the small files beside the shards of a store that is not complete yet."""
    found = (read_shard_record(folder, shard) for shard in range(manifest.num_shards))
    return [record for record in found if record is not None]


def read_shard_record(folder: Path, shard: int) -> ShardRecord | None:
    """Read what was noted when a shard was whole; None where it is not."""
    file = folder / f"{shard_stem(shard)}.json"
    try:
        return ShardRecord(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:  # not whole yet, or just folded into the manifest
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it and extract again.") from error


def _reopen(folder: Path, allow_partial: bool) -> EmbeddingStore:
    return EmbeddingStore.open(folder, allow_partial=allow_partial)


def _collect(errors: list[str], check: Callable[[], int | None]) -> int | None:
    try:
        return check()
    except (ValueError, OSError) as error:
        errors.append(str(error))
        return None


def _check_index(folder: Path, manifest: StoreManifest, check: str) -> None:
    file = folder / INDEX_FILE
    _check_bytes(file, manifest.index_bytes, manifest.index_sha256, check=check)
    lengths = {name: len(array) for name, array in map_index(file).items()}
    for name in ("short", "long", "names", "group_ids", "langs"):
        if lengths.get(f"{name}_offsets") != manifest.num_items + 1:
            raise ValueError(f"{file.name}: {name}_offsets does not fit {manifest.num_items} items")


def _check_shard(folder: Path, manifest: StoreManifest, record: ShardRecord, check: str) -> int:
    """Return where the embeddings begin in the file."""
    file = folder / record.file
    _check_bytes(file, record.bytes, record.sha256, check=check)
    place = read_places(file).get(EMBEDDINGS)
    wanted = (STORED_DTYPES[manifest.dtype][0], (record.rows, manifest.dim))
    if place is None or (place.dtype, place.shape) != wanted:
        found = place and (place.dtype, place.shape)
        raise ValueError(f"{file.name}: its header says {found}, the manifest {wanted}")
    require_size(file, place, np.dtype(STORED_DTYPES[manifest.dtype][1]).itemsize)
    return place.offset


def _check_bytes(file: Path, size: int, sha256: str, *, check: str) -> None:
    if not file.is_file():
        raise ValueError(f"{file.name}: missing")
    if (found := file.stat().st_size) != size:
        raise ValueError(f"{file.name}: {found} bytes, the manifest says {size}")
    if check == "full" and (digest := hash_file(file)) != sha256:
        raise ValueError(f"{file.name}: SHA-256 is {digest}, the manifest says {sha256}")


def _check_item(item: int, num_items: int) -> int:
    if not -num_items <= item < num_items:
        raise IndexError(f"There is no item {item}: the store has {num_items}.")
    return int(item) % num_items


def _to_row_numbers(rows: Rows, num_rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    numbers = np.asarray(rows)
    if numbers.size == 0:
        return np.zeros(0, dtype=np.int64)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"Rows must be a list of whole numbers; got {numbers.dtype} {numbers.shape}."
        )
    bad = numbers[(numbers < 0) | (numbers >= num_rows)]
    if bad.size:
        raise ValueError(
            f"{bad.size} row numbers are outside 0 to {num_rows - 1}, among them "
            f"{bad[:_ERRORS_SHOWN].tolist()}."
        )
    return numbers.astype(np.int64, copy=False)
