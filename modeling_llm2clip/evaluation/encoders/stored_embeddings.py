"""Evaluate stored final embeddings, looked up by name, instead of a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._suggestions import list_first
from ...configs.evaluation_config import EncoderConfig
from ...data.atomic_files import hash_json
from ...data.named_embeddings import SIDES, read_named_embeddings, side_file
from ...data.store.store_manifest import MANIFEST_FILE
from ...model_folders.fingerprint import fingerprint_weights
from .encoder import EncodedTexts, EncoderDescription, EvaluationEncoder

_STORE_FOLDERS = (".", "captions", "images")


class StoredEmbeddingsEncoder(EvaluationEncoder):
    """Looks up embeddings by name in a folder; see `data/named_embeddings.py`."""

    def __init__(self, folder: Path, config: EncoderConfig, *, source: str) -> None:
        super().__init__(folder, config, source=source)
        self._files = {side: side_file(folder, side) for side in SIDES}
        self._sides = {
            side: read_named_embeddings(file)
            for side, file in self._files.items()
            if file.is_file()
        }
        if not self._sides:
            raise ValueError(
                f"{source} has no {' or '.join(f'{side}.safetensors' for side in SIDES)}. A "
                "store from `llm2clip extract` holds embeddings before projection, which cannot "
                "be compared; evaluate the model itself."
            )
        widths = {side: named.embeddings.shape[1] for side, named in self._sides.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"{source}: texts and images cannot be compared because their embedding widths "
                f"differ: {widths}."
            )

    def _encode_new_texts(self, texts: list[str]) -> EncodedTexts:
        return EncodedTexts(self._look_up("texts", texts), None)

    def _encode_new_images(self, images: list[Any], names: list[str]) -> Tensor:  # noqa: ARG002
        return self._look_up("images", names)

    def _look_up(self, side: str, names: Sequence[str]) -> Tensor:
        row_of = {name: row for row, name in enumerate(self._sides[side].names)}
        if missing := [*dict.fromkeys(name for name in names if name not in row_of)]:
            raise ValueError(
                f"{self._source} has no embedding for {len(missing)} of {len(set(names))} {side}: "
                f"{list_first(map(repr, missing))}."
            )
        return self._sides[side].embeddings[[row_of[name] for name in names]].float()

    @cached_property
    def description(self) -> EncoderDescription:
        sides: dict[str, dict[str, Any]] = {}
        fingerprint: dict[str, str] = {}
        for side, named in self._sides.items():
            dtype = str(named.embeddings.dtype).removeprefix("torch.")
            sides[side] = {
                "stored_as": "named embeddings", "dtype": dtype, "width": named.embeddings.shape[1],
            }  # fmt: skip
            identity = {**fingerprint_weights([self._files[side]]), "names": hash_json(named.names)}
            fingerprint |= {f"{side} {name}": value for name, value in identity.items()}
        return EncoderDescription(
            model_type="embeddings",
            source=self._source,
            fingerprint=fingerprint,
            text=sides.get("texts"),
            images=sides.get("images"),
            dtype="+".join(sorted({side["dtype"] for side in sides.values()})),
        )


def holds_embeddings(folder: Path) -> bool:
    """Return whether a folder has named embeddings, or a store, which is refused later."""
    stores = (folder / name / MANIFEST_FILE for name in _STORE_FOLDERS)
    return any(file.is_file() for file in (*(side_file(folder, s) for s in SIDES), *stores))
