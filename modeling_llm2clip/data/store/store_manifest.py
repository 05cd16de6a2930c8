"""Manifests of sharded outputs, and that of an embedding store.

A manifest, and the record of each complete shard before the manifest has it, carry a SHA-256 of
their own content. So a file that was edited or damaged is refused, and everything that it says
about the shards can be relied on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..atomic_files import hash_json, is_unfinished, require_writable

MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.arrow"
_SHOWN = 5
CAPTION_EMBEDS, VISION_EMBEDS = "caption_embeds", "vision_embeds"
TEACHER_TEXT_EMBEDS = "teacher_text_embeds"
# Captions that a teacher does not read to the end, in the counts of its store.
TOO_LONG = "too long"
_CONTENTS = (CAPTION_EMBEDS, VISION_EMBEDS, TEACHER_TEXT_EMBEDS)
_OWN_HASH = "sha256_of_this_file"
# Name in safetensors, and the type that numpy reads it as; numpy has no bfloat16.
STORED_DTYPES: dict[str, tuple[str, type[np.generic]]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
}
_Manifest = TypeVar("_Manifest", bound="ShardedManifest")


class ShardedManifest:
    """Describes an output of shards, in a JSON file beside them; subclasses are dataclasses.

    `num_rows` is planned until the output is complete, and `shards` is empty until then.
    """

    FILE: ClassVar[str]
    VERSION: ClassVar[int]
    CONTENT: ClassVar[str]
    """Name of the content, for messages."""
    OTHER: ClassVar[str]
    """Name of another content of the same kind."""
    COMMAND: ClassVar[str]
    """The command that writes it."""
    BEFORE: ClassVar[tuple[str, ...]] = ()
    """Names of files that are written before the manifest."""
    RECORD: ClassVar[type[Any]]
    """Class of the records of shards."""
    SHARD_NAME: ClassVar[str]
    """Name of a complete shard's file, given its number and that of all."""
    RECORD_NAME: ClassVar[str]
    """Name of the file that says that a shard is complete, given its number."""
    num_rows: int
    rows_per_shard: int
    complete: bool
    shards: tuple[Any, ...]
    format_version: int

    @classmethod
    def read(cls: type[_Manifest], folder: Path) -> _Manifest:
        """Read and check the manifest of an output, complete or not."""
        file = folder / cls.FILE
        if not file.is_file():
            raise ValueError(
                f"{folder} holds no {cls.CONTENT}: it has no {cls.FILE}. Give a folder that "
                f"llm2clip {cls.COMMAND} wrote."
            )
        try:
            found = _parse_object(file.read_text(encoding="utf-8"))
            version = found["format_version"]
            if version == cls.VERSION:
                content = _check_seal(found)
                if lost := sorted({one.name for one in fields(cls)} - set(content)):  # type: ignore[arg-type]
                    raise ValueError(f"it lacks {lost}")
                return cls._from_json(content)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file} is damaged: {error}. Restore it from a copy, or delete {folder} and "
                f"{cls.COMMAND} again."
            ) from error
        raise ValueError(
            f"{file} has format_version {version!r}, this code reads {cls.VERSION}. Upgrade "
            f"modeling_llm2clip if it is newer; otherwise {cls.COMMAND} again."
        )

    @classmethod
    def _from_json(cls: type[_Manifest], content: dict[str, Any]) -> _Manifest:
        shards = tuple(map(cls.make_record, content["shards"]))
        return cls(**{**_freeze(content), "shards": shards})

    @classmethod
    def make_record(cls, content: dict[str, Any]) -> Any:
        """Make the record of a shard from what JSON holds."""
        return cls.RECORD(**_freeze(content))

    @classmethod
    def is_begun(cls, folder: Path) -> bool:
        """Return whether a folder holds such an output, complete or not."""
        return (folder / cls.FILE).is_file()

    @classmethod
    def require_folder(cls, folder: Path) -> None:
        """Require a folder that is new, empty, or holds such an output; and to be written."""
        if not (cls.is_begun(folder) and cls.read(folder).complete):
            require_writable(folder)
        names = {file.name for file in folder.glob("*") if not is_unfinished(file)}
        others = sorted(names - {*cls.BEFORE})
        if others and not cls.is_begun(folder):  # another process may just have begun
            raise FileExistsError(
                f"{folder} is not empty and holds no {cls.CONTENT}: {others[:_SHOWN]}. Name a new "
                "folder."
            )

    def list_causes(self) -> dict[str, object]:
        """Return everything that decides the bytes of the output."""
        raise NotImplementedError

    def name_shard(self, shard: int) -> str:
        """Return the name of a complete shard's file."""
        return self.SHARD_NAME.format(shard, self.num_shards)

    def name_record(self, shard: int) -> str:
        """Return the name of the file that says that a shard is complete."""
        return self.RECORD_NAME.format(shard)

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete output."""
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of_shard(self, shard: int) -> range:
        """Return the rows of a shard, whether it has been written or not."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def to_json(self) -> str:
        """Return the text of the file."""
        return write_sealed(asdict(self))  # type: ignore[call-overload]


@dataclass(frozen=True)
class ShardRecord:
    """One complete shard of a store, with the hash of its file.

    Attributes:
        head_sha256: Hash of the part before the embeddings, which has a checksum of each row.
        num_truncated: How many of its captions were longer than the model reads.
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
    """The index of the items: ends and hashes of its parts, batches of items and the footer."""

    bytes: int = 0
    ends: tuple[int, ...] = ()
    sha256: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StoreManifest(ShardedManifest):
    """Describes an embedding store.

    Attributes:
        content: `"caption_embeds"` or `"vision_embeds"`: which tower made the embeddings; or
            `"teacher_text_embeds"`, of a dual encoder's text encoder, of unit length, or zeros
            where a caption is longer than it reads.
        fingerprint: Which model, prompt and configuration made them; see
            `model_folders/fingerprint.py`.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`, of the stored embeddings.
        dim: Width of an embedding.
        num_rows: Number of embeddings; 0 until the items are known.
        num_items: Number of records of the dataset.
        plan: Everything else that decides the bytes, including a hash of the data.
        counts: Figures for people, such as the number of truncated captions.
    """

    FILE = MANIFEST_FILE
    VERSION = 4
    CONTENT = "embedding store"
    OTHER = "another store"
    COMMAND = "extract"
    BEFORE = (INDEX_FILE,)
    RECORD = ShardRecord
    SHARD_NAME = "shard-{:05d}.safetensors"
    RECORD_NAME = "shard-{:05d}.json"

    content: str
    fingerprint: dict[str, str]
    dtype: str
    dim: int
    num_rows: int = 0
    num_items: int = 0
    rows_per_shard: int
    plan: dict[str, str]
    counts: dict[str, int] = field(default_factory=dict)
    index: IndexRecord = IndexRecord()
    complete: bool = False
    shards: tuple[ShardRecord, ...] = ()
    format_version: int = VERSION

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> StoreManifest:
        index = IndexRecord(**_freeze(content["index"]))
        manifest = super()._from_json({**content, "index": index})
        manifest._check()
        return manifest

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored embedding."""
        return self.dim * np.dtype(STORED_DTYPES[self.dtype][1]).itemsize

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

    def _check(self) -> None:
        errors = []
        if self.content not in _CONTENTS:
            errors.append(f"content is {self.content!r}, not one of {_CONTENTS}")
        if self.dtype not in STORED_DTYPES:
            errors.append(f"dtype is {self.dtype!r}, not one of {tuple(STORED_DTYPES)}")
        if min(self.dim, self.num_rows, self.num_items, self.rows_per_shard) < 1:
            errors.append("dim, num_rows, num_items and rows_per_shard must be at least 1")
        elif self.complete:
            numbers = range(self.num_shards)
            planned = [(self.name_shard(shard), self.rows_of_shard(shard)) for shard in numbers]
            listed = [(s.file, range(s.first_row, s.first_row + s.rows)) for s in self.shards]
            if planned != listed:
                errors.append("the listed shards do not make up its rows")
        if errors:
            raise ValueError("; ".join(errors))


def write_sealed(content: Mapping[str, Any]) -> str:
    """Write an object as JSON with a hash of itself."""
    return json.dumps({**content, _OWN_HASH: _hash_object(content)}, indent=2) + "\n"


def read_sealed(text: str) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without its hash."""
    return _check_seal(_parse_object(text))


def _check_seal(found: Mapping[str, Any]) -> dict[str, Any]:
    content = {name: value for name, value in found.items() if name != _OWN_HASH}
    says, has = found.get(_OWN_HASH), _hash_object(content)
    if says != has:
        raise ValueError(f"its content has the SHA-256 {has}, it says {says}")
    return content


def _hash_object(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _freeze(content: dict[str, Any]) -> dict[str, Any]:
    """Make tuples of the lists in an object, however deep in each other."""

    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return {name: freeze(value) for name, value in content.items()}


def _parse_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, not an object")
    return found
