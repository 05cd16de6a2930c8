"""What the demo trains on, and what it leaves to the evaluation."""

from __future__ import annotations

import warnings

import pytest

from modeling_llm2clip.demo.run_demo import split_emoji


@pytest.mark.slow
def test_a_seed_that_trains_on_emoji_of_the_evaluation_dataset_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_emoji(seed=0)
    with pytest.warns(UserWarning, match="Seed 1 trains on emoji that the evaluation dataset"):
        split_emoji(seed=1)


def test_training_sees_the_keywords_too() -> None:
    train, _ = split_emoji(seed=0)
    record = next(record for record in train if record.keywords)
    assert record.captions[-1].startswith(f"{record.captions[0]}: {record.keywords[0]}")
