"""Manifests of sharded outputs, and that of an embedding store.

A manifest, and the record of each complete shard before the manifest has it, carry a SHA-256 of
their own content. So a file that was edited or damaged is refused, and everything that it says
about the shards can be relied on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..._suggestions import list_first
from ..atomic_files import hash_json, is_unfinished, require_writable
from ..sealed_manifest import read_sealed, write_sealed

MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.arrow"
CAPTION_EMBEDS, VISION_EMBEDS = "caption_embeds", "vision_embeds"
TEACHER_TEXT_EMBEDS = "teacher_text_embeds"
# Name in the counts of a store: captions that are longer than a teacher reads.
TOO_LONG = "too long"
# Name in safetensors, and the type that numpy reads it as; numpy has no bfloat16.
STORED_DTYPES: dict[str, tuple[str, type[np.generic]]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
}
_Manifest = TypeVar("_Manifest", bound="ShardedManifest")


@dataclass(frozen=True)
class ShardRecord:
    """A complete shard.

    Attributes:
        file: Name of its file.
        rows: Number of its rows.
        bytes: Size of its file.
        sha256: Hash of its file.
        num_truncated: Captions that were longer than the model reads.
        num_clipped: Values outside the int8 ranges.
        skipped: Ids of images that could not be decoded.
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    num_truncated: int = 0
    num_clipped: int = 0
    skipped: tuple[str, ...] = ()


def make_record(content: Mapping[str, Any]) -> ShardRecord:
    """Make the record of a shard from its JSON object."""
    return ShardRecord(**_freeze(content))


class ShardedManifest:
    """Describes an output of shards, in a JSON file beside them; subclasses are dataclasses.

    `num_rows` is planned until the output is complete, and `shards` is empty until then.
    """

    FILE: ClassVar[str]
    VERSION: ClassVar[int]
    CONTENT: ClassVar[str]
    """Name of the content, for messages."""
    COMMAND: ClassVar[str]
    """The command that writes it."""
    BEFORE: ClassVar[tuple[str, ...]] = ()
    """Names of files that are written before the manifest."""
    SHARD_NAME: ClassVar[str]
    """Name of a complete shard's file, given its number and that of all."""
    RECORD_NAME: ClassVar[str]
    """Name of the file that says that a shard is complete, given its number."""
    RECORD_GLOB: ClassVar[str]
    """Pattern of these names."""
    num_rows: int
    rows_per_shard: int
    complete: bool
    shards: tuple[ShardRecord, ...]
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
            content = read_sealed(file.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version == cls.VERSION:
                if lost := sorted({entry.name for entry in fields(cls)} - set(content)):  # type: ignore[arg-type]
                    raise ValueError(f"it lacks {lost}")
                return cls._from_json(content)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file} is damaged: {error}. Restore it from a copy, or delete {folder} and "
                f"{cls.COMMAND} again."
            ) from error
        raise ValueError(
            f"{file} has format_version {version!r}, this code reads {cls.VERSION}. Upgrade "
            f"modeling_llm2clip if it is newer; otherwise delete {folder} and make it again: "
            f"llm2clip {cls.COMMAND} MODEL DATA {folder}"
        )

    @classmethod
    def _from_json(cls: type[_Manifest], content: dict[str, Any]) -> _Manifest:
        shards = tuple(map(make_record, content["shards"]))
        return cls(**{**_freeze(content), "shards": shards})

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
                f"{folder} is not empty and holds no {cls.CONTENT}: {list_first(others)}. Name a "
                "new folder."
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
class IndexRecord:
    """Size and hash of the index of the items."""

    bytes: int = 0
    sha256: str = ""


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
    VERSION = 5
    CONTENT = "embedding store"
    COMMAND = "extract"
    BEFORE = (INDEX_FILE,)
    SHARD_NAME = "shard-{:05d}.safetensors"
    RECORD_NAME = "shard-{:05d}.json"
    RECORD_GLOB = "shard-*.json"

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
        return super()._from_json({**content, "index": IndexRecord(**content["index"])})

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
        """Hash everything that decides the bytes of a store; each shard names its store by it."""
        return hash_json(self.list_causes())


def _freeze(content: Mapping[str, Any]) -> dict[str, Any]:
    """Make tuples of the lists in an object, and of the lists in these."""
    return {name: _freeze_value(value) for name, value in content.items()}


def _freeze_value(value: Any) -> Any:
    return tuple(map(_freeze_value, value)) if isinstance(value, list) else value
