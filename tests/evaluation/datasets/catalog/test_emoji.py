"""The embedded emoji are the test split of the demo."""

from __future__ import annotations

from pathlib import Path

from modeling_llm2clip.data.record_loading import find_example_data, load_records
from modeling_llm2clip.demo.stages import hold_out
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    find_languages,
    load_dataset,
)
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import (
    RetrievalDataset,
)
from modeling_llm2clip.evaluation.datasets.validation import ReadingCache


def test_the_emoji_are_those_that_the_demo_holds_out_in_every_language() -> None:
    records = load_records(find_example_data() / "emoji")
    english = [record for record in records if record.lang == "en"]
    held_out = hold_out(english, seed=0)
    cache = ReadingCache()
    names = {}
    for lang in find_languages("emoji"):
        found = load_dataset("emoji", lang=lang, cache=cache)
        assert isinstance(found, RetrievalDataset)
        assert {Path(name).stem for name in found.image_names} == held_out
        assert len(found.captions) == len(set(found.captions)) == len(held_out) == 300
        names[lang] = found.image_names
    assert len(names) == 12
    assert len(set(names.values())) == 1
    # What training sees in English shows up in no caption that tests English.
    trained = {text for r in english if r.group_id not in held_out for text in r.captions}
    tested = load_dataset("emoji", lang="en", cache=cache)
    assert isinstance(tested, RetrievalDataset)
    assert not trained & set(tested.captions)
