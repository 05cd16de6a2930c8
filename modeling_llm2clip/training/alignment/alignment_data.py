"""Makes batches of images and captions, decoded and tokenized, or read from stores.

The records come from an index, or from a stream.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, InitVar, dataclass, replace
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..._suggestions import list_first
from ...data.captions.sentence_views import read_num_views, require_views, with_views
from ...data.images.image_sources import open_image
from ...data.records.data_hashes import hash_own_texts
from ...data.records.record_columns import hash_identity, hash_text, make_text_keys
from ...data.records.record_table import CAPTION_COLUMNS, Array, RecordTable
from ...data.records.records import CaptionedImage
from ...data.records.shared_images import require_images
from ...data.store.embedding_store import EmbeddingStore
from ...data.streams.record_streams import RecordStream
from ...image_loading_llm2clip import load_images
from ...processing_llm2clip import LLM2CLIPProcessor
from .align_checks import (
    pair_items,
    require_directions,
    require_same_images,
    require_same_texts,
)
from .sampling import sample_captions, sample_normal

INPUT_SECONDS = "input_seconds"
"""Name in a batch of the seconds that its parts took where it was made."""
_PARTS = ("read", "decode", "tokenize")
# Numbers that keep the noise of one side apart from that of the other.
_IMAGE_NOISE, _CAPTION_NOISE = 2, 3


class InputTimes:
    """Seconds of the parts of making a batch, perhaps in another process."""

    def __init__(self) -> None:
        self.seconds = torch.zeros(len(_PARTS), dtype=torch.float64)

    def add(self, part: str, seconds: float) -> None:
        self.seconds[_PARTS.index(part)] += seconds

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.add(part, time.perf_counter() - begin)

    def describe(self) -> str:
        """Describe the parts by their shares, such as "decode 91%, tokenize 9%"."""
        total = float(self.seconds.sum())
        parts = zip(_PARTS, self.seconds.tolist(), strict=True)
        return ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in parts if seconds)


@dataclass(eq=False)
class AlignmentDataset(Dataset[Any]):
    """Records of a dataset, each an image and its captions; returns whole batches.

    A caption is named by its number: first the short ones of a record, then its long ones, and the
    sentence views of these, which training alone samples. A caption store says how many views a
    long caption has, and `sentence_views` where there is none.

    Both kinds of noise are standard deviations, as a share of an embedding's length. A batch of
    training has what is added to its stored embeddings before they are projected. With `is_part`,
    the stores may have further records. With `is_teacher`, images are decoded for a tower that is
    trained, and the image store has what the frozen one gives for them.
    """

    data: InitVar[Sequence[CaptionedImage]]
    processor: LLM2CLIPProcessor
    _: KW_ONLY
    caption_store: EmbeddingStore | None = None
    image_store: EmbeddingStore | None = None
    long_caption_ratio: float = 0.5
    image_noise: float = 0.0
    caption_noise: float = 0.0
    sentence_views: int = 0
    seed: int = 0
    is_teacher: bool = False
    is_part: InitVar[bool] = False

    def __post_init__(self, data: Sequence[CaptionedImage], is_part: bool) -> None:
        self.records = RecordTable.from_records(data)
        # Number of each record in a store; None if the numbers are the same.
        self._caption_items: Array | None = None
        self._image_items: Array | None = None
        self._stored_long: Array | None = None  # numbers of long captions and views in a store
        if (store := self.caption_store) is not None:
            self.sentence_views = num_views = read_num_views(store.manifest.plan)
            self._caption_items = items = pair_items(self.records, store, is_part=is_part)
            require_same_texts(self.records, store, items)
            if num_views:
                _, self._stored_long = store.count_rows()
        else:
            require_views(self.records, self.sentence_views)
        if self.reads_images:
            require_images(self.records)
        if self.image_store is not None:
            self._image_items = pair_items(self.records, self.image_store)
            require_same_images(self.records, self.image_store, self._image_items)

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, samples: Array) -> dict[str, Tensor]:
        """Return the batch of (B, 2) epochs and items.

        Beside the inputs of the model it has the seconds that its parts took, by `INPUT_SECONDS`.
        """
        epochs, items = np.asarray(samples).T
        numbers = sample_captions(
            *self.count_texts(items),
            long_caption_ratio=self.long_caption_ratio,
            seed=self.seed,
            epochs=epochs,
            items=items,
        )
        times = InputTimes()
        batch = self.read_pairs(items, numbers, times)
        for name, noise, side in (
            ("vision", self.image_noise, _IMAGE_NOISE),
            ("caption", self.caption_noise, _CAPTION_NOISE),
        ):
            if noise and f"{name}_embeds" in batch:
                embeds = batch[f"{name}_embeds"]
                batch[f"{name}_noise"] = _make_noise(embeds, noise, self.seed, epochs, items, side)
        return {
            "group_ids": self.read_group_ids(items),
            "text_keys": self.read_text_keys(items, numbers),
            INPUT_SECONDS: times.seconds,
            **batch,
        }

    @property
    def reads_images(self) -> bool:
        return self.image_store is None or self.is_teacher

    @property
    def is_stored(self) -> bool:
        return self.caption_store is not None and not self.reads_images

    @property
    def has_noise(self) -> bool:
        """True where training batches have noise on a stored embedding."""
        of_images = self.image_noise and not self.reads_images
        return bool(of_images or (self.caption_noise and self.caption_store is not None))

    def read_group_ids(self, items: Array) -> Tensor:
        """Return a hash per item that items of one group share, (B,) int64."""
        return torch.from_numpy(self.records.read_numbers("group_key", items))

    def read_text_keys(self, items: Array, numbers: Array) -> Tensor:
        """Return a number per caption that equal captions share, (B,) int64."""
        if not self.sentence_views:
            return torch.from_numpy(self.records.read_text_keys(items, numbers))
        if self.caption_store is not None:  # which has each text once
            return torch.from_numpy(self.caption_rows(items, numbers))
        return torch.tensor([hash_text(text) for text in self._take_texts(items, numbers)])

    def find_group_names(self, group_ids: Tensor) -> list[str]:
        """Find group ids by their hashes, which takes a pass over the records."""
        wanted = group_ids.numpy()
        found: dict[int, str] = {}
        for batch in self.records.iterate_columns(("group_key", "group_id")):
            keys = np.asarray(batch.column(0))
            rows = np.flatnonzero(np.isin(keys, wanted)).tolist()
            found.update((int(keys[row]), batch.column(1)[row].as_py()) for row in rows)
        return [found[int(group_id)] for group_id in wanted]

    def read_pairs(
        self, items: Array, numbers: Array, times: InputTimes | None = None
    ) -> dict[str, Tensor]:
        times = times or InputTimes()
        with times.measure("tokenize" if self.caption_store is None else "read"):
            captions = self._read_captions(items, numbers)
        stored: dict[str, Tensor] = {}
        if self.image_store is not None:
            name = "teacher_embeds" if self.is_teacher else "vision_embeds"
            with times.measure("read"):
                stored[name] = self._read_stored(self.image_store, self.image_rows(items), items)
        if not self.reads_images:
            return {**captions, **stored}
        with times.measure("decode"):
            images = [open_image(image) for image in self.records.select(items).iterate_images()]
            return {**captions, **stored, **self.processor(images=images)}

    def caption_rows(self, items: Array, numbers: Array) -> Array:
        assert self.caption_store is not None
        return self.caption_store.rows_at(_look_up(self._caption_items, items), numbers)

    def image_rows(self, items: Array) -> Array:
        assert self.image_store is not None
        stored = _look_up(self._image_items, items)
        return self.image_store.rows_at(stored, np.zeros_like(stored))

    def _read_captions(self, items: Array, numbers: Array) -> dict[str, Tensor]:
        if self.caption_store is not None:
            rows = self.caption_rows(items, numbers)
            return {"caption_embeds": self._read_stored(self.caption_store, rows, items)}
        return dict(self.processor(text=self._take_texts(items, numbers)))

    def count_texts(self, items: Array) -> tuple[Array, Array]:
        """Count short and long captions of items, to which views belong."""
        short, long = self.records.count_texts(items)
        if self._stored_long is not None:
            long = self._stored_long[_look_up(self._caption_items, items)]
        elif self.sentence_views:
            long = np.array(list(map(len, self._list_texts(items)))) - short
        return short, long

    def _take_texts(self, items: Array, numbers: Array) -> list[str]:
        return list(map(getitem, self._list_texts(items), numbers.tolist()))

    def _list_texts(self, items: Array) -> list[tuple[str, ...]]:
        """List the texts of each item by their numbers."""
        captions = self.records.take(items, CAPTION_COLUMNS)
        return [(*short, *with_views(long, self.sentence_views)) for short, long in captions]

    def _read_stored(self, store: EmbeddingStore, rows: Array, items: Array) -> Tensor:
        return require_directions(
            store.read(rows), store, lambda zeros: self.records.take(items[zeros], ("name", "lang"))
        )


class DecodedSample(NamedTuple):
    """A record of a stream, its image as a PIL image, and the seconds that decoding took."""

    record: CaptionedImage
    image: Any
    seconds: float


def decode_sample(record: CaptionedImage) -> DecodedSample:
    """Decode a record's image before it is in a batch, so that a broken one can be replaced."""
    begin = time.perf_counter()
    image = load_images(open_image(record.image))
    return DecodedSample(record, image, time.perf_counter() - begin)


@dataclass(eq=False)
class AlignmentStream:
    """Makes batches of a stream's records, as `AlignmentDataset` does of an index.

    The caption store may have other records, too.
    """

    stream: RecordStream
    processor: LLM2CLIPProcessor
    _: KW_ONLY
    caption_store: EmbeddingStore | None = None
    long_caption_ratio: float = 0.5
    caption_noise: float = 0.0
    sentence_views: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.caption_store is not None:
            self.sentence_views = read_num_views(self.caption_store.manifest.plan)
            keys = self.caption_store.keys
            self._order = np.argsort(keys)
            self._keys = keys[self._order]
            self._text_keys = np.concatenate([*self.caption_store.iterate_numbers("text_key")])

    def collate(self, samples: Sequence[DecodedSample]) -> dict[str, Tensor]:
        records = own = [sample.record for sample in samples]
        if num_views := self.sentence_views:
            viewed = (with_views(record.long_captions, num_views) for record in records)
            records = [replace(r, long_captions=v) for r, v in zip(records, viewed, strict=True)]
        keys = np.array([hash_identity(record.name, record.lang) for record in records])
        epochs = np.full(len(records), self.stream.epoch)
        counts = np.array([(len(r.captions), len(r.long_captions)) for r in records]).T
        numbers = sample_captions(
            *counts,
            long_caption_ratio=self.long_caption_ratio,
            seed=self.seed,
            epochs=epochs,
            items=keys,
        )
        texts = [
            (*record.captions, *record.long_captions)[number]
            for record, number in zip(records, numbers.tolist(), strict=True)
        ]
        times = InputTimes()
        with times.measure("tokenize" if self.caption_store is None else "read"):
            if self.caption_store is None:
                captions = dict(self.processor(text=texts))
            else:
                rows = self.caption_store.rows_at(self._find_items(own, keys), numbers)
                embeds = require_directions(
                    self.caption_store.read(rows),
                    self.caption_store,
                    lambda zeros: [(records[n].name, records[n].lang) for n in zeros.tolist()],
                )
                captions = {"caption_embeds": embeds}
                if noise := self.caption_noise:
                    captions["caption_noise"] = _make_noise(
                        embeds, noise, self.seed, epochs, keys, _CAPTION_NOISE
                    )
        with times.measure("decode"):
            images = dict(self.processor(images=[sample.image for sample in samples]))
        times.add("decode", sum(sample.seconds for sample in samples))
        return {
            "group_ids": torch.tensor([hash_text(record.group_id) for record in records]),
            "text_keys": torch.tensor([hash_text(text) for text in texts]),
            INPUT_SECONDS: times.seconds,
            **captions,
            **images,
        }

    @property
    def has_noise(self) -> bool:
        """True where batches have noise on stored captions."""
        return bool(self.caption_noise and self.caption_store is not None)

    def find_group_names(self, group_ids: Tensor) -> list[str]:
        """Name groups by their hashes: a stream is not read again for the sake of an error."""
        return [f"(hash {group_id})" for group_id in group_ids.tolist()]

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


def _make_noise(
    embeds: Tensor, share: float, seed: int, epochs: Array, items: Array, side: int
) -> Tensor:
    """Sample noise on embeddings (B, D), whose standard deviation is a share of their length."""
    normal = sample_normal(seed, epochs, items, side, width=embeds.shape[1])
    return normal.mul_(share * embeds.shape[1] ** -0.5 * embeds.norm(dim=1, keepdim=True))


def list_pairs(counts: Array, items: Array) -> tuple[Array, Array]:
    """List the captions of some items: the item of each, and its number in it."""
    starts = np.cumsum(counts) - counts
    numbers = np.arange(counts.sum()) - np.repeat(starts, counts)
    return np.repeat(items, counts), numbers


def _look_up(numbers: Array | None, items: Array) -> Array:
    return items if numbers is None else numbers[items]
