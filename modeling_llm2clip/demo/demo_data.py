"""Data of the demo: to train on, to test on, and to search alone."""

from __future__ import annotations

import warnings
from dataclasses import replace

from ..data.records.record_loading import find_example_data, load_records
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage
from ..data.records.splits import choose_test_rows, split_records
from ..evaluation.datasets.catalog.caption_readers import EMOJI_SEED, NUM_TEST_GROUPS


def split_emoji(seed: int) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Split the embedded emoji into records to train on and one record per held-out emoji.

    Warns when the test part is not the evaluation dataset `emoji`.
    """
    if seed != EMOJI_SEED:
        warnings.warn(
            f"Seed {seed} trains on emoji that the evaluation dataset `emoji` tests: it is the "
            f"test split of seed {EMOJI_SEED}. Do not evaluate this model on it.",
            stacklevel=2,
        )
    records = [r for r in load_records(find_example_data() / "emoji") if r.lang == "en"]
    train, held_out = split_records(records, test_size=NUM_TEST_GROUPS, seed=seed)
    rows = choose_test_rows(held_out, {record.group_id for record in held_out})
    test = [replace(held_out[row], captions=held_out[row].captions[:1]) for row in rows]
    return [replace(record, captions=list_training_texts(record)) for record in train], test


def list_training_texts(record: CaptionedImage) -> tuple[str, ...]:
    """Return the captions, and once more the first one with the image's keywords behind it."""
    if not record.keywords:
        return record.captions
    return (*record.captions, f"{record.captions[0]}: {', '.join(record.keywords)}")


def load_photographs() -> RecordTable:
    """Read the embedded photographs, which the demo only searches."""
    return load_records(find_example_data() / "photographs")
