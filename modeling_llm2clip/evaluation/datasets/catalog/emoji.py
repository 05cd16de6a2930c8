"""The emoji that the package contains, named in twelve languages: the test split of the demo."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ....data.records.record_loading import find_example_data, load_records
from ....data.records.records import CaptionedImage
from ....data.records.splits import choose_test_rows, split_records
from ..dataset_spec import DatasetSpec, ReadRequest
from ..retrieval_dataset import PublishedRecord, build_retrieval_dataset
from ..validation import DatasetValidator

# The split: that of `llm2clip demo` unless it is given another seed.
EMOJI_SEED = 0
NUM_TEST_GROUPS = 300


def read_emoji(request: ReadRequest, validator: DatasetValidator) -> Iterator[PublishedRecord]:
    """Yield one image of each emoji of the test split, with its name in one language.

    Args:
        request: How the dataset is to be read.
        validator: Keeps the choice of images for other languages.
    """
    if "emoji" not in validator.cache.records:
        validator.cache.records["emoji"] = _choose_emoji()
    tested, captions = validator.cache.records["emoji"]
    validator.notes["seed"] = EMOJI_SEED
    for record in tested:
        yield PublishedRecord(
            place="captions.jsonl",
            name=record.name,
            captions=captions[record.name, request.lang],
            image=record.image,
            group_id=record.group_id,
        )


def _choose_emoji() -> tuple[list[CaptionedImage], dict[tuple[str, str], tuple[str, ...]]]:
    """Return the records that test English, and the first caption by image and language."""
    records = load_records(find_example_data() / "emoji")
    english = [record for record in records if record.lang == "en"]
    _, held_out = split_records(english, test_size=NUM_TEST_GROUPS, seed=EMOJI_SEED)
    groups = {record.group_id for record in held_out}
    tested = [english[row] for row in choose_test_rows(english, groups)]
    return tested, {(record.name, record.lang): record.captions[:1] for record in records}


DATASETS = (
    DatasetSpec(
        name="emoji",
        title="The package's emoji that its demo holds out with seed 0, with their names",
        dataset_type="retrieval",
        languages=("en", "de", "fr", "es", "it", "pt", "ru", "ar", "hi", "zh", "ja", "ko"),
        counts={"images": 300, "captions": 300},
        license="images Apache-2.0 (Noto) and MIT (Fluent); names Unicode-3.0",
        citation="Noto Emoji (Google); CLDR annotations (Unicode)",
        source="in the package",
        files="none",
        protocol={"split": "held out by the demo", "texts": "CLDR short name"},
        build=partial(build_retrieval_dataset, read=read_emoji),
        origin="package",
    ),
)
