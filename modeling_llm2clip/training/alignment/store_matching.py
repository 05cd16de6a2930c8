"""Finds the records of a dataset in a store, and refuses a store that was made from other data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from ...data.records.data_hashes import hash_image_sizes, hash_texts
from ...data.records.record_columns import NO_IMAGE
from ...data.records.record_table import RecordTable
from ...data.store.embedding_store import EmbeddingStore
from .sampling import Array

_NAMES_SHOWN = 5
_MOST_READ = 100
_IDENTITY = ("name", "lang")


def pair_items(
    records: RecordTable, store: EmbeddingStore, *, is_part: bool = False
) -> Array | None:
    """Find each record in a store by name and language."""
    if len(records) == len(store) and _are_equal(records.iterate_numbers("key"), store):
        return None
    wanted, stored = records.keys, store.keys
    order = np.argsort(stored)
    places = np.searchsorted(stored, wanted, sorter=order).clip(max=max(len(stored) - 1, 0))
    items = order[places]
    lacking = np.flatnonzero(stored[items] != wanted)
    extra = np.flatnonzero(~np.isin(stored, wanted) & (not is_part))
    errors = []
    if len(lacking):
        names = records.take(lacking[: _NAMES_SHOWN + 1], _IDENTITY)
        errors.append(f"{len(lacking)} records are not in the store: {_show(names)}")
    if len(extra):
        names = [(store.names[i], store.langs[i]) for i in extra[: _NAMES_SHOWN + 1].tolist()]
        errors.append(f"{len(extra)} of its items are not in the data: {_show(names)}")
    if errors:
        raise ValueError(
            f"{store.folder} is of other data: {'; '.join(errors)}. Extract this data again."
        )
    numbers: Array = items.astype(np.int32 if len(items) < 2**31 else np.int64)
    return numbers


def require_images(records: RecordTable) -> None:
    """Require that all records have their image."""
    lacking = np.flatnonzero(_lacks_image(records))
    if len(lacking):
        names = records.take(lacking[: _NAMES_SHOWN + 1], _IDENTITY)
        raise ValueError(
            f"{len(lacking)} records have no image: {_show(names)}. Give the folder of images, or "
            "a store of image embeddings."
        )


def require_same_counts(records: RecordTable, store: EmbeddingStore, items: Array | None) -> None:
    """Require that all records have as many captions as in a store."""
    if items is None:
        pairs = zip(records.iterate_counts(), store.iterate_counts(), strict=True)
        parts = [(a != c) | (b != d) for (a, b), (c, d) in pairs]
        differs = np.concatenate(parts)
    else:
        differs = np.zeros(len(records), np.bool_)
        for now, stored in zip(records.count_texts(), store.count_rows(), strict=True):
            differs |= now != stored[items]
    differing = np.flatnonzero(differs)
    if len(differing):
        names = records.take(differing[: _NAMES_SHOWN + 1], _IDENTITY)
        raise ValueError(
            f"{len(differing)} records have other numbers of captions than {store.folder}: "
            f"{_show(names)}. The captions changed since; extract them again."
        )


def require_same_texts(records: RecordTable, store: EmbeddingStore, items: Array | None) -> None:
    """Require that a store was made from these captions; hashes do not show what differs."""
    stored, now = store.manifest.plan.get("data"), hash_texts(_in_order(records, items))
    if stored != now:
        raise ValueError(
            f"{store.folder} was made from other captions of these images (data {stored} then, "
            f"{now} now). Extract these again, or give the captions that the store was made from."
        )


def require_same_images(records: RecordTable, store: EmbeddingStore, items: Array | None) -> None:
    """Require that a store was made from these images, by name and size, whatever their captions.

    Where the images are not there, only the hash of the captions is left.
    """
    stored = store.manifest.plan.get("images")
    if stored is not None and not _lacks_image(records).any():
        compared, now = "images", hash_image_sizes(records)
    else:
        compared, stored = "data", store.manifest.plan.get("data")
        now = hash_texts(_in_order(records, items))
    if stored != now:
        raise ValueError(
            f"{store.folder} was made from other images of these names ({compared} {stored} then, "
            f"{now} now). Extract these again (--modality image), or give the data that the "
            "store was made from."
        )


def require_directions(
    embeds: Tensor, store: EmbeddingStore, identify: Callable[[Array], Sequence[tuple[str, ...]]]
) -> Tensor:
    """Refuse stored embeddings of zeros, which are similar to nothing."""
    zeros = np.flatnonzero((embeds == 0).all(dim=1).numpy())
    if len(zeros):
        names = list(dict.fromkeys(identify(zeros[:_MOST_READ])))
        raise ValueError(
            f"{store.folder}: {len(zeros)} of {len(embeds)} embeddings that were read are all "
            f"zeros, those of {_show(names)}. Check the model that "
            "made the store (llm2clip doctor), and extract again."
        )
    return embeds


def _are_equal(keys: Iterator[Array], store: EmbeddingStore) -> bool:
    """Whether a store has the same keys in the same order."""
    return all(np.array_equal(*pair) for pair in zip(keys, store.iterate_keys(), strict=True))


def _lacks_image(records: RecordTable) -> Array:
    """(N,) bool."""
    kinds = records.iterate_numbers("image_kind")
    return np.concatenate([np.empty(0, np.bool_), *(kind == NO_IMAGE for kind in kinds)])


def _in_order(records: RecordTable, items: Array | None) -> RecordTable:
    """Return the records in the order of a store."""
    return records if items is None else records.select(np.argsort(items))


def _show(pairs: Sequence[tuple[str, ...]]) -> str:
    shown = ", ".join(f"{name} ({lang})" for name, lang in pairs[:_NAMES_SHOWN])
    return shown + (", …" if len(pairs) > _NAMES_SHOWN else "")
