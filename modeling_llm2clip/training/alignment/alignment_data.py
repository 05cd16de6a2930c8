"""Make batches of images and captions, decoded and tokenized or read from stores.

Records come from a random-access dataset or from a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from functools import partial
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..._suggestions import list_first
from ...configs.align_config import AlignConfig
from ...data.captions.sentence_views import read_num_views, with_views
from ...data.images.image_sources import open_image
from ...data.records.data_hashes import hash_own_texts
from ...data.records.record_columns import CAPTION_COLUMNS, hash_identity, hash_text, make_text_keys
from ...data.records.record_table import Array, RecordTable, require_images
from ...data.records.records import CaptionedImage
from ...data.store.embedding_store import EmbeddingStore
from ...data.streams.record_streams import RecordStream
from ...encoding.batches import (
    PreparedImages,
    find_min_jpeg_side,
    join_images,
    prepare_images,
)
from ...encoding.devices import count_free_bytes
from ...encoding.pixel_normalization import find_normalization
from ...image_loading_llm2clip import load_images
from ...processing_llm2clip import LLM2CLIPProcessor
from .align_checks import (
    have_directions,
    pair_items,
    require_directions,
    require_same_images,
    require_same_texts,
)
from .sampling import Samples, choose_captions, draw_samples

Identify = Callable[[Array], Sequence[tuple[str, ...]]]
"""Maps row numbers within a batch to the names of their records."""
ImageTransform = Callable[[Image.Image], Image.Image]
"""Transforms a decoded image before the image processor; draws random numbers from torch."""
_BYTES_AT_ONCE = 2**26
_SHARE_OF_FREE_MEMORY = 0.5  # the rest is for weights, optimizer state and activations


class StoredSide(NamedTuple):
    """Names of the batch entries for one kind of stored embeddings.

    Attributes:
        embeds: (B, width) embeddings.
        rows: (B,) row numbers, instead of embeddings, if all rows are already on the device.
        noise: (B, width) noise to add to the embeddings; None for embeddings without noise.
    """

    embeds: str
    rows: str
    noise: str | None = None


VISION = StoredSide("vision_embeds", "vision_rows", "vision_noise")
CAPTION = StoredSide("caption_embeds", "caption_rows", "caption_noise")
TEACHER = StoredSide("teacher_embeds", "teacher_rows")


class StoredRows:
    """Rows of a store, each checked when it is first read.

    Attributes:
        store: The store.
        resident: All rows on the training device in their stored dtype; None if batches read
            their rows from the files.
    """

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self.resident: Tensor | None = None
        self._is_checked = np.zeros(store.manifest.num_rows, np.bool_)

    def copy_to(self, device: torch.device, *, num_reads: int) -> None:
        """Copy all rows to a device if they fit in half of its free memory.

        Args:
            device: Training device.
            num_reads: Number of rows that training will read. If the store has more rows, nothing
                is copied.
        """
        manifest = self.store.manifest
        num_bytes = manifest.num_rows * manifest.row_bytes
        fits = num_bytes <= _SHARE_OF_FREE_MEMORY * count_free_bytes(device)
        if self.resident is not None or not fits or num_reads < manifest.num_rows:
            return
        num_at_once = max(1, _BYTES_AT_ONCE // manifest.row_bytes)
        for rows in torch.arange(manifest.num_rows).split(num_at_once):
            embeds = self.store.read(rows, dtype=None)
            if self.resident is None:
                shape = (manifest.num_rows, manifest.dim)
                self.resident = torch.empty(shape, dtype=embeds.dtype, device=device)
            self.resident[rows[0] : rows[-1] + 1] = embeds
            # A broken row is refused when a batch contains it, to name its record.
            self._is_checked[rows.numpy()] = have_directions(embeds)

    def read(
        self, rows: Array, identify: Identify, *, dtype: torch.dtype | None = torch.float32
    ) -> Tensor:
        """Read rows, (B, D), like `EmbeddingStore.read`; refuse broken rows on first read."""
        embeds = self.store.read(rows, dtype=dtype)
        new = np.flatnonzero(~self._is_checked[rows])
        if len(new):
            some = embeds if len(new) == len(rows) else embeds[new]
            require_directions(some, self.store, lambda broken: identify(new[broken]))
            self._is_checked[rows] = True
        return embeds

    def require_checked(self, rows: Array, identify: Identify) -> Tensor:
        """Return row numbers as a tensor, (B,) int64; refuse broken rows."""
        if not self._is_checked[rows].all():
            self.read(rows, identify)
        return torch.from_numpy(rows)


def decode(image: Any, *, min_jpeg_side: int | None = None) -> Any:
    """Decode an image, so a batch need not hold all of its images before they are resized."""
    return load_images(open_image(image, min_jpeg_side=min_jpeg_side))


class _Sampled:
    """Base of datasets and streams: makes model inputs from batches, adding noise as configured."""

    config: AlignConfig
    processor: LLM2CLIPProcessor
    caption_store: EmbeddingStore | None
    image_store: EmbeddingStore | None
    image_transform: ImageTransform | None
    reads_images: bool
    _stored: dict[StoredSide, StoredRows]
    _prepare: partial[PreparedImages]

    @property
    def is_stored(self) -> bool:
        return self.caption_store is not None and not self.reads_images

    def _choose_preparation(self) -> partial[PreparedImages]:
        """Return the function that decodes images one by one, as uint8 if the model normalizes."""
        decoding = self.config.jpeg_decoding
        least = find_min_jpeg_side(self.processor.image_processor, decoding)
        return partial(
            prepare_images,
            self.processor,
            open_image=partial(decode, min_jpeg_side=least),
            normalization=find_normalization(self.processor, torch.device("cpu")),
        )

    def _prepare_images(self, images: Sequence[Any], transform_seed: int | None) -> PreparedImages:
        """Prepare images; with a seed, `image_transform` draws from a generator with this seed."""
        transform = self.image_transform
        if transform is None or transform_seed is None:
            return self._prepare(images)
        open_image = self._prepare.keywords["open_image"]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(transform_seed)
            return self._prepare(images, open_image=lambda image: transform(open_image(image)))

    def make_inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Make model inputs from a batch, on the device of its tensors.

        Resident rows are gathered, stored embeddings are cast to float32, and the seed of the
        batch is expanded to noise, (B, width), which the model adds to the embeddings.
        """
        inputs, generator = dict(batch), None
        seed = inputs.pop("noise_seed")
        shares = {VISION: self.config.image_noise, CAPTION: self.config.caption_noise}
        for side, stored in self._stored.items():
            if (rows := inputs.pop(side.rows, None)) is not None:
                assert stored.resident is not None
                inputs[side.embeds] = stored.resident.index_select(0, rows)
            embeds = inputs[side.embeds] = inputs[side.embeds].float()
            if side.noise is not None and (share := shares[side]):
                generator = generator or torch.Generator(embeds.device).manual_seed(seed)
                noise = torch.randn(embeds.shape, generator=generator, device=embeds.device)
                scale = share * embeds.shape[1] ** -0.5 * embeds.norm(dim=1, keepdim=True)
                inputs[side.noise] = noise.mul_(scale)
        return inputs


@dataclass(eq=False)
class AlignmentDataset(_Sampled, Dataset[Any]):
    """Records of a dataset, each an image and its captions; returns whole batches.

    The captions of a record are numbered: short captions first, then long captions, then the
    sentence views of the long captions if the caption store has such views.

    With `is_part`, the stores may hold additional records. If the vision tower is trained, its
    images are decoded, and the image store holds the distillation targets from the frozen tower.
    """

    data: InitVar[Sequence[CaptionedImage]]
    processor: LLM2CLIPProcessor
    config: AlignConfig = field(default_factory=AlignConfig)
    _: KW_ONLY
    caption_store: EmbeddingStore | None = None
    image_store: EmbeddingStore | None = None
    image_transform: ImageTransform | None = None
    is_part: InitVar[bool] = False

    def __post_init__(self, data: Sequence[CaptionedImage], is_part: bool) -> None:
        self.records = RecordTable.from_records(data)
        self.reads_images = self.image_store is None or self.config.vision_training != "frozen"
        # Item number of each record in a store; None if the numbers are identical.
        self._caption_items: Array | None = None
        self._image_items: Array | None = None
        self._stored_long: Array | None = None  # count of long captions and views per stored item
        if (store := self.caption_store) is not None:
            self._caption_items = items = pair_items(self.records, store, is_part=is_part)
            require_same_texts(self.records, store, items)
            if read_num_views(store.manifest.plan):
                _, self._stored_long = store.count_rows()
        if self.reads_images:
            require_images(self.records)
            self._prepare = self._choose_preparation()
        if self.image_store is not None:
            self._image_items = pair_items(self.records, self.image_store)
            require_same_images(self.records, self.image_store, self._image_items)
        image_side = TEACHER if self.reads_images else VISION
        stores = {CAPTION: self.caption_store, image_side: self.image_store}
        self._stored = {
            side: StoredRows(store) for side, store in stores.items() if store is not None
        }

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, samples: Samples) -> dict[str, Any]:
        """Return a batch for `make_inputs`."""
        items, draws, noise_seed = samples
        numbers = choose_captions(
            *self.count_texts(items), draws, long_caption_ratio=self.config.long_caption_ratio
        )
        return {
            "group_ids": self.read_group_ids(items),
            "text_keys": self.read_text_keys(items, numbers),
            "noise_seed": noise_seed,
            **self.read_pairs(items, numbers, as_stored=True, transform_seed=noise_seed),
        }

    def read_group_ids(self, items: Array) -> Tensor:
        """Return the hash of each item's group, (B,) int64."""
        return torch.from_numpy(self.records.read_numbers("group_key", items))

    def read_text_keys(self, items: Array, numbers: Array) -> Tensor:
        """Return a key per caption, (B,) int64; identical captions have the same key."""
        if (store := self.caption_store) is None or self._stored_long is None:
            return torch.from_numpy(self.records.read_text_keys(items, numbers))
        return torch.from_numpy(store.text_keys_at(_look_up(self._caption_items, items), numbers))

    def read_pairs(
        self,
        items: Array,
        numbers: Array,
        *,
        as_stored: bool = False,
        transform_seed: int | None = None,
    ) -> dict[str, Tensor]:
        """Read pairs; embeddings are float32 or, with `as_stored`, as `make_inputs` expects.

        Images are only transformed, as for training, if there is a seed.
        """
        batch: dict[str, Tensor] = {}
        if self.caption_store is None:
            batch |= self.processor(text=self._take_texts(items, numbers))
        for side, stored in self._stored.items():
            rows = self.caption_rows(items, numbers) if side == CAPTION else self.image_rows(items)
            identify = partial(self._identify, items)
            if stored.resident is not None and as_stored:
                batch[side.rows] = stored.require_checked(rows, identify)
            else:
                batch[side.embeds] = stored.read(
                    rows, identify, dtype=None if as_stored else torch.float32
                )
        if self.reads_images:
            images = list(self.records.select(items).iterate_images())
            batch |= self._prepare_images(images, transform_seed).inputs
        return batch

    def copy_stores(self, device: torch.device, *, num_reads: int) -> None:
        """Copy stores to a device if they fit; `make_inputs` then gathers rows on that device."""
        for stored in self._stored.values():
            stored.copy_to(device, num_reads=num_reads)

    def caption_rows(self, items: Array, numbers: Array) -> Array:
        assert self.caption_store is not None
        return self.caption_store.rows_at(_look_up(self._caption_items, items), numbers)

    def image_rows(self, items: Array) -> Array:
        assert self.image_store is not None
        stored = _look_up(self._image_items, items)
        return self.image_store.rows_at(stored, np.zeros_like(stored))

    def count_texts(self, items: Array) -> tuple[Array, Array]:
        """Count the short and long captions of each item; views count as long."""
        short, long = self.records.count_texts(items)
        if self._stored_long is not None:
            long = self._stored_long[_look_up(self._caption_items, items)]
        return short, long

    def _take_texts(self, items: Array, numbers: Array) -> list[str]:
        pairs = zip(self.records.take(items, CAPTION_COLUMNS), numbers.tolist(), strict=True)
        return [(*short, *long)[number] for (short, long), number in pairs]

    def _identify(self, items: Array, places: Array) -> list[tuple[str, ...]]:
        return self.records.take(items[places], ("name", "lang"))


@dataclass(eq=False)
class AlignmentStream(_Sampled):
    """Makes batches from a stream's records, as `AlignmentDataset` does from a dataset.

    The caption store may also hold other records.
    """

    image_store, reads_images = None, True

    stream: RecordStream
    processor: LLM2CLIPProcessor
    config: AlignConfig = field(default_factory=AlignConfig)
    _: KW_ONLY
    caption_store: EmbeddingStore | None = None
    image_transform: ImageTransform | None = None

    def __post_init__(self) -> None:
        self._prepare = self._choose_preparation()
        self.num_views = 0
        self._stored = {}
        if self.caption_store is not None:
            self._stored[CAPTION] = StoredRows(self.caption_store)
            self.num_views = read_num_views(self.caption_store.manifest.plan)
            keys = self.caption_store.keys
            self._order = np.argsort(keys)
            self._keys = keys[self._order]
            self._text_keys = np.concatenate([*self.caption_store.iterate_numbers("text_key")])

    def prepare_sample(self, record: CaptionedImage) -> tuple[CaptionedImage, PreparedImages]:
        """Prepare a record's image before batching, so a broken image can be replaced."""
        seed = None
        if self.image_transform is not None:
            seed = self._draw(np.array([hash_identity(record.name, record.lang)])).noise_seed
        return record, self._prepare_images([record.image], seed)

    def collate(self, samples: Sequence[tuple[CaptionedImage, PreparedImages]]) -> dict[str, Any]:
        """Collate records and their prepared images into a batch for `make_inputs`."""
        records = [record for record, _ in samples]
        listed = [(*r.captions, *with_views(r.long_captions, self.num_views)) for r in records]
        keys = np.array([hash_identity(record.name, record.lang) for record in records])
        _, draws, noise_seed = self._draw(keys)
        num_short = np.array([len(record.captions) for record in records])
        num_long = np.array(list(map(len, listed))) - num_short
        numbers = choose_captions(
            num_short, num_long, draws, long_caption_ratio=self.config.long_caption_ratio
        )
        texts: list[str] = list(map(getitem, listed, numbers.tolist()))
        batch = {
            "group_ids": torch.tensor([hash_text(record.group_id) for record in records]),
            "text_keys": torch.tensor([hash_text(text) for text in texts]),
            "noise_seed": noise_seed,
            **join_images(list(enumerate(images for _, images in samples))).inputs,
        }
        if (store := self.caption_store) is None:
            return batch | dict(self.processor(text=texts))
        rows = store.rows_at(self._find_items(records, keys), numbers)
        batch[CAPTION.embeds] = self._stored[CAPTION].read(
            rows,
            lambda broken: [(records[n].name, records[n].lang) for n in broken.tolist()],
            dtype=None,
        )
        return batch

    def _draw(self, keys: Array) -> Samples:
        # A stream does not count steps, but each record begins at most one batch per epoch.
        first = int(keys.view(np.uint64)[0])
        return draw_samples(keys, self.stream.epoch, first, seed=self.config.seed)

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
                f"{self.caption_store.folder}, or have other captions there: {names}. Pass the "
                "store of these records, or set text_training=frozen-online."
            )
        return items


def make_random_crop(processor: LLM2CLIPProcessor, min_area: float) -> ImageTransform:
    """Return upstream's augmentation (eva_clip/transform.py).

    Crops get the size that the image processor resizes to, so it has nothing to resize. A center
    crop of its own still applies.
    """
    from torchvision.transforms import (  # type: ignore[import-untyped]
        InterpolationMode,
        RandomResizedCrop,
    )

    size = dict(getattr(processor.image_processor, "size", None) or {})
    sides = [size.get(side) or size.get("shortest_edge") for side in ("height", "width")]
    if None in sides:
        raise ValueError(
            f"min_crop_area={min_area}: the model's image processor has no fixed size ({size}). "
            "Leave min_crop_area out."
        )
    return RandomResizedCrop(  # type: ignore[no-any-return]
        sides, (min_area, 1.0), interpolation=InterpolationMode.BICUBIC
    )


def list_pairs(counts: Array, items: Array) -> tuple[Array, Array]:
    """List all captions of some items: each caption's item, and its number within the item."""
    starts = np.cumsum(counts) - counts
    return np.repeat(items, counts), np.arange(counts.sum()) - np.repeat(starts, counts)


def _look_up(numbers: Array | None, items: Array) -> Array:
    return items if numbers is None else numbers[items]
