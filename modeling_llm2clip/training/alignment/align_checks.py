"""Check options, records and stores of an alignment before any tower is loaded."""

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
    """Open the caption, image and teacher stores; refuse stores that the options do not allow."""
    config.require_stores(*places)
    captions, images, teacher = stores = [
        EmbeddingStore.open(place) if isinstance(place, str | Path) else place for place in places
    ]
    contents = (CAPTION_EMBEDS, VISION_EMBEDS, TEACHER_TEXT_EMBEDS)
    errors = [
        f"{opened.folder} holds {opened.manifest.content}, expected {content}"
        for opened, content in zip(stores, contents, strict=True)
        if opened is not None and opened.manifest.content != content
    ]
    if errors:
        raise ValueError("; ".join(errors) + ". Pass each store under the option for its content.")
    if captions is not None and teacher is not None:
        _check_teacher(teacher, captions)
    return captions, images, teacher


def _check_teacher(teacher: EmbeddingStore, captions: EmbeddingStore) -> None:
    """Check that a teacher's store has the same captions, and at least one untruncated caption."""
    manifests = teacher.manifest, captions.manifest
    taught, stored = ((m.plan["data"], read_num_views(m.plan), m.rows_per_shard) for m in manifests)
    if taught != stored:
        raise ValueError(
            f"{teacher.folder} does not have the same rows as {captions.folder} (data, sentence "
            f"views and rows per shard are {taught}, expected {stored}). Extract both from the "
            f"same data with the same options ({_EXTRACT_TEACHER})."
        )
    if teacher.manifest.num_truncated == teacher.manifest.num_rows:
        raise ValueError(
            f"{teacher.folder}: every caption exceeds the teacher's token limit, so there is "
            "nothing to inherit. Add shorter captions."
        )


def require_same_space(teacher: str | Path, of_teacher: Mapping[str, str], folder: Path) -> None:
    """Check by fingerprints that a model embeds images into the space of a teacher's texts."""
    of_model = fingerprint_image_side(list_model_files(folder))
    if of_model["vision tower"] != of_teacher["vision tower"]:
        raise ValueError(
            f"{teacher} does not match the vision tower of {folder}: it comes from another CLIP, "
            "or the tower was changed since (trained, or built at another image size). Use the "
            f"CLIP that the tower was taken from (store: {_EXTRACT_TEACHER}), or rebuild the model."
        )
    if of_model["image projection"] != of_teacher["image projection"]:
        raise ValueError(
            f"{folder} does not have the image projection of its tower's CLIP, so its images are "
            "not in the space of the teacher's texts. Build the model with keep_projection "
            "(llm2clip build --keep-projection), extract its captions, and align that model."
        )


def check_data(records: Sequence[CaptionedImage], *, batch_size: int | None = None) -> None:
    """Check that data can fill a batch, and that its groups leave negatives."""
    if not records:
        raise ValueError("There are no images. Pass at least one batch of records.")
    check_batch(batch_size or 1, len(records))
    _check_group_ids(RecordTable.from_records(records))


def check_batch(batch_size: int, num_records: int, num_held_out: int = 0) -> None:
    if num_records < batch_size:
        raise ValueError(
            f"{counted(num_records, 'record')} to train on ({num_held_out} held out), too few for "
            f"a batch of {batch_size}. Set a smaller global_batch_size, omit it, or add data."
        )


def check_processes(config: AlignConfig, batch_size: int, num_processes: int) -> None:
    """Check that the number of processes divides the batch size and FSDP supports the options."""
    if batch_size % num_processes:
        raise ValueError(
            f"global_batch_size={batch_size} is not divisible by the {num_processes} processes "
            "that share it. Choose a multiple of the number of processes."
        )
    if "lora" in (config.vision_training, config.text_training):
        refuse_fsdp_for_lora()


def check_stream(config: AlignConfig, has_image_store: bool, has_teacher: bool) -> None:
    """Refuse options that do not work with a stream, before the stream is read."""
    refused = {  # in addition to `AlignConfig.require_stores`
        "the length of a stream is unknown: set max_steps": config.max_steps is None,
        "a stream includes its images: omit image_store": has_image_store,
        "the captions of a stream are not known in advance: omit inherit_from": has_teacher,
        "a stream is read only once: omit refit": config.refit,
    }
    if errors := [message for message, is_refused in refused.items() if is_refused]:
        raise ValueError("; ".join(errors) + ".")


def pair_items(
    records: RecordTable, store: EmbeddingStore, *, is_part: bool = False
) -> Array | None:
    """Find the item number of each record in a store, by name and language.

    Return None if record numbers and item numbers are identical. With `is_part`, the store may hold
    additional records.
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
        errors.append(f"{counted(len(lacking), 'record')} not in the store: {names}")
    if len(extra):
        some = [(store.names[i], store.langs[i]) for i in extra[:MAX_LISTED].tolist()]
        names = _list_names(some, len(extra))
        errors.append(f"{counted(len(extra), 'stored record')} not in the data: {names}")
    if errors:
        raise ValueError(
            f"{store.folder} was made from other data: {'; '.join(errors)}. "
            "Extract this data again."
        )
    numbers: Array = items.astype(np.int32 if len(items) < 2**31 else np.int64)
    return numbers


def require_same_texts(records: RecordTable, store: EmbeddingStore, items: Array | None) -> None:
    """Check that all records have the captions that a store was made from."""
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
            f"{counted(len(differing), 'record')} with captions that differ from those in "
            f"{store.folder}: {names}. Extract them again, or use the original captions."
        )


def require_same_images(records: RecordTable, store: EmbeddingStore, items: Array | None) -> None:
    """Check by `hash_images` that a store was made from these images, regardless of captions.

    If the records have no images, only the hash of the captions can be compared.
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
            f"{store.folder} was made from other images with these names ({compared} {stored} "
            f"then, {now} now). Extract them again (--modality image), or use the original data."
        )


def require_directions(
    embeds: Tensor, store: EmbeddingStore, identify: Callable[[Array], Sequence[tuple[str, ...]]]
) -> Tensor:
    """Return stored embeddings; raise ValueError if some are all zeros or not finite."""
    broken = np.flatnonzero(~have_directions(embeds))
    if len(broken):
        names = list(dict.fromkeys(identify(broken[:_MOST_READ])))
        raise ValueError(
            f"{store.folder}: {len(broken)} of {len(embeds)} embeddings just read are all zeros or "
            f"not finite: {_list_names(names, len(names))}. Check the model that made the store "
            "(llm2clip doctor), then extract again."
        )
    return embeds


def have_directions(embeds: Tensor) -> Array:
    """Return for each embedding whether it is finite and not all zeros, (B,) bool."""
    sums = embeds.float().abs().sum(dim=1)
    is_valid: Array = (sums.isfinite() & (sums > 0)).numpy()
    return is_valid


def _check_group_ids(records: RecordTable) -> None:
    """Raise ValueError if groups leave no negatives, or make an image its own negative."""
    first = records.read_numbers("group_key", np.zeros(1, int))
    if all((keys == first).all() for keys in records.iterate_numbers("group_key")):
        raise ValueError(
            f"All {len(records)} records have the group_id {records[0].group_id!r}, so no image "
            "has a negative. Assign different group_ids to images that show different things, or "
            "omit group_id."
        )
    torn = _find_torn(records)
    if len(torn):
        num_torn = len(np.unique(records.read_numbers("name_key", torn)))
        names = dict.fromkeys(name for (name,) in records.take(torn[:ROWS_PER_BATCH], ("name",)))
        raise ValueError(
            f"{counted(num_torn, 'image')} whose group_id differs between languages, which makes "
            f"an image its own negative: {list_first(names, total=num_torn)}. Use one group_id for "
            "all records of an image."
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


def check_own_parts(
    config: AlignConfig, image_transform: object, optimizer: object, *, has_images: bool
) -> None:
    """Refuse a caller's transform or optimizer that an option excludes, or without settings."""
    if image_transform is not None and (has_images or config.min_crop_area):
        raise ValueError(
            "image_transform cannot be combined with an image_store, whose embeddings are of "
            "untransformed images, or with min_crop_area. Leave one of them out."
        )
    if optimizer is not None and "beta2" in config.list_given():
        raise ValueError(
            f"beta2={config.beta2} is an option of AdamW, which optimizer replaces. Leave one out."
        )
    for name, passed in (("image_transform", image_transform), ("optimizer", optimizer)):
        if " object at 0x" in repr(passed):
            raise ValueError(
                f"{name}: the repr {passed!r} has no settings, so a resumed run could not tell "
                "whether they changed. Give the class a __repr__ that names its settings."
            )
