"""Manifests of sharded outputs, and the manifest of an embedding store.

A manifest is sealed and lists the size and SHA-256 of every file of its output, so edited or
damaged files are refused. Until the output is complete, each shard has a sealed record next to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..._suggestions import counted, list_first
from ..atomic_files import hash_json, is_unfinished, require_writable
from ..sealed_manifest import FileRecord, list_damage, read_sealed, write_sealed

MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.arrow"
# An underscore, because readers of a folder of Parquet files skip such names.
RECORD_NAME, RECORD_GLOB = "_complete-{:05d}.json", "_complete-*.json"
CAPTION_EMBEDS, VISION_EMBEDS = "caption_embeds", "vision_embeds"
TEACHER_TEXT_EMBEDS = "teacher_text_embeds"
# NumPy's type for each stored dtype; NumPy has no bfloat16.
STORED_DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
}
_NO_INDEX = FileRecord(INDEX_FILE, 0, "")
_Manifest = TypeVar("_Manifest", bound="ShardedManifest")


@dataclass(frozen=True)
class ShardRecord(FileRecord):
    """A complete shard.

    Attributes:
        rows: Number of rows.
        num_truncated: Number of texts that exceeded the model's limit.
        num_clipped: Number of values that exceeded the int8 ranges and were clipped.
        skipped: Ids of images that could not be decoded.
    """

    rows: int
    num_truncated: int = 0
    num_clipped: int = 0
    skipped: tuple[str, ...] = ()


def make_record(content: Mapping[str, Any]) -> ShardRecord:
    return ShardRecord(**_freeze(content))


@dataclass(frozen=True, kw_only=True)
class ShardedManifest:
    """Describes a sharded output, in a JSON file next to the shards.

    Attributes:
        fingerprint: Everything about the model that affects embeddings, including the prompt.
        dtype: Dtype of the embeddings.
        dim: Number of dimensions of an embedding.
        num_inputs: Number of texts or images in all shards.
        rows_per_shard: Number of texts or images in every shard but the last. A shard's file may
            have fewer rows.
        plan: Everything else that affects the bytes of the output, including a hash of the data.
        complete: Whether all shards exist and are listed.
        shards: Records of the shards, once the output is complete.
    """

    FILE: ClassVar[str]
    VERSION: ClassVar[int]
    CONTENT: ClassVar[str]
    """Name of the content, for error messages."""
    COMMAND: ClassVar[str]
    """The command that writes the output."""
    BEFORE: ClassVar[tuple[str, ...]] = ()
    """Names of files that are written before the manifest."""
    SHARD_NAME: ClassVar[str]
    """Format of a shard's file name, from its number and the number of shards."""
    fingerprint: dict[str, str]
    dtype: str
    dim: int
    num_inputs: int = 0
    rows_per_shard: int
    plan: dict[str, str]
    complete: bool = False
    shards: tuple[ShardRecord, ...] = ()
    format_version: int

    @classmethod
    def read(cls: type[_Manifest], folder: Path) -> _Manifest:
        """Read and check the manifest of an output, complete or not."""
        file = folder / cls.FILE
        if not file.is_file():
            raise ValueError(
                f"{folder} has no {cls.CONTENT}: {cls.FILE} is missing. Pass a folder that "
                f"llm2clip {cls.COMMAND} wrote."
            )
        try:
            content = read_sealed(file.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version == cls.VERSION:
                if lost := sorted({entry.name for entry in fields(cls)} - set(content)):
                    raise ValueError(f"it lacks {lost}")
                return cls._from_json(content)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file} is damaged: {error}. Restore it from a copy, or delete {folder} and run "
                f"llm2clip {cls.COMMAND} again."
            ) from error
        raise ValueError(
            f"{file} has format_version {version!r}, but this version reads {cls.VERSION}. Upgrade "
            f"modeling_llm2clip if the file is newer; otherwise delete {folder} and make it again: "
            f"llm2clip {cls.COMMAND} MODEL DATA {folder}"
        )

    @classmethod
    def _from_json(cls: type[_Manifest], content: dict[str, Any]) -> _Manifest:
        shards = tuple(map(make_record, content["shards"]))
        return cls(**{**_freeze(content), "shards": shards})

    @classmethod
    def is_begun(cls, folder: Path) -> bool:
        """Return whether a folder holds this kind of output, complete or not."""
        return (folder / cls.FILE).is_file()

    @classmethod
    def require_folder(cls, folder: Path) -> None:
        """Require a writable folder that is new or empty, or contains this kind of output."""
        if not (cls.is_begun(folder) and cls.read(folder).complete):
            require_writable(folder)
        names = {file.name for file in folder.glob("*") if not is_unfinished(file)}
        others = sorted(names - {*cls.BEFORE})
        if others and not cls.is_begun(folder):  # another process may have just started
            raise FileExistsError(
                f"{folder} is not empty, but has no {cls.CONTENT}: {list_first(others)}. Choose a "
                "new folder."
            )

    def list_causes(self) -> dict[str, object]:
        """Return everything that affects the bytes of the output."""
        return {
            **self.fingerprint,
            **self.plan,
            "embedding dtype": self.dtype,
            "dimensions": self.dim,
            "rows_per_shard": self.rows_per_shard,
        }

    def require_intact(
        self, folder: Path, records: Iterable[FileRecord], *, sizes_only: bool = False
    ) -> None:
        """Raise a ValueError that lists all recorded files that are damaged."""
        if errors := list_damage(folder, records, sizes_only=sizes_only):
            raise ValueError(
                f"{folder}: {counted(len(errors), 'damaged file')}: {list_first(errors, '; ')}. "
                "Restore them from a copy, or delete damaged shards and run "
                f"llm2clip {self.COMMAND} again to recompute them."
            )

    def name_shard(self, shard: int) -> str:
        return self.SHARD_NAME.format(shard, self.num_shards)

    @property
    def num_shards(self) -> int:
        return -(-self.num_inputs // self.rows_per_shard)

    @property
    def num_truncated(self) -> int:
        """Number of texts in complete shards that exceeded the model's limit."""
        return sum(shard.num_truncated for shard in self.shards)

    def inputs_of_shard(self, shard: int) -> range:
        """Return the range of a shard's texts or images."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_inputs))

    def hash_causes(self) -> str:
        """Hash everything that affects the output's bytes; a shard's record contains this hash."""
        return hash_json(self.list_causes())

    def to_json(self) -> str:
        return write_sealed(asdict(self))


@dataclass(frozen=True, kw_only=True)
class StoreManifest(ShardedManifest):
    """Describes an embedding store.

    Attributes:
        content: `"caption_embeds"` or `"vision_embeds"`, from the tower of that name; or
            `"teacher_text_embeds"`, unit-length embeddings from a dual encoder's text encoder
            (zeros for captions that exceed its maximum length).
        num_rows: Number of embeddings, without repeated captions within a shard.
        num_items: Number of records in the dataset.
        index: The file with the rows of each record.
    """

    FILE = MANIFEST_FILE
    VERSION = 6
    CONTENT = "embedding store"
    COMMAND = "extract"
    BEFORE = (INDEX_FILE,)
    SHARD_NAME = "shard-{:05d}.safetensors"

    content: str
    num_rows: int = 0
    num_items: int = 0
    index: FileRecord = _NO_INDEX
    format_version: int = VERSION

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> StoreManifest:
        return super()._from_json({**content, "index": FileRecord(**content["index"])})

    @property
    def row_bytes(self) -> int:
        return self.dim * np.dtype(STORED_DTYPES[self.dtype]).itemsize

    def list_causes(self) -> dict[str, object]:
        return {**super().list_causes(), "content": self.content}


def _freeze(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the lists in an object to tuples, recursively."""
    return {name: _freeze_value(value) for name, value in content.items()}


def _freeze_value(value: Any) -> Any:
    return tuple(map(_freeze_value, value)) if isinstance(value, list) else value
