"""The manifest of an embedding store: what the store holds, and a checksum of every part of it.

`manifest.json`, and the record of each complete shard before the manifest has it, carry a SHA-256
of their own content. So a manifest that was edited or damaged is refused, and everything that it
says about index and shards can be relied on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_files import hash_json

FORMAT_VERSION = 3
MANIFEST_FILE = "manifest.json"
_CONTENTS = ("caption_embeds", "vision_embeds")
_OWN_HASH = "sha256_of_this_file"
# Name in safetensors, and the type that numpy reads it as; numpy has no bfloat16.
STORED_DTYPES: dict[str, tuple[str, type[np.generic]]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
}


@dataclass(frozen=True)
class ShardRecord:
    """One complete shard.

    Attributes:
        file: name of its file in the store's folder.
        first_row: number of its first row in the store.
        rows: how many rows it has.
        bytes: size of the file.
        sha256: of the file.
        head_sha256: of the part before the embeddings, which has a checksum of each row.
        num_truncated: how many of its captions were longer than the model reads.
    """

    file: str
    first_row: int
    rows: int
    bytes: int
    sha256: str
    head_sha256: str
    num_truncated: int


@dataclass(frozen=True)
class IndexRecord:
    """The index of the items.

    Attributes:
        bytes: size of the file.
        ends: where each part of the file ends: every batch of items, and the footer.
        sha256: of each part.
    """

    bytes: int
    ends: tuple[int, ...]
    sha256: tuple[str, ...]


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
        index: the index of the items.
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
    index: IndexRecord
    complete: bool = False
    shards: tuple[ShardRecord, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete store."""
        return -(-self.num_rows // self.rows_per_shard)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored embedding."""
        return self.dim * np.dtype(STORED_DTYPES[self.dtype][1]).itemsize

    def rows_of_shard(self, shard: int) -> range:
        """Return the rows of a shard, whether it has been written or not.

        Args:
            shard: its number, from 0.
        """
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def list_causes(self) -> dict[str, object]:
        """Return everything that decides the bytes of a store."""
        return {
            **self.fingerprint,
            **self.plan,
            "content": self.content,
            "stored dtype": self.dtype,
            "dim": self.dim,
            "rows per shard (max_shard_size)": self.rows_per_shard,
        }

    def hash_plan(self) -> str:
        """Hash what decides the bytes of a store; every shard says it, and so whose it is."""
        return hash_json(self.list_causes())

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return write_sealed(asdict(self))


def shard_stem(shard: int) -> str:
    """Return the name of a shard's files, without suffix.

    Args:
        shard: its number, from 0.
    """
    return f"shard-{shard:05d}"


def shard_file(shard: int) -> str:
    """Return the name of a complete shard's file.

    Args:
        shard: its number, from 0.
    """
    return f"{shard_stem(shard)}.safetensors"


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
        found = _parse_object(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file} is damaged ({error}). {_REMEDY}") from error
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r}, this code reads {FORMAT_VERSION}. Upgrade "
            "modeling_llm2clip if the store is newer; otherwise extract it again."
        )
    try:
        content = check_seal(found)
        if lost := sorted({field.name for field in fields(StoreManifest)} - set(content)):
            raise ValueError(f"it lacks {lost}")
        index = content["index"]
        content["index"] = IndexRecord(index["bytes"], tuple(index["ends"]), tuple(index["sha256"]))
        content["shards"] = tuple(ShardRecord(**shard) for shard in content["shards"])
        manifest = StoreManifest(**content)
        _check_manifest(manifest)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}. {_REMEDY}") from error
    return manifest


_REMEDY = "Restore it from a copy, or delete the store and extract it again."


def write_sealed(content: Mapping[str, Any]) -> str:
    """Write an object as JSON with a hash of itself.

    Args:
        content: what JSON can hold.

    Returns:
        The text of the file.
    """
    return json.dumps({**content, _OWN_HASH: _hash_object(content)}, indent=2) + "\n"


def read_sealed(text: str) -> dict[str, Any]:
    """Read an object that `write_sealed` wrote.

    Args:
        text: text of the file.

    Returns:
        The content, without its hash.

    Raises:
        ValueError: it is no JSON object, or has another hash than it says.
    """
    return check_seal(_parse_object(text))


def check_seal(found: Mapping[str, Any]) -> dict[str, Any]:
    """Check the hash of an object that `write_sealed` wrote.

    Args:
        found: the object as it was read.

    Returns:
        The content, without its hash.

    Raises:
        ValueError: it has another hash than it says.
    """
    content = {name: value for name, value in found.items() if name != _OWN_HASH}
    says, has = found.get(_OWN_HASH), _hash_object(content)
    if says != has:
        raise ValueError(f"its content has the SHA-256 {has}, it says {says}")
    return content


def _hash_object(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _parse_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, not an object")
    return found


def _check_manifest(manifest: StoreManifest) -> None:
    errors = []
    if manifest.content not in _CONTENTS:
        errors.append(f"content is {manifest.content!r}, not one of {_CONTENTS}")
    if manifest.dtype not in STORED_DTYPES:
        errors.append(f"dtype is {manifest.dtype!r}, not one of {tuple(STORED_DTYPES)}")
    if min(manifest.dim, manifest.num_rows, manifest.num_items, manifest.rows_per_shard) < 1:
        errors.append("dim, num_rows, num_items and rows_per_shard must be at least 1")
    elif manifest.complete:
        planned = [
            (shard_file(shard), manifest.rows_of_shard(shard))
            for shard in range(manifest.num_shards)
        ]
        listed = [(s.file, range(s.first_row, s.first_row + s.rows)) for s in manifest.shards]
        if planned != listed:
            errors.append("the listed shards do not make up its rows")
    if errors:
        raise ValueError("; ".join(errors))
