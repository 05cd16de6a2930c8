"""Images and captions of a batch, decoded and tokenized, or read from stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...data.data_hashes import hash_image_sizes, hash_records
from ...data.embedding_store import EmbeddingStore
from ...data.image_sources import open_image
from ...data.records import CaptionedImage
from ...processing_llm2clip import LLM2CLIPProcessor
from .sampling import sample_caption, sample_normal

_NAMES_SHOWN = 5


class AlignmentDataset(Dataset[Any]):
    """Records of a dataset, each an image and its captions; returns whole batches.

    Args:
        records: At least one.
        processor: The model's.
        caption_store: Caption embeddings; None for tokens.
        image_store: Image embeddings; None for pixels.
        long_caption_ratio: As `sample_caption` takes it.
        image_noise: Standard deviation of the noise on stored image embeddings of training
            batches, as a share of their length.
        caption_noise: The same on stored caption embeddings.
        seed: Of captions and noise.

    Raises:
        ValueError: A store has other records, or was made from other captions or images, or an
            image is missing; with counts and the first names.
    """

    def __init__(
        self,
        records: Sequence[CaptionedImage],
        processor: LLM2CLIPProcessor,
        *,
        caption_store: EmbeddingStore | None = None,
        image_store: EmbeddingStore | None = None,
        long_caption_ratio: float = 0.5,
        image_noise: float = 0.0,
        caption_noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.image_noise = image_noise
        self.caption_noise = caption_noise
        self.records = records
        self.processor = processor
        self.caption_store = caption_store
        self.image_store = image_store
        self.long_caption_ratio = long_caption_ratio
        self.seed = seed
        numbers = {
            group_id: i for i, group_id in enumerate(dict.fromkeys(r.group_id for r in records))
        }
        self.group_ids = torch.tensor([numbers[record.group_id] for record in records])
        self.group_names = list(numbers)
        self._caption_items = None if caption_store is None else pair_items(records, caption_store)
        self._image_items = None if image_store is None else pair_items(records, image_store)
        if caption_store is not None and self._caption_items is not None:
            _require_same_counts(records, caption_store, self._caption_items)
            _require_same_texts(records, caption_store, self._caption_items)
        if image_store is None:
            _require_images(records)
        elif self._image_items is not None:
            _require_same_images(records, image_store, self._image_items)

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, samples: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Return a batch for (epoch, item) pairs: inputs of `AlignmentModel`, and `group_ids`."""
        items = [item for _, item in samples]
        batch = self.read_pairs([(item, self._sample(epoch, item)) for epoch, item in samples])
        for name, noise, side in (
            ("vision_embeds", self.image_noise, 2),
            ("caption_embeds", self.caption_noise, 3),
        ):
            if noise and name in batch:
                batch[name] = _add_noise(batch[name], noise, samples, seed=self.seed, side=side)
        return {"group_ids": self.group_ids[items], **batch}

    @property
    def is_stored(self) -> bool:
        """Whether both embeddings are stored, so that no tower runs."""
        return self.caption_store is not None and self.image_store is not None

    def list_captions(self, item: int) -> list[tuple[bool, int]]:
        """List all captions of an item.

        Args:
            item: Number of the record.

        Returns:
            Whether each is a long one, and its number among the long or short ones.
        """
        record = self.records[item]
        short = [(False, number) for number in range(len(record.captions))]
        return short + [(True, number) for number in range(len(record.long_captions))]

    def read_pairs(self, pairs: Sequence[tuple[int, tuple[bool, int]]]) -> dict[str, Tensor]:
        """Read items, each with one of its captions.

        Args:
            pairs: Number of a record, and a caption as `list_captions` returns it.

        Returns:
            Inputs of `AlignmentModel`.
        """
        items = [item for item, _ in pairs]
        return {
            **self._read_captions(items, [caption for _, caption in pairs]),
            **self._read_images(items),
        }

    def caption_rows(self, item: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the rows of all captions of an item in the store.

        Args:
            item: Number of the record.
        """
        assert self.caption_store is not None and self._caption_items is not None
        stored = self._caption_items[item]
        rows = [self.caption_store.rows_of(stored, long=long) for long in (False, True)]
        return np.concatenate(rows)

    def image_row(self, item: int) -> int:
        """Return the row of an item's image in the store.

        Args:
            item: Number of the record.
        """
        assert self.image_store is not None and self._image_items is not None
        return int(self.image_store.rows_of(self._image_items[item])[0])

    def _sample(self, epoch: int, item: int) -> tuple[bool, int]:
        record = self.records[item]
        return sample_caption(
            len(record.captions),
            len(record.long_captions),
            long_caption_ratio=self.long_caption_ratio,
            seed=self.seed,
            epoch=epoch,
            item=item,
        )

    def _read_captions(
        self, items: Sequence[int], captions: Sequence[tuple[bool, int]]
    ) -> dict[str, Tensor]:
        sampled = list(zip(items, captions, strict=True))
        if self.caption_store is not None and self._caption_items is not None:
            rows = [
                self.caption_store.rows_of(self._caption_items[item], long=is_long)[number]
                for item, (is_long, number) in sampled
            ]
            return {"caption_embeds": self.caption_store.read(np.array(rows))}
        texts = [
            (self.records[item].long_captions if is_long else self.records[item].captions)[number]
            for item, (is_long, number) in sampled
        ]
        return dict(self.processor(text=texts))

    def _read_images(self, items: Sequence[int]) -> dict[str, Tensor]:
        if self.image_store is not None:
            rows = np.array([self.image_row(item) for item in items])
            return {"vision_embeds": self.image_store.read(rows)}
        images = [open_image(self.records[item].image) for item in items]
        return dict(self.processor(images=images))


def _add_noise(
    embeds: Tensor, noise: float, samples: Sequence[tuple[int, int]], *, seed: int, side: int
) -> Tensor:
    """Add noise to stored embeddings, (B, D), of about this share of their length."""
    width = embeds.shape[1]
    normal = sample_normal([(seed, epoch, item, side) for epoch, item in samples], width)
    length = embeds.norm(dim=1, keepdim=True)
    moved: Tensor = embeds + noise * width**-0.5 * length * normal
    return moved


def keep_batch(batch: Any) -> Any:
    """Collate nothing: the dataset returns whole batches. A function, so that it can be pickled.

    Args:
        batch: From `AlignmentDataset`.
    """
    return batch


def pair_items(records: Sequence[CaptionedImage], store: EmbeddingStore) -> list[int]:
    """Find each record in a store by name and language.

    Args:
        records: The data.
        store: A store of the same data.

    Returns:
        Numbers of the store's items, in the order of the records.

    Raises:
        ValueError: Either has a record that the other lacks.
    """
    stored = {pair: i for i, pair in enumerate(zip(store.names, store.langs, strict=True))}
    wanted = [(record.name, record.lang) for record in records]
    errors = []
    if lacking := [pair for pair in wanted if pair not in stored]:
        errors.append(f"{len(lacking)} records are not in the store: {_show(lacking)}")
    if extra := sorted(set(stored) - set(wanted)):
        errors.append(f"{len(extra)} of its items are not in the data: {_show(extra)}")
    if errors:
        raise ValueError(
            f"{store.folder} is of other data: {'; '.join(errors)}. Extract this data again."
        )
    return [stored[pair] for pair in wanted]


def _require_images(records: Sequence[CaptionedImage]) -> None:
    lacking = [(record.name, record.lang) for record in records if record.image is None]
    if lacking:
        raise ValueError(
            f"{len(lacking)} records have no image: {_show(lacking)}. Give the folder of "
            "images, or a store of image embeddings."
        )


def _require_same_counts(
    records: Sequence[CaptionedImage], store: EmbeddingStore, items: Sequence[int]
) -> None:
    differing = [
        (record.name, record.lang)
        for record, item in zip(records, items, strict=True)
        if len(store.rows_of(item)) != len(record.captions)
        or len(store.rows_of(item, long=True)) != len(record.long_captions)
    ]
    if differing:
        raise ValueError(
            f"{len(differing)} records have other numbers of captions than {store.folder}: "
            f"{_show(differing)}. The captions changed since; extract them again."
        )


def _require_same_texts(
    records: Sequence[CaptionedImage], store: EmbeddingStore, items: Sequence[int]
) -> None:
    """Compare hashes, which do not show what differs."""
    stored, now = store.manifest.plan.get("data"), _hash_as_stored(records, store, items)
    if stored != now:
        raise ValueError(
            f"{store.folder} was made from other captions of these images (data {stored} then, "
            f"{now} now). Extract these again, or give the captions that the store was made from."
        )


def _require_same_images(
    records: Sequence[CaptionedImage], store: EmbeddingStore, items: Sequence[int]
) -> None:
    """Compare the images themselves, by name and size, whatever their captions are now.

    Where the images are not there, only the hash of the whole data, captions included, is left.
    """
    stored = store.manifest.plan.get("images")
    if stored is not None and all(record.image is not None for record in records):
        compared, now = "images", hash_image_sizes(records)
    else:
        compared, stored = "data", store.manifest.plan.get("data")
        now = _hash_as_stored(records, store, items)
    if stored != now:
        raise ValueError(
            f"{store.folder} was made from other images of these names ({compared} {stored} then, "
            f"{now} now). Extract these again (--modality image), or give the data that the "
            "store was made from."
        )


def _hash_as_stored(
    records: Sequence[CaptionedImage], store: EmbeddingStore, items: Sequence[int]
) -> str:
    """`hash_records` in the store's order and with its group ids."""
    of_item = dict(zip(items, records, strict=True))
    return hash_records(
        [replace(of_item[i], group_id=group_id) for i, group_id in enumerate(store.group_ids)]
    )


def _show(pairs: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(f"{name} ({lang})" for name, lang in pairs[:_NAMES_SHOWN])
    return shown + (", …" if len(pairs) > _NAMES_SHOWN else "")
