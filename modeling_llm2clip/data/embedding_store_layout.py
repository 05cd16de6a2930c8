"""How a store of embeddings lies on the disk: its files, its manifest, and how a file is written.

| file | what |
| --- | --- |
| `manifest.json` | what the embeddings are, which model made them, and every shard with its SHA-256
| | `index.safetensors` | which rows belong to which item; names, group ids, languages of items |
| `shard-00000.safetensors`, … | tensor `embeddings` (rows, dim), in the order of the rows |
| `shard-00000.json`, … | while it is being written: one file a whole shard; later in the manifest |
| `*.lock`, `*.tmp` | while it is being written: held shards, half-written files |

Items are the records of a data set in its order; rows are in an order of their own, and only the
index says which rows an item has.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.safetensors"
EMBEDDINGS = "embeddings"
_UNFINISHED = ".tmp"
KINDS = ("caption_embeds", "vision_embeds")
TEXT_COLUMNS = ("names", "group_ids", "langs")
ROW_LISTS = ("short", "long")
# Name in safetensors, and the type that numpy reads it as; numpy has no bfloat16.
STORED_DTYPES: dict[str, tuple[str, type[np.generic]]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
}
_INDEX_DTYPES: dict[str, type[np.generic]] = {"I64": np.int64, "U8": np.uint8}
# What safetensors itself refuses to read as a header.
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class ShardRecord:
    """One whole shard: its file, the rows in it, and what its bytes must be."""

    file: str
    first_row: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreManifest:
    """What a store holds.

    Attributes:
        kind: `"caption_embeds"` or `"vision_embeds"`: which half of the model made them.
        fingerprint: which model, prompt and settings made them; see `model_folders/fingerprint.py`.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`, of the stored embeddings.
        dim, num_rows: shape of all embeddings together; rows are planned ones until it is complete.
        num_items: records of the data set.
        rows_per_shard: rows of every shard but the last.
        plan: all else that decides the bytes, among it a digest of the data.
        counts: figures for people, e.g. captions that were cut.
        index_bytes, index_sha256: of `index.safetensors`.
        complete: whether every shard is there.
        shards: the whole shards, by first row.
    """

    kind: str
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
        """How many shards the complete store has."""
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of_shard(self, shard: int) -> range:
        """Rows of a shard, whether it is there or not."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a safetensors file: numpy can map it without reading it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def shard_stem(shard: int) -> str:
    """Name of a shard's files, without ending."""
    return f"shard-{shard:05d}"


def read_manifest(folder: Path) -> StoreManifest:
    """Read and check `manifest.json`.

    Raises: ValueError when the folder holds no store, one of another format, or a damaged one.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no store of embeddings: it has no {MANIFEST_FILE}.")
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file} is damaged ({error}). Extract the store again.") from error
    version = found.get("format_version") if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r}, this code reads {FORMAT_VERSION}. Upgrade "
            "modeling_llm2clip if the store's is newer; otherwise extract it again."
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


def read_places(file: Path) -> dict[str, TensorPlace]:
    """Read the header of a safetensors file: where each of its tensors lies.

    Raises: ValueError when the header is broken or the file ends before its last tensor.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError(f"{file}: not a safetensors file.")
        try:
            header = json.loads(opened.read(length))
            places = {
                name: TensorPlace(
                    entry["dtype"],
                    tuple(entry["shape"]),
                    8 + length + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: its safetensors header is damaged.") from error
    end = max((place.offset + place.bytes for place in places.values()), default=0)
    if end != size:
        raise ValueError(f"{file}: {size} bytes, its header speaks of {end}.")
    return places


def map_index(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Map every array of an index; nothing is read before it is used."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, place in read_places(file).items():
        dtype = _INDEX_DTYPES.get(place.dtype)
        if dtype is None or len(place.shape) != 1:
            raise ValueError(f"{file.name}: {name} is {place.dtype} {place.shape}")
        require_size(file, place, np.dtype(dtype).itemsize)
        # An array without bytes cannot be mapped.
        arrays[name] = (
            np.memmap(file, dtype=dtype, mode="r", offset=place.offset, shape=place.shape)
            if place.bytes
            else np.zeros(place.shape, dtype=dtype)
        )
    return arrays


def require_size(file: Path, place: TensorPlace, item_bytes: int) -> None:
    """Raise ValueError when a tensor has not as many bytes as its shape says."""
    wanted = math.prod(place.shape) * item_bytes
    if place.bytes != wanted:
        raise ValueError(f"{file.name}: {place.bytes} bytes for {wanted} bytes of {place.shape}")


def hash_file(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file that is whole or not there, also after a power cut.

    It is written beside its place, synced and renamed, and the folder is synced. Only one process
    at a time may write the same file.
    """
    unfinished = file.with_name(file.name + _UNFINISHED)
    try:
        with unfinished.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(file)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)


def is_unfinished(file: Path) -> bool:
    """Whether this is what `write_atomically` left when it was killed."""
    return file.name.endswith(_UNFINISHED)


def list_differences(found: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """List every entry that differs, with both values."""
    return [
        f"{name}: {found.get(name)!r} in the store, {wanted.get(name)!r} now"
        for name in sorted(set(found) | set(wanted))
        if found.get(name) != wanted.get(name)
    ]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_manifest(file: Path, manifest: StoreManifest) -> None:
    errors = []
    if manifest.kind not in KINDS:
        errors.append(f"kind is {manifest.kind!r}, not one of {KINDS}")
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
