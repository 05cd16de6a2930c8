"""A dataset's embeddings on disk: what the files are, and reading them.

A store is a folder:

| file | content |
| --- | --- |
| `manifest.json` | what the embeddings are, which model made them, every shard and its SHA-256 |
| `index.safetensors` | which rows an item has; names, group ids and languages of the items |
| `shard-00000.safetensors`, … | tensor `embeddings` (rows, dim), in the order of the rows |
| `shard-00000.json`, … | while it is written: one file per complete shard, later in the manifest |
| `*.lock`, `*.tmp` | while it is written: locks of shards, unfinished files |

Items are the records of a dataset in its order. Rows have an order of their own, and only the index
says which rows belong to an item. Memory does not grow with the store: index and shards are mapped.
`embedding_store_writer.py` writes a store.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from .atomic_files import hash_file, list_differences
from .safetensors_files import read_header

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.safetensors"
EMBEDDINGS = "embeddings"
_CONTENTS = ("caption_embeds", "vision_embeds")
_TEXT_COLUMNS = ("names", "group_ids", "langs")
_ROW_LISTS = ("short", "long")
# Name in safetensors, and the type that numpy reads it as; numpy has no bfloat16.
STORED_DTYPES: dict[str, tuple[str, type[np.generic]]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
}
_INDEX_DTYPES: dict[str, type[np.generic]] = {"I64": np.int64, "U8": np.uint8}
_SHOWN = 5
# Pages of a mapped file count as resident once touched, and the kernel maps 64 KiB around each
# touched place. The maps are dropped when they may have come to this many bytes.
_MOST_MAPPED_BYTES = 2**27
_TOUCHED_AROUND = 2**16

Rows = Sequence[int] | np.ndarray[Any, Any] | Tensor


@dataclass(frozen=True)
class ShardRecord:
    """One complete shard.

    Attributes:
        file: name of its file in the store's folder.
        first_row: number of its first row in the store.
        rows: how many rows it has.
        bytes: size of the file.
        sha256: of the file.
    """

    file: str
    first_row: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreManifest:
    """What a store holds.

    Attributes:
        content: `"caption_embeds"` or `"vision_embeds"`: which tower made the embeddings.
        fingerprint: which model, prompt and configuration made them; see
            `model_folders/fingerprint.py`.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`, of the stored embeddings.
        dim: width of an embedding.
        num_rows: number of embeddings, planned until the store is complete.
        num_items: number of records of the dataset.
        rows_per_shard: rows of every shard but the last.
        plan: everything else that decides the bytes, including a hash of the data.
        counts: figures for people, such as the number of truncated captions.
        index_bytes: size of `index.safetensors`.
        index_sha256: SHA-256 of `index.safetensors`.
        complete: whether every shard is there.
        shards: the complete shards, by first row; empty until the store is complete.
        format_version: of the store's files; this code reads `FORMAT_VERSION`.
    """

    content: str
    fingerprint: dict[str, str]
    dtype: str
    dim: int
    num_rows: int
    num_items: int
    rows_per_shard: int
    plan: dict[str, str]
    counts: dict[str, int]
    index_bytes: int
    index_sha256: str
    complete: bool = False
    shards: tuple[ShardRecord, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete store."""
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of_shard(self, shard: int) -> range:
        """Return the rows of a shard, whether it has been written or not.

        Args:
            shard: its number, from 0.
        """
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


class TextColumn(Sequence[str]):
    """One text per item, decoded on access.

    Args:
        blob: (bytes,) uint8, all texts in UTF-8, one after the other.
        offsets: (items + 1,) int64, where each text begins and the last one ends.
    """

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
    """Embeddings of a dataset's captions or images, on disk.

    Use `EmbeddingStore.open`. A store can be pickled for worker processes, which open it again.

    Attributes:
        folder: folder of the store.
        manifest: what it holds and which model made it.
        names: one name per item; name and language together identify an item.
        group_ids: one group id per item.
        langs: one language per item.

    Examples:
        >>> store = EmbeddingStore.open("captions")  # a folder that `extract` wrote
        >>> caption_embeds = store.read(store.rows_of(0))  # of the first record
        >>> caption_embeds.shape == (2, store.manifest.dim)
        True
    """

    def __init__(
        self, folder: Path, manifest: StoreManifest, shards: Sequence[tuple[Path, int]]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards = shards  # file, and offset of its embeddings
        self._index = _map_index(folder / INDEX_FILE)
        self.names, self.group_ids, self.langs = (
            TextColumn(self._index[name], self._index[f"{name}_offsets"]) for name in _TEXT_COLUMNS
        )
        self._maps: dict[int, np.memmap[Any, Any]] = {}
        self._mapped_bytes = 0

    @classmethod
    def open(cls, folder: str | Path, *, check: Literal["fast", "full"] = "fast") -> EmbeddingStore:
        """Open a complete store.

        Args:
            folder: folder that `extract` wrote.
            check: `"fast"` compares the sizes and headers of all files with the manifest; `"full"`
                also reads everything and compares every SHA-256.

        Returns:
            The opened store.

        Raises:
            ValueError: the folder holds no store, or one of another format, or an incomplete one;
                or files are missing or damaged, all of which are named.
        """
        if check not in ("fast", "full"):
            raise ValueError(f"check must be 'fast' or 'full', got {check!r}.")
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest.complete:
            found = len(list(folder.glob("shard-*.json")))
            raise ValueError(
                f"{folder} is not complete: {found} of {manifest.num_shards} shards. Run the same "
                "extraction again; it continues."
            )
        errors: list[str] = []
        _collect(errors, partial(_check_index, folder, manifest, check))
        offsets = [
            _collect(errors, partial(_check_shard, folder, manifest, record, check))
            for record in manifest.shards
        ]
        if errors:
            shown = "; ".join(errors[:_SHOWN])
            raise ValueError(
                f"{folder}: {len(errors)} damaged files: {shown}. Delete the store and extract it "
                "again, or restore these files from a copy."
            )
        files = (folder / record.file for record in manifest.shards)
        return cls(folder, manifest, list(zip(files, map(int, offsets), strict=True)))

    def __reduce__(self) -> tuple[Callable[[Path], EmbeddingStore], tuple[Path]]:
        return EmbeddingStore.open, (self.folder,)

    def __len__(self) -> int:
        """Number of items."""
        return self.manifest.num_items

    def read(self, rows: Rows) -> Tensor:
        """Read rows, in any order and as often as they are given.

        Args:
            rows: (N,) row numbers of the store.

        Returns:
            (N, D) float32 on the CPU.

        Raises:
            ValueError: the store does not have all of these rows.
        """
        manifest = self.manifest
        wanted = _to_row_numbers(rows, manifest.num_rows)
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
        """Return the rows of an item's captions, or the one row of an image.

        Args:
            item: number of the item; negative numbers count from the end.
            long: of the long captions; an image has none.

        Returns:
            (captions,) int64, in the order of the record's captions.

        Raises:
            IndexError: there is no such item.
        """
        item = _check_item(item, len(self))
        rows = "long" if long else "short"
        start, stop = self._index[f"{rows}_offsets"][item : item + 2].tolist()
        return np.array(self._index[f"{rows}_rows"][start:stop])

    @property
    def keys(self) -> np.ndarray[Any, Any]:
        """(N,) int64: a hash of name and language of each item."""
        from .record_columns import hash_identity

        pairs = zip(self.names, self.langs, strict=True)
        return np.array([hash_identity(n, g) for n, g in pairs], np.int64)

    def count_rows(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Count short and long."""
        return (
            np.diff(self._index["short_offsets"]).astype(np.int32),
            np.diff(self._index["long_offsets"]).astype(np.int32),
        )

    def rows_at(
        self, items: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """Rows."""
        both = [
            np.concatenate([self.rows_of(i), self.rows_of(i, long=True)])[n]
            for i, n in zip(items.tolist(), numbers.tolist(), strict=True)
        ]
        return np.array(both, np.int64)

    def require_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Check that a model is the one that made the store.

        Args:
            fingerprint: of the model, from `fingerprint_text` or `fingerprint_vision`.

        Raises:
            ValueError: entries differ; both values of each are named.
        """
        if differences := list_differences(self.manifest.fingerprint, fingerprint):
            raise ValueError(
                f"{self.folder} was made by another model or with another configuration: "
                f"{'; '.join(differences)}. Extract it again with this model, or use the model "
                "that made it."
            )

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
        """Advise the kernel which rows come next, so that the disk reads them in parallel."""
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


def shard_stem(shard: int) -> str:
    """Return the name of a shard's files, without suffix.

    Args:
        shard: its number, from 0.
    """
    return f"shard-{shard:05d}"


def read_manifest(folder: Path) -> StoreManifest:
    """Read and check `manifest.json`.

    Args:
        folder: folder of a store, complete or not.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder holds no store, one of another format, or a damaged one.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no embedding store: it has no {MANIFEST_FILE}. Give a folder that "
            "llm2clip extract wrote."
        )
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file} is damaged ({error}). Extract the store again.") from error
    version = found.get("format_version") if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r}, this code reads {FORMAT_VERSION}. Upgrade "
            "modeling_llm2clip if the store is newer; otherwise extract it again."
        )
    if lost := sorted({field.name for field in fields(StoreManifest)} - set(found)):
        raise ValueError(f"{file} lacks {lost}. Extract the store again.")
    try:
        found["shards"] = tuple(ShardRecord(**shard) for shard in found["shards"])
        manifest = StoreManifest(**found)
        _check_manifest(file, manifest)
    except TypeError as error:  # an unknown field, or a value of another type
        raise ValueError(f"{file} is damaged ({error}). Extract the store again.") from error
    return manifest


def _map_index(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Map every array of an index; nothing is read before it is used."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, place in read_header(file).items():
        dtype = _INDEX_DTYPES.get(place.dtype)
        if dtype is None or len(place.shape) != 1:
            raise ValueError(f"{file.name}: {name} is {place.dtype} {place.shape}")
        place.require_size(file, np.dtype(dtype).itemsize)
        # An array without bytes cannot be mapped.
        arrays[name] = (
            np.memmap(file, dtype=dtype, mode="r", offset=place.offset, shape=place.shape)
            if place.bytes
            else np.zeros(place.shape, dtype=dtype)
        )
    return arrays


def _collect(errors: list[str], check: Callable[[], int]) -> int:
    """Run a check and return what it returns; an error is noted instead of raised."""
    try:
        return check()
    except (ValueError, OSError) as error:
        errors.append(str(error))
        return 0


def _check_index(folder: Path, manifest: StoreManifest, check: str) -> int:
    file = folder / INDEX_FILE
    _check_bytes(file, manifest.index_bytes, manifest.index_sha256, check=check)
    lengths = {name: len(array) for name, array in _map_index(file).items()}
    for name in (*_ROW_LISTS, *_TEXT_COLUMNS):
        if lengths.get(f"{name}_offsets") != manifest.num_items + 1:
            raise ValueError(f"{file.name}: {name}_offsets does not fit {manifest.num_items} items")
    return 0


def _check_shard(folder: Path, manifest: StoreManifest, record: ShardRecord, check: str) -> int:
    """Return the offset of the embeddings in the file."""
    file = folder / record.file
    _check_bytes(file, record.bytes, record.sha256, check=check)
    place = read_header(file).get(EMBEDDINGS)
    wanted = (STORED_DTYPES[manifest.dtype][0], (record.rows, manifest.dim))
    if place is None or (place.dtype, place.shape) != wanted:
        found = place and (place.dtype, place.shape)
        raise ValueError(f"{file.name}: its header says {found}, the manifest {wanted}")
    place.require_size(file, np.dtype(STORED_DTYPES[manifest.dtype][1]).itemsize)
    return place.offset


def _check_bytes(file: Path, size: int, sha256: str, *, check: str) -> None:
    if not file.is_file():
        raise ValueError(f"{file.name}: missing")
    if (found := file.stat().st_size) != size:
        raise ValueError(f"{file.name}: {found} bytes, the manifest says {size}")
    if check == "full" and (digest := hash_file(file)) != sha256:
        raise ValueError(f"{file.name}: SHA-256 is {digest}, the manifest says {sha256}")


def _check_manifest(file: Path, manifest: StoreManifest) -> None:
    errors = []
    if manifest.content not in _CONTENTS:
        errors.append(f"content is {manifest.content!r}, not one of {_CONTENTS}")
    if manifest.dtype not in STORED_DTYPES:
        errors.append(f"dtype is {manifest.dtype!r}, not one of {tuple(STORED_DTYPES)}")
    if min(manifest.dim, manifest.num_rows, manifest.num_items, manifest.rows_per_shard) < 1:
        errors.append("dim, num_rows, num_items and rows_per_shard must be at least 1")
    elif manifest.complete:
        planned = [
            (f"{shard_stem(shard)}.safetensors", manifest.rows_of_shard(shard))
            for shard in range(manifest.num_shards)
        ]
        listed = [(s.file, range(s.first_row, s.first_row + s.rows)) for s in manifest.shards]
        if planned != listed:
            errors.append("the listed shards do not make up its rows")
    if errors:
        raise ValueError(f"{file} is damaged: {'; '.join(errors)}. Extract the store again.")


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
            f"Rows must be a list of integers; got {numbers.dtype} of shape {numbers.shape}."
        )
    bad = numbers[(numbers < 0) | (numbers >= num_rows)]
    if bad.size:
        raise ValueError(
            f"{bad.size} row numbers are outside 0 to {num_rows - 1}, among them "
            f"{bad[:_SHOWN].tolist()}."
        )
    return numbers.astype(np.int64, copy=False)
