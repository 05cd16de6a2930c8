"""A stream of records as batches, its held-out images, and captions joined from a store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...configs.align_config import AlignConfig
from ...data.images.image_sources import open_image
from ...data.records.record_columns import hash_identity, hash_text
from ...data.records.records import CaptionedImage
from ...data.store.embedding_store import EmbeddingStore
from ...data.streams.record_streams import RecordStream
from ...image_loading_llm2clip import load_images
from ...processing_llm2clip import LLM2CLIPProcessor
from .held_out import count_held_out, require_negatives
from .sampling import Array, sample_captions
from .step_times import INPUT_PARTS, measure_input, no_input_seconds
from .store_matching import require_directions

_NAMES_SHOWN = 5


class DecodedSample(NamedTuple):
    """A record of a stream whose image is decoded.

    Attributes:
        record: Of the stream.
        image: Its pixels, a PIL image.
        seconds: That decoding took.
    """

    record: CaptionedImage
    image: Any
    seconds: float


def decode_sample(record: CaptionedImage) -> DecodedSample:
    """Decode the image of a record, before it is in a batch: so a broken one can be replaced."""
    begin = time.perf_counter()
    image = load_images(open_image(record.image))
    return DecodedSample(record, image, time.perf_counter() - begin)


class AlignmentStream:
    """Makes batches of the records of a stream, decoded and tokenized, or joined from a store.

    Args:
        stream: The records.
        processor: The model's.
        caption_store: Caption embeddings of these records, and perhaps others; None for tokens.
        long_caption_ratio: As `sample_captions` takes it.
        seed: Of captions.
    """

    image_store = None
    is_stored = False

    def __init__(
        self,
        stream: RecordStream,
        processor: LLM2CLIPProcessor,
        *,
        caption_store: EmbeddingStore | None = None,
        long_caption_ratio: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.stream = stream
        self.processor = processor
        self.caption_store = caption_store
        self.long_caption_ratio = long_caption_ratio
        self.seed = seed
        if caption_store is not None:
            keys = caption_store.keys
            self._order = np.argsort(keys)
            self._keys = keys[self._order]
            self._counts = caption_store.count_rows()

    def collate(self, samples: Sequence[DecodedSample]) -> dict[str, Tensor]:
        """Make a batch, as `AlignmentDataset` does."""
        records = [sample.record for sample in samples]
        keys = np.array([hash_identity(record.name, record.lang) for record in records])
        num_short = np.array([len(record.captions) for record in records])
        num_long = np.array([len(record.long_captions) for record in records])
        numbers = sample_captions(
            num_short,
            num_long,
            long_caption_ratio=self.long_caption_ratio,
            seed=self.seed,
            epochs=np.full(len(records), self.stream.epoch),
            items=keys,
        )
        texts = [
            (*record.captions, *record.long_captions)[number]
            for record, number in zip(records, numbers.tolist(), strict=True)
        ]
        seconds = no_input_seconds()
        with measure_input(seconds, "tokenize" if self.caption_store is None else "read"):
            captions = self._read_captions(records, keys, num_short, num_long, numbers, texts)
        with measure_input(seconds, "decode"):
            images = dict(self.processor(images=[sample.image for sample in samples]))
        seconds[INPUT_PARTS.index("decode")] += sum(sample.seconds for sample in samples)
        return {
            "group_ids": torch.tensor([hash_text(record.group_id) for record in records]),
            "text_keys": torch.tensor([hash_text(text) for text in texts]),
            "input_seconds": seconds,
            **captions,
            **images,
        }

    def _read_captions(
        self,
        records: Sequence[CaptionedImage],
        keys: Array,
        num_short: Array,
        num_long: Array,
        numbers: Array,
        texts: list[str],
    ) -> dict[str, Tensor]:
        if self.caption_store is not None:
            items = self._find_items(records, keys, num_short, num_long)
            rows = self.caption_store.rows_at(items, numbers)
            embeds = require_directions(
                self.caption_store.read(rows),
                self.caption_store,
                lambda zeros: [(records[row].name, records[row].lang) for row in zeros.tolist()],
            )
            return {"caption_embeds": embeds}
        return dict(self.processor(text=texts))

    def find_group_names(self, group_ids: Tensor) -> list[str]:
        """Name groups by their hashes: a stream is not read again for the sake of an error."""
        return [f"(hash {group_id})" for group_id in group_ids.tolist()]

    def _find_items(
        self,
        records: Sequence[CaptionedImage],
        keys: Array,
        num_short: Array,
        num_long: Array,
    ) -> Array:
        """Find records in the store by name and language."""
        assert self.caption_store is not None
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        items: Array = self._order[places]
        short, long = (counts[items] for counts in self._counts)
        differs = (self._keys[places] != keys) | (short != num_short) | (long != num_long)
        if differs.any():
            lacking = [records[row] for row in np.flatnonzero(differs).tolist()]
            names = ", ".join(f"{r.name} ({r.lang})" for r in lacking[:_NAMES_SHOWN])
            raise ValueError(
                f"{len(lacking)} of {len(records)} records of a batch are not in "
                f"{self.caption_store.folder}, or with another number of captions: {names}. Give "
                "the store of these records, or text_training=frozen-online."
            )
        return items


def check_stream(config: AlignConfig, *, has_image_store: bool) -> None:
    """Refuse what a stream cannot do, before anything is read."""
    errors = []
    if config.max_steps is None:
        errors.append("a stream has no known length: give max_steps (--max-steps)")
    if has_image_store:
        errors.append("a stream brings its images: leave the image_store out")
    if config.projection_init == "cca":
        errors.append("projection_init=cca needs both stores: leave it out")
    if config.refit:
        errors.append("a stream is not read twice: leave refit out")
    if errors:
        raise ValueError("; ".join(errors) + ".")


def hold_out_of_stream(
    stream: RecordStream, ratio: float, folder: Path
) -> tuple[list[CaptionedImage], frozenset[str]]:
    """Hold out the first groups of a stream's shards; every process finds the same.

    The number of all images is estimated from the first shard. A group with an image that cannot be
    decoded is not held out, so that training comes to the image and counts it as lost.
    """
    if not ratio:
        return [], frozenset()
    records: list[CaptionedImage] = []
    groups: dict[str, None] = {}
    broken: set[str] = set()
    others: set[str] = set()
    wanted = None
    for number in range(len(stream.reader.shards)):
        found = stream.read_shard(number)
        if wanted is None:
            in_first = len({record.group_id for record in found})
            wanted = count_held_out(in_first * len(stream.reader.shards), ratio)
            if wanted < 2:
                raise ValueError(
                    f"The stream has about {in_first * len(stream.reader.shards)} groups, too few "
                    "to hold out two of them. Give more images, or held_out_ratio=0."
                )
            require_negatives(in_first * len(stream.reader.shards) - wanted, wanted)
        for record in found:
            group = record.group_id
            if group in broken:
                continue
            if group not in groups and len(groups) >= wanted:
                others.add(group)
                continue
            if _can_be_decoded(record):
                groups[group] = None
                records.append(record)
            else:
                broken.add(group)
                groups.pop(group, None)
        if len(groups) >= wanted and len(others) > 1:
            break
    else:
        require_negatives(len(others), len(groups))
    held = [record for record in records if record.group_id in groups]
    return [_write_image(record, folder, n) for n, record in enumerate(held)], frozenset(groups)


def _can_be_decoded(record: CaptionedImage) -> bool:
    try:
        decode_sample(record)
    except ValueError:
        return False
    return True


def _write_image(record: CaptionedImage, folder: Path, number: int) -> CaptionedImage:
    assert record.image is not None
    file = folder / f"{number:05d}"
    file.write_bytes(record.image.read_bytes())
    return replace(record, image=file)
