"""Writes a store on machines that share no folder: complete shards meet in object storage.

Each machine has a folder of its own for the shards that it computes. What has begun the store first
puts index and manifest into the storage, and the others begin with these. A complete shard is
copied there, and then its record, so that a shard with a record is whole; a run that was killed
before that copies it when it goes on. `finish` copies all shards here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from ..atomic_files import list_differences
from ..remote.object_storage import ObjectStorage
from .embedding_store_writer import Array, EmbeddingStoreWriter, StoreItems
from .store_index import INDEX_FILE
from .store_manifest import (
    MANIFEST_FILE,
    ShardRecord,
    StoreManifest,
    read_manifest,
    shard_file,
    shard_stem,
)
from .store_shard_writer import ShardWriter

_COPIED_AT_ONCE = 4
_SHOWN = 5


class SharedStoreWriter(EmbeddingStoreWriter):
    """One machine's access to a store that several write.

    Use `begin` where the records are at hand, and `join` where the store is begun.

    Attributes:
        storage: where complete shards are.

    Args:
        folder: of this machine.
        manifest: what the store will hold.
        storage: where complete shards are.
        keep: whether shards stay in the folder once they are in the storage.
    """

    def __init__(
        self, folder: Path, manifest: StoreManifest, storage: ObjectStorage, *, keep: bool = True
    ) -> None:
        super().__init__(folder, manifest)
        self.storage = storage
        self._keep = keep

    @classmethod
    def begin(
        cls,
        folder: Path,
        storage: ObjectStorage,
        planned: StoreManifest,
        list_items: Callable[[Path], StoreItems],
    ) -> SharedStoreWriter:
        """Begin a store, or continue the same one, here and in the storage.

        Args:
            folder: of this machine: new, empty, or of the same store.
            storage: where complete shards are.
            planned: as `EmbeddingStoreWriter.open` takes it.
            list_items: as `EmbeddingStoreWriter.open` takes it.

        Raises:
            ValueError: the folder or the storage holds another store.
            FileExistsError: the folder holds other files, or the storage shards of a store whose
                manifest is gone.
            OSError: the disk is full, or the storage cannot be reached.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # processes of one machine
            is_begun = _pull_plan(folder, storage)
            if not is_begun:
                _require_no_shards(storage)
            manifest = EmbeddingStoreWriter.open(folder, planned, list_items).manifest
            if not is_begun:
                for name in (INDEX_FILE, MANIFEST_FILE):
                    storage.push(folder / name)
                _pull_plan(folder, storage)  # another store may have begun there meanwhile
            writer = cls(folder, manifest, storage)
            writer._publish_left()
        return writer

    @classmethod
    def join(cls, folder: Path, storage: ObjectStorage, *, keep: bool = True) -> SharedStoreWriter:
        """Take part in a store that is begun.

        Args:
            folder: of this machine: new, empty, or of the same store.
            storage: where complete shards are.
            keep: whether shards stay in the folder once they are in the storage.

        Raises:
            ValueError: the storage holds no store, or the folder another one.
            OSError: the storage cannot be reached.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not _pull_plan(folder, storage):
            raise ValueError(f"{storage.url} holds no store. Extract into it first.")
        return cls(folder, read_manifest(folder), storage, keep=keep)

    def is_done(self, shard: int) -> bool:
        """Whether a shard is complete, here or in the storage.

        Args:
            shard: its number, from 0.
        """
        return super().is_done(shard) or self.storage.has(_record_file(shard))

    def list_missing(self) -> list[int]:
        """List the shards that are complete neither here nor in the storage."""
        stored = self._list_stored()
        return [shard for shard in super().list_missing() if shard not in stored]

    def open_shard(self, shard: int, batches: Sequence[Array]) -> ShardWriter:
        """Begin a shard, or continue it; once it is complete it is copied into the storage.

        Args:
            shard: its number, from 0.
            batches: as `EmbeddingStoreWriter.open_shard` takes them.

        Raises:
            OSError: the disk is full.
        """
        return _SharedShardWriter(
            self.folder, self.manifest, shard, batches, publish=partial(self._publish, shard)
        )

    def _publish_left(self) -> None:
        """Copy the shards that a run completed here, and that was killed before they were there."""
        if not read_manifest(self.folder).complete:
            shards = set(range(self.manifest.num_shards))
            for shard in sorted(shards - set(super().list_missing()) - self._list_stored()):
                self._publish(shard)

    def _publish(self, shard: int) -> None:
        files = [self.folder / name for name in _list_files(shard)]
        for file in files:
            self.storage.push(file)
        if not self._keep:
            for file in files:
                file.unlink()

    def finish(self) -> None:
        """Copy the shards that others computed, check every one, and complete the manifest.

        Raises:
            ValueError: shards are missing or damaged; they are named.
            OSError: the disk is full, or the storage cannot be reached.
        """
        if not read_manifest(self.folder).complete:
            missing = set(super().list_missing()) & self._list_stored()
            with ThreadPoolExecutor(_COPIED_AT_ONCE) as pool:
                list(pool.map(self._fetch, sorted(missing)))
        super().finish()

    def _name_places(self) -> str:
        return f"{self.folder} and {self.storage.url}"

    def _fetch(self, shard: int) -> None:
        for name in _list_files(shard):
            self.storage.pull(name, self.folder)

    def _list_stored(self) -> set[int]:
        names = self.storage.list_sizes().keys()
        shards = range(self.manifest.num_shards)
        return {shard for shard in shards if _record_file(shard) in names}


class _SharedShardWriter(ShardWriter):
    """Writes a shard here, and then into the storage."""

    def __init__(
        self,
        folder: Path,
        manifest: StoreManifest,
        shard: int,
        batches: Sequence[Array],
        *,
        publish: Callable[[], None],
    ) -> None:
        super().__init__(folder, manifest, shard, batches)
        self._publish = publish

    def seal(self, num_truncated: int = 0) -> ShardRecord:
        record = super().seal(num_truncated)
        self._publish()
        return record


def _list_files(shard: int) -> tuple[str, str]:
    """Name the files of a complete shard, the record last: it says that the other one is whole."""
    return shard_file(shard), _record_file(shard)


def _record_file(shard: int) -> str:
    return f"{shard_stem(shard)}.json"


def _require_no_shards(storage: ObjectStorage) -> None:
    """Refuse to begin where shards are that nothing says the store of."""
    names = storage.list_sizes().keys()
    shards = sorted(name for name in names if name.startswith("shard-"))
    if shards and MANIFEST_FILE not in names:  # another machine may just have begun
        raise FileExistsError(
            f"{storage.url} has no {MANIFEST_FILE}, and holds shards of some store: "
            f"{shards[:_SHOWN]}. Name another place, put the manifest back, or remove them."
        )


def _pull_plan(folder: Path, storage: ObjectStorage) -> bool:
    """Copy manifest and index here unless they are; whether the storage has them."""
    if not storage.has(MANIFEST_FILE):
        return False
    if not (folder / MANIFEST_FILE).is_file():
        folder.mkdir(exist_ok=True)
        storage.pull(INDEX_FILE, folder)
        storage.pull(MANIFEST_FILE, folder)
        return True
    with TemporaryDirectory(prefix="llm2clip-") as name:
        storage.pull(MANIFEST_FILE, Path(name))
        theirs, ours = read_manifest(Path(name)).list_causes(), read_manifest(folder).list_causes()
    if differences := list_differences(ours, theirs):
        raise ValueError(
            f"{folder} and {storage.url} hold different stores: {'; '.join(differences)}. Name "
            "another folder, or another place in the storage."
        )
    return True
