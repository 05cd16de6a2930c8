"""Makes batches of images and captions, decoded and tokenized, or read from stores.

The records come from an index, or from a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from functools import partial
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..._suggestions import list_first
from ...configs.align_config import AlignConfig
from ...data.captions.sentence_views import read_num_views, require_views, with_views
from ...data.images.image_sources import open_image
from ...data.records.data_hashes import hash_own_texts
from ...data.records.record_columns import hash_identity, hash_text, make_text_keys
from ...data.records.record_table import CAPTION_COLUMNS, Array, RecordTable, require_images
from ...data.records.records import CaptionedImage
from ...data.store.embedding_store import EmbeddingStore
from ...data.streams.record_streams import RecordStream
from ...image_loading_llm2clip import load_images
from ...processing_llm2clip import LLM2CLIPProcessor
from .align_checks import pair_items, require_same_images, require_same_texts
from .sampling import sample_captions, sample_normal, seed_rows
from .stored_rows import StoredRows

# Stored embeddings that get noise, each with a number of its own for the random generator.
_NOISE_SIDES = {"vision": 2, "caption": 3}


class _Sampled:
    """Samples captions and noise by the options of a run."""

    config: AlignConfig
    caption_store: EmbeddingStore | None
    image_store: EmbeddingStore | None
    reads_images: bool
    _stored: dict[str, StoredRows]  # by what the model calls their embeddings

    @property
    def is_stored(self) -> bool:
        return self.caption_store is not None and not self.reads_images

    def _sample_captions(self, counts: tuple[Array, Array], epochs: Array, items: Array) -> Array:
        return sample_captions(
            *counts,
            long_caption_ratio=self.config.long_caption_ratio,
            seed=self.config.seed,
            epochs=epochs,
            items=items,
        )

    def _seed_noise(
        self, batch: dict[str, Tensor], epochs: Array, items: Array
    ) -> dict[str, Tensor]:
        """Add the seeds of the noise on stored embeddings to a batch, (B,) int64."""
        for name, side in _NOISE_SIDES.items():
            if self._get_noise(name) and {f"{name}_embeds", f"{name}_rows"} & batch.keys():
                batch[f"{name}_seeds"] = seed_rows(self.config.seed, epochs, items, side)
        return batch

    def _get_noise(self, name: str) -> float:
        share: float = getattr(self.config, f"{'image' if name == 'vision' else name}_noise")
        return share

    def complete(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make what the model takes of a batch, on the device where its tensors are.

        Resident rows are gathered, stored embeddings become float32, and the seeds of noise the
        noise, (B, D), which the model adds to them.
        """
        batch = dict(batch)
        for name in (*_NOISE_SIDES, "teacher"):
            rows, seeds = (batch.pop(f"{name}_{part}", None) for part in ("rows", "seeds"))
            if rows is not None:
                resident = self._stored[name].resident
                assert resident is not None
                batch[f"{name}_embeds"] = resident.index_select(0, rows)
            if (embeds := batch.get(f"{name}_embeds")) is not None:
                batch[f"{name}_embeds"] = embeds = embeds.float()
            if embeds is not None and seeds is not None:
                width, length = embeds.shape[1], embeds.norm(dim=1, keepdim=True)
                scale = self._get_noise(name) * width**-0.5 * length
                batch[f"{name}_noise"] = sample_normal(seeds, width=width).mul_(scale)
        return batch


@dataclass(eq=False)
class AlignmentDataset(_Sampled, Dataset[Any]):
    """Records of a dataset, each an image and its captions; returns whole batches.

    A caption is named by its number: first the short ones of a record, then its long ones, and the
    sentence views of these, which training alone samples. A caption store says how many views a
    long caption has, and the options where there is none.

    With `is_part`, the stores may have further records. Where the vision tower is trained, images
    are decoded for it, and the image store has what the frozen tower gives for them.
    """

    data: InitVar[Sequence[CaptionedImage]]
    processor: LLM2CLIPProcessor
    config: AlignConfig = field(default_factory=AlignConfig)
    _: KW_ONLY
    caption_store: EmbeddingStore | None = None
    image_store: EmbeddingStore | None = None
    is_part: InitVar[bool] = False

    def __post_init__(self, data: Sequence[CaptionedImage], is_part: bool) -> None:
        self.records = RecordTable.from_records(data)
        self.num_views = self.config.sentence_views
        self.reads_images = self.image_store is None or self.config.vision_training != "frozen"
        # Number of each record in a store; None if the numbers are the same.
        self._caption_items: Array | None = None
        self._image_items: Array | None = None
        self._stored_long: Array | None = None  # numbers of long captions and views in a store
        if (store := self.caption_store) is not None:
            self.num_views = read_num_views(store.manifest.plan)
            self._caption_items = items = pair_items(self.records, store, is_part=is_part)
            require_same_texts(self.records, store, items)
            if self.num_views:
                _, self._stored_long = store.count_rows()
        else:
            require_views(self.records, self.num_views)
        if self.reads_images:
            require_images(self.records)
        if self.image_store is not None:
            self._image_items = pair_items(self.records, self.image_store)
            require_same_images(self.records, self.image_store, self._image_items)
        image_name = "teacher" if self.reads_images else "vision"
        stores = {"caption": self.caption_store, image_name: self.image_store}
        self._stored = {
            name: StoredRows(store) for name, store in stores.items() if store is not None
        }

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, samples: Array) -> dict[str, Tensor]:
        """Return the batch of (B, 2) epochs and items, for `complete`."""
        epochs, items = np.asarray(samples).T
        numbers = self._sample_captions(self.count_texts(items), epochs, items)
        batch = {
            "group_ids": self.read_group_ids(items),
            "text_keys": self.read_text_keys(items, numbers),
            **self.read_pairs(items, numbers, completed=False),
        }
        return self._seed_noise(batch, epochs, items)

    def read_group_ids(self, items: Array) -> Tensor:
        """Return the hash of each item's group, (B,) int64."""
        return torch.from_numpy(self.records.read_numbers("group_key", items))

    def read_text_keys(self, items: Array, numbers: Array) -> Tensor:
        """Return a number for each caption, (B,) int64; equal captions share it."""
        if not self.num_views:
            return torch.from_numpy(self.records.read_text_keys(items, numbers))
        if (store := self.caption_store) is not None:
            stored = _look_up(self._caption_items, items)
            return torch.from_numpy(store.text_keys_at(stored, numbers))
        return torch.tensor([hash_text(text) for text in self._take_texts(items, numbers)])

    def read_pairs(
        self, items: Array, numbers: Array, *, completed: bool = True
    ) -> dict[str, Tensor]:
        """Read images and captions; embeddings as `complete` makes or as it takes them."""
        batch: dict[str, Tensor] = {}
        if self.caption_store is None:
            batch |= self.processor(text=self._take_texts(items, numbers))
        for name, stored in self._stored.items():
            is_caption = name == "caption"
            rows = self.caption_rows(items, numbers) if is_caption else self.image_rows(items)
            identify = partial(self._identify, items)
            if stored.resident is not None and not completed:
                batch[f"{name}_rows"] = stored.require_checked(rows, identify)
            else:
                dtype = torch.float32 if completed else None
                batch[f"{name}_embeds"] = stored.read(rows, identify, dtype=dtype)
        if self.reads_images:
            images = [open_image(image) for image in self.records.select(items).iterate_images()]
            batch |= self.processor(images=images)
        return batch

    def place(self, device: torch.device, *, num_reads: int) -> None:
        """Copy the stores that fit to a device, for batches that `complete` gets there."""
        for stored in self._stored.values():
            stored.place(device, num_reads=num_reads)

    def caption_rows(self, items: Array, numbers: Array) -> Array:
        assert self.caption_store is not None
        return self.caption_store.rows_at(_look_up(self._caption_items, items), numbers)

    def image_rows(self, items: Array) -> Array:
        assert self.image_store is not None
        stored = _look_up(self._image_items, items)
        return self.image_store.rows_at(stored, np.zeros_like(stored))

    def count_texts(self, items: Array) -> tuple[Array, Array]:
        """Count the short and the long captions of items; views count as long."""
        short, long = self.records.count_texts(items)
        if self._stored_long is not None:
            long = self._stored_long[_look_up(self._caption_items, items)]
        elif self.num_views:
            long = np.array(list(map(len, self._list_texts(items)))) - short
        return short, long

    def _take_texts(self, items: Array, numbers: Array) -> list[str]:
        return list(map(getitem, self._list_texts(items), numbers.tolist()))

    def _list_texts(self, items: Array) -> list[tuple[str, ...]]:
        """List the texts of each item by their numbers."""
        captions = self.records.take(items, CAPTION_COLUMNS)
        return [(*short, *with_views(long, self.num_views)) for short, long in captions]

    def _identify(self, items: Array, places: Array) -> list[tuple[str, ...]]:
        return self.records.take(items[places], ("name", "lang"))


def decode_sample(record: CaptionedImage) -> tuple[CaptionedImage, Any]:
    """Decode a record's image before it is in a batch, so that a broken one can be replaced."""
    return record, load_images(open_image(record.image))


@dataclass(eq=False)
class AlignmentStream(_Sampled):
    """Makes batches of a stream's records, as `AlignmentDataset` does of an index.

    The caption store may have other records, too.
    """

    image_store, reads_images = None, True

    stream: RecordStream
    processor: LLM2CLIPProcessor
    config: AlignConfig = field(default_factory=AlignConfig)
    _: KW_ONLY
    caption_store: EmbeddingStore | None = None

    def __post_init__(self) -> None:
        self.num_views = self.config.sentence_views
        self._stored = {}
        if self.caption_store is not None:
            self._stored["caption"] = StoredRows(self.caption_store)
            self.num_views = read_num_views(self.caption_store.manifest.plan)
            keys = self.caption_store.keys
            self._order = np.argsort(keys)
            self._keys = keys[self._order]
            self._text_keys = np.concatenate([*self.caption_store.iterate_numbers("text_key")])

    def collate(self, samples: Sequence[tuple[CaptionedImage, Any]]) -> dict[str, Tensor]:
        """Return the batch of some records and their decoded images, for `complete`."""
        records = [record for record, _ in samples]
        listed = [(*r.captions, *with_views(r.long_captions, self.num_views)) for r in records]
        keys = np.array([hash_identity(record.name, record.lang) for record in records])
        epochs = np.full(len(records), self.stream.epoch)
        num_short = np.array([len(record.captions) for record in records])
        counts = num_short, np.array(list(map(len, listed))) - num_short
        numbers = self._sample_captions(counts, epochs, keys)
        texts: list[str] = list(map(getitem, listed, numbers.tolist()))
        batch = {
            "group_ids": torch.tensor([hash_text(record.group_id) for record in records]),
            "text_keys": torch.tensor([hash_text(text) for text in texts]),
            **self.processor(images=[image for _, image in samples]),
        }
        if (store := self.caption_store) is None:
            return batch | dict(self.processor(text=texts))
        rows = store.rows_at(self._find_items(records, keys), numbers)
        batch["caption_embeds"] = self._stored["caption"].read(
            rows,
            lambda broken: [(records[n].name, records[n].lang) for n in broken.tolist()],
            dtype=None,
        )
        return self._seed_noise(batch, epochs, keys)

    def _find_items(self, records: Sequence[CaptionedImage], keys: Array) -> Array:
        assert self.caption_store is not None
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        items: Array = self._order[places]
        texts = make_text_keys([(*r.captions, *r.long_captions) for r in records])
        hashes = hash_own_texts(texts, np.array([len(r.captions) for r in records]))
        differs = (self._keys[places] != keys) | (self._text_keys[items] != hashes)
        if differs.any():
            lacking = [records[row] for row in np.flatnonzero(differs).tolist()]
            names = list_first(f"{record.name} ({record.lang})" for record in lacking)
            raise ValueError(
                f"{len(lacking)} of {len(records)} records of a batch are not in "
                f"{self.caption_store.folder}, or with other captions: {names}. Give "
                "the store of these records, or text_training=frozen-online."
            )
        return items


def list_pairs(counts: Array, items: Array) -> tuple[Array, Array]:
    """List the captions of some items: the item of each, and its number in it."""
    starts = np.cumsum(counts) - counts
    numbers = np.arange(counts.sum()) - np.repeat(starts, counts)
    return np.repeat(items, counts), numbers


def _look_up(numbers: Array | None, items: Array) -> Array:
    return items if numbers is None else numbers[items]
