"""The embedded emoji are the test split of the demo."""

from __future__ import annotations

from pathlib import Path

from modeling_llm2clip.demo.run_demo import split_emoji
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    find_languages,
    load_dataset,
)
from modeling_llm2clip.evaluation.datasets.dataset_spec import ReadingCache
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import (
    RetrievalDataset,
)


def test_the_emoji_are_those_that_the_demo_holds_out_in_every_language() -> None:
    train, test = split_emoji(seed=0)
    held_out = {record.group_id for record in test}
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
    trained = {text for record in train for text in record.captions}
    tested = load_dataset("emoji", lang="en", cache=cache)
    assert isinstance(tested, RetrievalDataset)
    assert not trained & set(tested.captions)
