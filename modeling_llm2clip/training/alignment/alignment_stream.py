"""A stream of records as batches, its held-out images, and captions joined from a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...configs.align_config import AlignConfig
from ...data.images.image_sources import open_image
from ...data.records.record_columns import hash_identity, hash_text
from ...data.records.records import CaptionedImage
from ...data.store.embedding_store import EmbeddingStore
from ...data.streams.record_streams import RecordStream
from ...processing_llm2clip import LLM2CLIPProcessor
from .held_out import count_held_out
from .sampling import Array, sample_captions
from .step_times import measure_input, no_input_seconds

_NAMES_SHOWN = 5


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

    def collate(self, records: Sequence[CaptionedImage]) -> dict[str, Tensor]:
        """Make a batch, as `AlignmentDataset` does.

        Args:
            records: Of the stream.

        Raises:
            ValueError: An image cannot be decoded, or the store lacks a record or has another
                number of captions for it; it is named.
        """
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
        seconds = no_input_seconds()
        with measure_input(seconds, "tokenize" if self.caption_store is None else "read"):
            captions = self._read_captions(records, keys, num_short, num_long, numbers)
        with measure_input(seconds, "decode"):
            images = dict(self.processor(images=[open_image(r.image) for r in records]))
        group_ids = torch.tensor([hash_text(record.group_id) for record in records])
        return {"group_ids": group_ids, "input_seconds": seconds, **captions, **images}

    def _read_captions(
        self,
        records: Sequence[CaptionedImage],
        keys: Array,
        num_short: Array,
        num_long: Array,
        numbers: Array,
    ) -> dict[str, Tensor]:
        if self.caption_store is not None:
            items = self._find_items(records, keys, num_short, num_long)
            rows = self.caption_store.rows_at(items, numbers)
            return {"caption_embeds": self.caption_store.read(rows)}
        texts = [
            (*record.captions, *record.long_captions)[number]
            for record, number in zip(records, numbers.tolist(), strict=True)
        ]
        return dict(self.processor(text=texts))

    def find_group_names(self, group_ids: Tensor) -> list[str]:
        """Name groups by their hashes: a stream is not read again for the sake of an error.

        Args:
            group_ids: (B,) hashes.
        """
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
    """Refuse what a stream cannot do, before anything is read.

    Args:
        config: Options of the alignment.
        has_image_store: Whether an image store is given.

    Raises:
        ValueError: The steps are not given, an image store or a closed form is wanted, or noise.
    """
    errors = []
    if config.max_steps is None:
        errors.append("a stream has no known length: give max_steps (--max-steps)")
    if has_image_store:
        errors.append("a stream brings its images: leave the image_store out")
    if config.projection_init == "cca":
        errors.append("projection_init=cca needs both stores: leave it out")
    if errors:
        raise ValueError("; ".join(errors) + ".")


def hold_out_of_stream(
    stream: RecordStream, ratio: float, folder: Path
) -> tuple[list[CaptionedImage], frozenset[str]]:
    """Hold out the first groups of a stream's shards; every process finds the same.

    The number of all images is estimated from the first shard.

    Args:
        stream: The records.
        ratio: Share of the groups that is held out; 0 for none.
        folder: Gets the held-out images as files.

    Returns:
        Records with their images in `folder`, and their group ids, which training must not see.

    Raises:
        ValueError: There are too few groups to hold out two.
    """
    if not ratio:
        return [], frozenset()
    records: list[CaptionedImage] = []
    groups: dict[str, None] = {}
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
        for record in found:
            if record.group_id in groups or len(groups) < wanted:
                groups[record.group_id] = None
                records.append(record)
        if len(groups) >= wanted:
            break
    return [_write_image(record, folder, n) for n, record in enumerate(records)], frozenset(groups)


def _write_image(record: CaptionedImage, folder: Path, number: int) -> CaptionedImage:
    assert record.image is not None
    file = folder / f"{number:05d}"
    file.write_bytes(record.image.read_bytes())
    return replace(record, image=file)
