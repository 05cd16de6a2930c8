"""What stage 1 is prepared with: counts of texts, and groups for hard negatives."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from tiny import tiny_model

from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.data.captions.caption_groups import group_captions
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.encoding.tokenized_texts import TokenizedTexts
from modeling_llm2clip.training.finetuning import finetune_data
from modeling_llm2clip.training.finetuning.finetune_data import (
    FinetuneData,
    count_truncated,
    prepare_data,
)


def make_data(folder: Path) -> FinetuneData:
    """Groups of texts of all lengths, some of which several groups have."""
    generator = random.Random(0)
    words = ["a", "dog", "möwe", "and", "12345", "unbelievably", "犬", "z" * 30]
    texts = [" ".join(generator.choices(words, k=generator.randint(1, 60))) for _ in range(150)]
    records = [
        CaptionedImage(None, str(n), str(n), tuple(generator.sample(texts, 3))) for n in range(80)
    ]
    config = FinetuneConfig(per_device_train_batch_size=4, num_held_out=4, num_pairings=2)
    return prepare_data(group_captions(records), [], config, folder)


def test_truncated_texts_are_counted_as_by_tokenizing_every_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_data, "_ROWS_AT_ONCE", 7)
    data = make_data(tmp_path)
    _, processor = tiny_model(max_text_length=64)
    texts = list(data.iterate_texts())
    assert Counter(texts) == Counter(
        text
        for captions in (*data.iterate_groups(), *(group.captions for group in data.held_out))
        for text in captions
    )
    num_truncated = TokenizedTexts(processor, texts).num_truncated
    assert 0 < num_truncated < len(texts)
    assert count_truncated(processor, data) == {
        "num_texts": len(texts), "num_truncated": num_truncated,
    }  # fmt: skip


def test_groups_have_the_captions_that_are_trained_on_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_data, "_ROWS_AT_ONCE", 3)
    data = make_data(tmp_path)
    found = list(data.iterate_groups())
    assert len(found) == data.num_trained == data.counts["num_trained"]
    of_group: list[set[str]] = [set() for _ in found]
    for row in data.tables["captions"]:
        of_group[row["group"]] |= {row["anchor"], row["positive"]}
    assert [set(captions) for captions in found] == of_group
    assert all(len(set(captions)) == len(captions) for captions in found)
