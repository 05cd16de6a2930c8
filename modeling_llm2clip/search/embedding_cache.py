"""Embeddings of image files from earlier runs, found again by what a file contains.

A file that was renamed, moved or copied is known again; one that was changed is not.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.atomic_files import default_cache_folder, hash_file, hash_json, list_differences
from ..data.named_embeddings import read_named_embeddings, write_named_embeddings
from ..encoding.encode import encode_images
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor

_MOST_THREADS = 8
_HASHED_AT_ONCE = 1024
# A safetensors header has at most 100 MB, and a name takes 70 bytes of it.
_MAX_EMBEDDINGS = 1_400_000
# A run that is killed loses no more than this; the whole file is written each time.
_SECONDS_BETWEEN_WRITES = 300


class EmbeddingCache:
    """Embeddings of image files before the projection, by the SHA-256 of a file.

    Args:
        file: safetensors file of earlier runs, or a new one; None keeps the embeddings in memory
            only.
        fingerprint: What decides the embeddings: `fingerprint_vision` of the model.
        notes: Further metadata of the file.

    Raises:
        ValueError: The file is of another model, is broken or holds something else, or cannot be
            written.
    """

    def __init__(
        self,
        file: Path | None = None,
        fingerprint: Mapping[str, str] | None = None,
        *,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self._file = file
        self._fingerprint = dict(fingerprint or {})
        self._notes = dict(notes or {})
        self._file_notes: dict[str, str] = {}
        self._embeddings: dict[str, Tensor] = {}
        self._digests: dict[Path, str] = {}
        if file is not None:
            require_writable(file)
            self._read(file)

    def __contains__(self, path: Path) -> bool:
        """Whether there is an embedding of what this file contains; False if it is unreadable."""
        return not self.find_new([path])

    @property
    def file(self) -> Path | None:
        """Where the embeddings are kept."""
        return self._file

    def find_new(self, paths: Sequence[Path], *, show_progress: bool = False) -> list[Path]:
        """Find the images that have no embedding yet, or that cannot be read.

        Args:
            paths: Image files.
            show_progress: Show a progress bar.

        Raises:
            ValueError: There are more than the file can hold.
        """
        if self._embeddings:
            self._hash(paths, show_progress=show_progress)
        new = [path for path in paths if self._digests.get(path) not in self._embeddings]
        if self._file is not None and len(self._embeddings) + len(new) > _MAX_EMBEDDINGS:
            raise ValueError(
                f"{self._file} holds at most {_MAX_EMBEDDINGS:,} embeddings; with {len(new):,} new "
                f"images there would be {len(self._embeddings) + len(new):,}. Pass "
                "--no-keep-index, or search fewer images."
            )
        return new

    def encode(
        self,
        model: LLM2CLIPModel,
        processor: LLM2CLIPProcessor,
        paths: Sequence[Path],
        **options: Any,
    ) -> Tensor:
        """Encode the images that have no embedding yet, each content once, and keep them.

        What was encoded is kept when an error or the user stops the rest. If the file can no
        longer be written, a warning says so.

        Args:
            model: The model of the fingerprint.
            processor: Its processor.
            paths: N image files.
            **options: As in `encode_images`.

        Returns:
            Embeddings of all of them, (N, D) float32 on the CPU, before the projection.

        Raises:
            ValueError: As `encode_images`.
        """
        self._require_width(model.visual_projection.in_features)
        new = list({self._digest(path): path for path in self.find_new(paths)}.values())
        try:
            if new:
                self._encode_new(model, processor, new, **options)
        finally:
            if new or not self._notes.items() <= self._file_notes.items():
                self._try_to_write()
        return torch.stack([self._embeddings[self._digest(path)] for path in paths])

    def _encode_new(
        self,
        model: LLM2CLIPModel,
        processor: LLM2CLIPProcessor,
        paths: Sequence[Path],
        **options: Any,
    ) -> None:
        written = time.monotonic()

        def keep(rows: Sequence[int], embeds: Tensor) -> None:
            nonlocal written
            digests = [self._digest(paths[row]) for row in rows]
            self._embeddings.update(zip(digests, embeds, strict=True))
            if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                self._try_to_write()
                written = time.monotonic()

        encode_images(model, processor, paths, project=False, on_batch=keep, **options)

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = hash_file(path)
        return self._digests[path]

    def _hash(self, paths: Sequence[Path], *, show_progress: bool) -> None:
        """Hash the files in threads; one that cannot be read gets no digest."""
        unhashed = [path for path in dict.fromkeys(paths) if path not in self._digests]
        with (
            ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool,
            tqdm(total=len(unhashed), unit=" files", disable=not show_progress) as progress,
        ):
            # A pool takes all its work at once, so it gets a part at a time.
            for start in range(0, len(unhashed), _HASHED_AT_ONCE):
                part = unhashed[start : start + _HASHED_AT_ONCE]
                for path, digest in zip(part, pool.map(_try_to_hash, part), strict=True):
                    if digest is not None:
                        self._digests[path] = digest
                    progress.update()

    def _read(self, file: Path) -> None:
        """Add the embeddings of the file to those in memory."""
        if not file.exists():
            return
        found = read_named_embeddings(file)
        made_by = _read_fingerprint(found.notes)
        if made_by is None:
            raise ValueError(f"{file} is not an index of images. Name a new file.")
        if differences := list_differences(made_by, self._fingerprint):
            raise ValueError(
                f"{file} holds embeddings of another model: {'; '.join(differences)}. Name a new "
                "file, or remove this one."
            )
        self._file_notes = dict(found.notes)
        self._embeddings = {
            **dict(zip(found.names, found.embeddings, strict=True)),
            **self._embeddings,
        }

    def _require_width(self, width: int) -> None:
        others = {len(embedding) for embedding in self._embeddings.values()} - {width}
        if others:
            raise ValueError(
                f"{self._file} holds embeddings of width {sorted(others)}, the model's have "
                f"{width}. Remove the file."
            )

    def _try_to_write(self) -> None:
        if self._file is None or not self._embeddings:
            return
        try:
            self._read(self._file)  # what another run has kept there since
            self._write(self._file)
        except (OSError, ValueError) as error:
            warnings.warn(f"No embeddings were kept in {self._file}: {error}", stacklevel=4)

    def _write(self, file: Path) -> None:
        embeddings = torch.stack(list(self._embeddings.values()))
        notes = {**self._notes, "fingerprint": json.dumps(self._fingerprint)}
        # A name of its own, because another run may write the same file at the same time.
        unfinished = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
        write_named_embeddings(unfinished, list(self._embeddings), embeddings, notes=notes)
        try:
            unfinished.replace(file)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise


def read_notes(file: Path) -> dict[str, str]:
    """Read what `EmbeddingCache` noted in its file.

    Args:
        file: safetensors file.

    Raises:
        ValueError: The file is missing, damaged, or something else.
    """
    notes = dict(read_named_embeddings(file).notes)
    if _read_fingerprint(notes) is None:
        raise ValueError(f"{file} is not an index of images. Name another file.")
    return notes


def find_default_file(folder: Path, fingerprint: Mapping[str, str]) -> Path:
    """Name the file in the user's cache that keeps the embeddings of a folder's images.

    Each model has a folder there, and each folder of images has a file of its own, because the
    whole file is read and written.

    Args:
        folder: Folder of images.
        fingerprint: Of the model, from `fingerprint_vision`.

    Returns:
        The file, which may not exist yet.
    """
    place = folder.resolve()
    name = f"{place.name[:40]}-{hash_json(str(place))[:8]}.safetensors"
    of_model = hash_json(dict(fingerprint))[:12]
    return default_cache_folder() / "image-embeddings" / of_model / name


def _try_to_hash(path: Path) -> str | None:
    try:
        return hash_file(path)
    except OSError:
        return None


def require_writable(file: Path) -> None:
    """Raise ValueError when a file cannot be written, and make its folder.

    Args:
        file: The file, which need not exist.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({error}). Name another file.") from error
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise ValueError(f"{file} is not writable for you. Name another file.")


def _read_fingerprint(notes: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        found = json.loads(notes.get("fingerprint", ""))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
