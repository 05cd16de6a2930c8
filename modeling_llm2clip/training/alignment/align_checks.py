"""Refuses options, records and stores that cannot be aligned, before a tower is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from ..._suggestions import MAX_LISTED, counted, list_first
from ...configs.align_config import AlignConfig
from ...data.captions.sentence_views import read_num_views
from ...data.key_arrays import find_first_rows
from ...data.records.data_hashes import are_of_same_images, hash_images, hash_own_texts, hash_texts
from ...data.records.record_columns import NO_IMAGE, ROWS_PER_BATCH
from ...data.records.record_table import (
    CAPTION_COLUMNS,
    Array,
    RecordTable,
    count_captions,
    require_images,
)
from ...data.records.records import CaptionedImage
from ...data.store.embedding_store import EmbeddingStore
from ...data.store.store_manifest import (
    CAPTION_EMBEDS,
    TEACHER_TEXT_EMBEDS,
    VISION_EMBEDS,
)
from ...loading_llm2clip import list_model_files
from ...model_folders.fingerprint import fingerprint_image_side
from ..trainer_mixins import refuse_fsdp_for_lora

_EXTRACT_TEACHER = "llm2clip extract CLIP DATA STORE --modality text"
_MOST_READ = 100
_IDENTITY = ("name", "lang")


def open_stores(
    config: AlignConfig, *places: str | Path | EmbeddingStore | None
) -> tuple[EmbeddingStore | None, EmbeddingStore | None, EmbeddingStore | None]:
    """Open the stores of captions, images and a teacher, if the options allow them."""
    config.require_stores(*places)
    captions, images, teacher = stores = [
        EmbeddingStore.open(place) if isinstance(place, str | Path) else place for place in places
    ]
    contents = (CAPTION_EMBEDS, VISION_EMBEDS, TEACHER_TEXT_EMBEDS)
    errors = [
        f"{opened.folder} has {opened.manifest.content}, wanted {content}"
        for opened, content in zip(stores, contents, strict=True)
        if opened is not None and opened.manifest.content != content
    ]
    if errors:
        raise ValueError("; ".join(errors) + ". Give each store as what it has (llm2clip extract).")
    if captions is not None and teacher is not None:
        _check_teacher(teacher, captions)
    return captions, images, teacher


def _check_teacher(teacher: EmbeddingStore, captions: EmbeddingStore) -> None:
    """Refuse a teacher's store of other captions, or one whose captions were all too long."""
    manifests = teacher.manifest, captions.manifest
    taught, stored = ((m.plan["data"], read_num_views(m.plan), m.rows_per_shard) for m in manifests)
    if taught != stored:
        raise ValueError(
            f"{teacher.folder} does not have the rows of {captions.folder} (data, sentence views "
            f"and rows per shard {taught}; expected {stored}). Extract both from the same data and "
            f"with the same options ({_EXTRACT_TEACHER})."
        )
    if teacher.manifest.num_truncated == teacher.manifest.num_rows:
        raise ValueError(
            f"{teacher.folder}: every caption is longer than the teacher reads, so that there is "
            "nothing to inherit. Give shorter captions, too."
        )


def require_same_space(teacher: str | Path, of_teacher: Mapping[str, str], folder: Path) -> None:
    """Require that a model embeds images into the space of a teacher's texts, by fingerprints."""
    of_model = fingerprint_image_side(list_model_files(folder))
    if of_model["vision tower"] != of_teacher["vision tower"]:
        raise ValueError(
            f"{teacher} has the text encoder of another vision tower than that of {folder}, or "
            "this one was changed since (trained, or built at another image size). Take that of "
            f"the model that the tower is from (a store: {_EXTRACT_TEACHER}), or build anew."
        )
    if of_model["image projection"] != of_teacher["image projection"]:
        raise ValueError(
            f"{folder} does not have the image projection of its tower's CLIP, so that its images "
            "are not in the space of the teacher's texts. Build the model with keep_projection "
            "(llm2clip build --keep-projection), extract its captions, and align that one."
        )


def check_data(records: Sequence[CaptionedImage], *, batch_size: int | None = None) -> None:
    """Refuse data that cannot fill a batch."""
    if not records:
        raise ValueError("There are no images. Give at least a batch of them.")
    check_batch(batch_size or 1, len(records))
    _check_group_ids(RecordTable.from_records(records))


def check_batch(batch_size: int, num_records: int, num_held_out: int = 0) -> None:
    if num_records < batch_size:
        raise ValueError(
            f"{counted(num_records, 'record')} to train on ({num_held_out} held out), too few for "
            f"a batch of {batch_size}. Set a smaller global_batch_size, leave it out, or give more "
            "data."
        )


def check_processes(config: AlignConfig, batch_size: int, num_processes: int) -> None:
    """Refuse a number of processes that does not divide the batch, or options that they exclude."""
    if batch_size % num_processes:
        raise ValueError(
            f"global_batch_size={batch_size} counts the images of all processes together, and "
            f"{num_processes} processes cannot share it evenly. Choose a multiple of their number."
        )
    if "lora" in (config.vision_training, config.text_training):
        refuse_fsdp_for_lora()


def check_stream(config: AlignConfig, has_image_store: bool, has_teacher: bool) -> None:
    """Refuse options that a stream does not allow, before it is read."""
    refused = {  # beside what `AlignConfig.require_stores` refuses
        "a stream has no known length: give max_steps": config.max_steps is None,
        "a stream brings its images: leave image_store out": has_image_store,
        "a stream does not say which captions it has: leave inherit_from out": has_teacher,
        "a stream is not read twice: leave refit out": config.refit,
    }
    if errors := [message for message, is_refused in refused.items() if is_refused]:
        raise ValueError("; ".join(errors) + ".")


def pair_items(
    records: RecordTable, store: EmbeddingStore, *, is_part: bool = False
) -> Array | None:
    """Find the number of each record in a store, by name and language.

    None means that both have the same numbers. With `is_part`, the store may have more records.
    """
    if len(records) == len(store):
        pairs = zip(records.iterate_numbers("key"), store.iterate_keys(), strict=True)
        if all(np.array_equal(*pair) for pair in pairs):
            return None
    keys, stored = records.keys, store.keys
    order = np.argsort(stored)
    places = np.searchsorted(stored, keys, sorter=order).clip(max=max(len(stored) - 1, 0))
    items = order[places]
    lacking = np.flatnonzero(stored[items] != keys)
    extra = np.flatnonzero(~np.isin(stored, keys) & (not is_part))
    errors = []
    if len(lacking):
        names = _list_names(records.take(lacking[:MAX_LISTED], _IDENTITY), len(lacking))
        errors.append(f"the store lacks {counted(len(lacking), 'record')}: {names}")
    if len(extra):
        some = [(store.names[i], store.langs[i]) for i in extra[:MAX_LISTED].tolist()]
        names = _list_names(some, len(extra))
        errors.append(f"the data lack {counted(len(extra), 'item')} of the store: {names}")
    if errors:
        raise ValueError(
            f"{store.folder} is of other data: {'; '.join(errors)}. Extract this data again."
        )
    numbers: Array = items.astype(np.int32 if len(items) < 2**31 else np.int64)
    return numbers


def require_same_texts(records: RecordTable, store: EmbeddingStore, items: Array | None) -> None:
    """Require that all records have the captions that a store was made from."""
    batches = records.iterate_columns((*CAPTION_COLUMNS, "text_keys"))
    hashes = (hash_own_texts(b.column("text_keys"), count_captions(b)[0]) for b in batches)
    if items is None:
        pairs = zip(hashes, store.iterate_numbers("text_key"), strict=True)
        differs = np.concatenate([now != then for now, then in pairs])
    else:
        stored = np.concatenate([*store.iterate_numbers("text_key")])
        differs = np.concatenate([*hashes]) != stored[items]
    differing = np.flatnonzero(differs)
    if len(differing):
        names = _list_names(records.take(differing[:MAX_LISTED], _IDENTITY), len(differing))
        raise ValueError(
            f"{counted(len(differing), 'record')} with other captions than in {store.folder}: "
            f"{names}. Extract these again, or give the captions that the store was made from."
        )


def require_same_images(records: RecordTable, store: EmbeddingStore, items: Array | None) -> None:
    """Require that a store was made from these images, by `hash_images`, whatever their captions.

    Where the images are not there, only the hash of the captions is left.
    """
    stored = store.manifest.plan.get("images")
    if stored is not None and (records.read_numbers("image_kind") != NO_IMAGE).any():
        require_images(records)
        compared, now = "images", hash_images(records)
        is_same = are_of_same_images(now, stored)
    else:
        compared, stored = "data", store.manifest.plan.get("data")
        now = hash_texts(records if items is None else records.select(np.argsort(items)))
        is_same = now == stored
    if not is_same:
        raise ValueError(
            f"{store.folder} was made from other images of these names ({compared} {stored} then, "
            f"{now} now). Extract these again (--modality image), or give the data that the "
            "store was made from."
        )


def require_directions(
    embeds: Tensor, store: EmbeddingStore, identify: Callable[[Array], Sequence[tuple[str, ...]]]
) -> Tensor:
    """Refuse stored embeddings that are not finite, or all zeros, which are similar to nothing."""
    broken = np.flatnonzero(~have_directions(embeds))
    if len(broken):
        names = list(dict.fromkeys(identify(broken[:_MOST_READ])))
        raise ValueError(
            f"{store.folder}: {len(broken)} of {len(embeds)} embeddings that were read are not "
            f"finite, or all zeros: those of {_list_names(names, len(names))}. Check the model "
            "that made the store (llm2clip doctor), and extract again."
        )
    return embeds


def have_directions(embeds: Tensor) -> Array:
    """Return whether each embedding is finite and not all zeros, (B,) bool."""
    sums = embeds.float().abs().sum(dim=1)
    is_valid: Array = (sums.isfinite() & (sums > 0)).numpy()
    return is_valid


def _check_group_ids(records: RecordTable) -> None:
    """Raise ValueError where groups leave no negatives, or make an image its own negative."""
    first = records.read_numbers("group_key", np.zeros(1, int))
    if all((keys == first).all() for keys in records.iterate_numbers("group_key")):
        raise ValueError(
            f"All {len(records)} records have the group_id {records[0].group_id!r}, so that no "
            "image has a negative. Give images that show different things different group_ids, or "
            "none."
        )
    torn = _find_torn(records)
    if len(torn):
        num_torn = len(np.unique(records.read_numbers("name_key", torn)))
        names = dict.fromkeys(name for (name,) in records.take(torn[:ROWS_PER_BATCH], ("name",)))
        raise ValueError(
            f"{counted(num_torn, 'image')} with several group_ids over the languages, a negative "
            f"of itself: {list_first(names, total=num_torn)}. Give all records of an image one "
            "group_id."
        )


def _find_torn(records: RecordTable) -> Array:
    first = find_first_rows(partial(records.iterate_numbers, "name_key"), len(records))
    parts, start = [], 0
    for keys in records.iterate_numbers("group_key"):
        of_first = records.read_numbers("group_key", first[start : start + len(keys)])
        parts.append(start + np.flatnonzero(of_first != keys))
        start += len(keys)
    differing = np.concatenate(parts)
    return np.union1d(differing, first[differing])


def _list_names(pairs: Sequence[tuple[str, ...]], total: int) -> str:
    return list_first([f"{name} ({lang})" for name, lang in pairs], total=total)
