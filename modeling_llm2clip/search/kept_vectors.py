"""Picture vectors kept from search to search, by what the picture files hold.

A file that was renamed, moved or copied is known again; one that was changed is not.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.named_vectors import read_named_vectors, write_named_vectors
from ..data.vector_store_layout import hash_file, name_differences
from ..encoding.pictures import encode_pictures
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor

_ENCODED_AT_ONCE = 1024


class KeptVectors:
    """Vectors of picture files, by the SHA-256 of a file; in memory, or in a file as well.

    Args:
        file: safetensors file of earlier searches, or a new one; None keeps them in memory only.
        fingerprint: what decides the vectors, as `fingerprint_vision` says it of the model.
    Raises: ValueError for a file of another model, one that is broken or holds something else, or
        one that cannot be written.
    """

    def __init__(self, file: Path | None = None, fingerprint: Mapping[str, str] | None = None):
        self._file = file
        self._fingerprint = dict(fingerprint or {})
        self._vectors: dict[str, Tensor] = {}
        self._digests: dict[Path, str] = {}
        if file is not None:
            _require_writable(file)
            self._read(file)

    def __contains__(self, path: Path) -> bool:
        """Whether there is a vector of what this file holds; not, where it cannot be read."""
        try:
            return bool(self._vectors) and self._digest(path) in self._vectors
        except OSError:
            return False

    def encode(
        self,
        model: LLM2CLIPModel,
        processor: LLM2CLIPProcessor,
        paths: Sequence[Path],
        **settings: Any,
    ) -> Tensor:
        """Encode the pictures that have no vector yet, each content once, and keep their vectors.

        Args:
            settings: those of `encode_pictures`.
        Returns: vectors of all of them, (N, D) float32 on the CPU, before the projection.
        Raises: ValueError as `encode_pictures`, or naming a picture whose vector is not finite.
            What was encoded before is kept then, and when the user breaks off. Vectors that cannot
            be written any more are warned of.
        """
        self._require_width(model.visual_projection.in_features)
        new = list({self._digest(path): path for path in paths if path not in self}.values())
        try:
            for start in range(0, len(new), _ENCODED_AT_ONCE):
                part = new[start : start + _ENCODED_AT_ONCE]
                self._keep(part, encode_pictures(model, processor, part, **settings))
        finally:
            if new and self._vectors and self._file is not None:
                self._try_to_write(self._file)
        return torch.stack([self._vectors[self._digest(path)] for path in paths])

    def _keep(self, paths: Sequence[Path], vectors: Tensor) -> None:
        broken = (~vectors.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"The model gave {len(broken)} of {len(paths)} pictures a NaN or an infinity, "
                f"{paths[broken[0]]} first. Examine it with llm2clip doctor."
            )
        self._vectors.update(zip(map(self._digest, paths), vectors, strict=True))

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = hash_file(path)
        return self._digests[path]

    def _read(self, file: Path) -> None:
        """Add what the file holds to what is known."""
        if not file.exists():
            return
        found = read_named_vectors(file)
        made_by = _read_fingerprint(found.notes)
        if made_by is None:
            raise ValueError(f"{file} was not written by a search. Name a new file.")
        if differences := name_differences(made_by, self._fingerprint):
            raise ValueError(
                f"{file} holds vectors of another model: {'; '.join(differences)}. Name a new "
                "file, or remove this one."
            )
        self._vectors = {**dict(zip(found.names, found.vectors, strict=True)), **self._vectors}

    def _require_width(self, width: int) -> None:
        others = {len(vector) for vector in self._vectors.values()} - {width}
        if others:
            raise ValueError(
                f"{self._file} holds vectors of width {sorted(others)}, the model's have {width}. "
                "Remove the file."
            )

    def _try_to_write(self, file: Path) -> None:
        try:
            self._read(file)  # what another search has kept there since
            self._write(file)
        except (OSError, ValueError) as error:
            warnings.warn(f"No vectors were kept in {file}: {error}", stacklevel=3)

    def _write(self, file: Path) -> None:
        vectors = torch.stack(list(self._vectors.values()))
        notes = {"fingerprint": json.dumps(self._fingerprint)}
        write_named_vectors(file, list(self._vectors), vectors, notes=notes)


def _require_writable(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({error}). Name another file.") from error
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise ValueError(f"{file} may not be written by you. Name another file.")


def _read_fingerprint(notes: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        found = json.loads(notes.get("fingerprint", ""))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
