"""A folder of embeddings in place of a model.

Either embeddings with names (`data/named_embeddings.py`), or stores of `llm2clip extract`: the
folder itself, or its subfolders `captions` and `images`. A store has embeddings from before the
text adapter and the projections, so images and captions can be compared only with the heads of the
model that computed them; captions alone need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._suggestions import counted
from ...configs.evaluation_config import EncoderConfig
from ...configuration_llm2clip import LLM2CLIPConfig
from ...data.atomic_files import hash_json
from ...data.named_embeddings import SIDES, read_named_embeddings, side_file
from ...data.records.data_hashes import are_of_same_images, hash_images, hash_texts
from ...data.records.record_loading import load_records
from ...data.records.record_table import RecordTable
from ...data.records.records import CaptionedImage
from ...data.store.embedding_store import EmbeddingStore
from ...data.store.store_manifest import MANIFEST_FILE
from ...encoding.encode import project_stored
from ...model_folders.fingerprint import (
    fingerprint_model,
    fingerprint_text,
    fingerprint_vision,
    fingerprint_weights,
)
from ...model_folders.model_folder import find_model_folder
from ...model_folders.model_loading import load_partial_model, warn_of_untrained
from ...modeling_llm2clip import LLM2CLIPModel
from .encoder import (
    EncodedTexts,
    EncoderDescription,
    EvaluationEncoder,
    choose_dtype,
    describe_untrained,
)

_SHOWN = 5
_ROWS_AT_ONCE = 2**14
_SIDE_OF_CONTENT = {"caption_embeds": "texts", "vision_embeds": "images"}
_STORE_FOLDERS = (".", "captions", "images")


@dataclass(frozen=True)
class _Side:
    """The stored embeddings of texts or of images.

    `read` returns (N, D) float32 of rows, D is `width`, `dtype` is that on disk, and `made_by` the
    digest of the embeddings, or the fingerprint of the model that computed them.
    """

    row_of: dict[str, int]
    read: Callable[[list[int]], Tensor]
    width: int
    dtype: str
    made_by: dict[str, str]


class StoredEmbeddingsEncoder(EvaluationEncoder):
    """Looks embeddings up.

    Stores need the data that they were `extracted_from`, to know which row belongs to what, and for
    images the `head`: the model that computed them, whose text adapter and projections are applied.
    """

    def __init__(
        self,
        folder: Path,
        config: EncoderConfig,
        *,
        source: str,
        extracted_from: str | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__(folder, config, source=source)
        named = {side: side_file(folder, side) for side in SIDES}
        self._sides = {side: _open_named(file) for side, file in named.items() if file.is_file()}
        self._is_store = not self._sides
        for name, given in (("a head", head), ("extracted_from", extracted_from)):
            if given is not None and not self._is_store:
                raise ValueError(
                    f"{source} has final embeddings; {name} is only for stores. Leave it out."
                )
        self._head_folder = None if head is None else find_model_folder(head)
        self._run: dict[str, Any] = {}
        if self._head_folder is not None:
            head_config = LLM2CLIPConfig.from_pretrained(self._head_folder)
            self._run |= describe_untrained(head_config)
            warn_of_untrained(head_config, self._head_folder)
        if self._is_store:
            self._sides = _open_stores(folder, extracted_from, self._head_folder)
        if self._is_store and head is None:
            # Widths may be equal by chance, and the products would mean nothing.
            self._sides = {side: v for side, v in self._sides.items() if side == "texts"}
            if not self._sides:
                raise ValueError(
                    f"{source} has images as the tower encodes them, which cannot be compared with "
                    "captions. Name the model that computed them (--head)."
                )
        widths = {side: found.width for side, found in self._sides.items()}
        if not self._is_store and len(set(widths.values())) > 1:
            raise ValueError(
                f"{source}: the embeddings have widths {widths} and cannot be compared."
            )

    def _encode_new_texts(self, texts: list[str]) -> EncodedTexts:
        return EncodedTexts(self._look_up("texts", texts, "text"), None)

    def _encode_new_images(self, images: list[Any], names: list[str]) -> Tensor:  # noqa: ARG002
        return self._look_up("images", names, "image")

    def _look_up(self, name: str, wanted: Sequence[str], modality: str) -> Tensor:
        """Read, check and project embeddings in pieces, so that they are held once."""
        side = self._sides[name]
        lost = [*dict.fromkeys(item for item in wanted if item not in side.row_of)]
        if lost:
            raise ValueError(
                f"{self._source} has no embedding for {len(lost)} of {len(set(wanted))} {name}: "
                f"{lost[:_SHOWN]}."
            )
        found: Tensor | None = None
        for start in range(0, len(wanted), _ROWS_AT_ONCE):
            names = wanted[start : start + _ROWS_AT_ONCE]
            embeds = side.read([side.row_of[item] for item in names])
            broken = (~embeds.isfinite()).any(dim=1).nonzero().flatten().tolist()
            if broken:
                shown = [names[row] for row in broken[:_SHOWN]]
                raise ValueError(
                    f"{self._source}: NaN or infinity in the embeddings of {name} {shown}."
                )
            if self._head is not None:
                embeds = project_stored(self._head, embeds, modality)
            if found is None:
                found = embeds.new_empty(len(wanted), embeds.shape[1])
            found[start : start + len(names)] = embeds
        assert found is not None
        return found

    @cached_property
    def _head(self) -> LLM2CLIPModel | None:
        if self._head_folder is None:
            return None
        model = load_partial_model(self._head_folder, device=self._run_config.device)
        dtype = self._run_config.dtype
        if dtype != "saved":
            model.to(dtype=getattr(torch, dtype))  # type: ignore[call-arg]  # wrapped by transformers
        return model

    @cached_property
    def description(self) -> EncoderDescription:
        fingerprint = {
            f"{side} {name}": value
            for side, found in self._sides.items()
            for name, value in found.made_by.items()
        }
        head = self._head_folder
        dtypes = {side.dtype for side in self._sides.values()}
        if head is not None:
            of_head = fingerprint_model(head)
            dtypes.add(choose_dtype(self._run_config, of_head.pop("dtype")))
            fingerprint |= {f"head {name}": value for name, value in of_head.items()}
        stored_as = "stores" if self._is_store else "named embeddings"
        sides = {
            name: {"stored_as": stored_as, "dtype": side.dtype, "width": side.width}
            for name, side in self._sides.items()
        }
        return EncoderDescription(
            model_type="embeddings",
            source=self._source,
            fingerprint=fingerprint,
            text=sides.get("texts"),
            images=sides.get("images"),
            dtype="+".join(sorted(dtypes)),
            run=self._run,
        )


def holds_embeddings(folder: Path) -> bool:
    return any(side_file(folder, side).is_file() for side in SIDES) or bool(_find_stores(folder))


def _find_stores(folder: Path) -> list[Path]:
    return [folder / name for name in _STORE_FOLDERS if (folder / name / MANIFEST_FILE).is_file()]


def _open_named(file: Path) -> _Side:
    found = read_named_embeddings(file)
    return _Side(
        row_of={name: row for row, name in enumerate(found.names)},
        read=lambda rows: found.embeddings[rows].float(),
        width=found.embeddings.shape[1],
        dtype=str(found.embeddings.dtype).removeprefix("torch."),
        made_by={**fingerprint_weights([file]), "names": hash_json(found.names)},
    )


def _open_stores(folder: Path, extracted_from: str | None, head: Path | None) -> dict[str, _Side]:
    stores = [EmbeddingStore.open(path) for path in _find_stores(folder)]
    if not stores:
        files = " and no ".join(f"{side}.safetensors" for side in SIDES)
        raise ValueError(f"{folder} has no embedding store, no {files}.")
    if extracted_from is None:
        raise ValueError(
            f"{folder} has embedding stores, which do not say which row belongs to which text. "
            "Name the dataset they were extracted from (--extracted-from)."
        )
    records = load_records(extracted_from, require_images=False)
    sides = {}
    for store in stores:
        if store.manifest.content not in _SIDE_OF_CONTENT:
            raise ValueError(
                f"{store.folder} has {store.manifest.content}, the embeddings of a teacher. "
                "Evaluate the teacher itself."
            )
        if store.manifest.plan.get("data") != hash_texts(records):
            raise ValueError(
                f"{store.folder} was extracted from another dataset than the one that is named: "
                f"{counted(len(store), 'item')}, here {len(records)}. Name its own, with "
                "the same languages."
            )
        _require_same_images(store, records)
        side = _SIDE_OF_CONTENT[store.manifest.content]
        if head is not None:
            of_head = fingerprint_text if side == "texts" else fingerprint_vision
            store.require_fingerprint(of_head(head))
        sides[side] = _Side(
            row_of=dict(_list_rows(store, records, side)),
            read=store.read,
            width=store.manifest.dim,
            dtype=store.manifest.dtype,
            made_by=store.manifest.fingerprint | {"data": store.manifest.plan["data"]},
        )
    return sides


def _require_same_images(store: EmbeddingStore, records: RecordTable) -> None:
    is_there = [image is not None for image in records.iterate_images()]
    stored = store.manifest.plan.get("images")
    if stored is None or not any(is_there):  # of captions, or nothing to compare
        return
    if not (all(is_there) and are_of_same_images(hash_images(records), stored)):
        raise ValueError(
            f"{store.folder} was made from other images of these names, or from more of them. "
            "Extract these again."
        )


def _list_rows(
    store: EmbeddingStore, records: Sequence[CaptionedImage], side: str
) -> Iterator[tuple[str, int]]:
    for item, record in enumerate(records):
        if side == "images":
            yield record.name, int(store.rows_of(item)[0])
            continue
        for is_long, texts in ((False, record.captions), (True, record.long_captions)):
            rows = store.rows_of(item, long=is_long)[: len(texts)]  # views of long ones follow
            yield from zip(texts, rows.tolist(), strict=True)
