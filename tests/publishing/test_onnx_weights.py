"""Rounded weights: what is rounded, how, and what is accepted."""

from __future__ import annotations

import pytest
import torch

from modeling_llm2clip.publishing.onnx_checks import (
    CheckInputs,
    measure_recall,
    require_near_texts,
    require_recall,
)

INPUTS = CheckInputs(captions=["a"] * 4, texts=["a"] * 4, images=[None] * 4, data="some images")


def test_one_text_below_the_limit_is_enough_to_refuse_eight_bits() -> None:
    figures = {"texts": 212, "texts_below_0.999": 0, "min_cosine": 0.9991}
    require_near_texts(figures)
    with pytest.raises(ValueError, match=r"1 of 212 texts .* smallest 0\.9989"):
        require_near_texts({**figures, "texts_below_0.999": 1, "min_cosine": 0.9989})


def test_a_loss_of_recall_is_printed_and_accepted_by_its_size() -> None:
    figures = {"recall_at_1": 0.5, "recall_at_1_of_the_model": 0.75, "min_cosine": 0.8}
    with pytest.raises(ValueError, match=r"25\.0 points .* 50\.0 instead of 75\.0 %") as error:
        require_recall(figures, INPUTS, max_loss=0.0)
    assert "max_recall_loss=0.25" in str(error.value) and "some images" in str(error.value)
    require_recall(figures, INPUTS, max_loss=0.25)
    require_recall({**figures, "recall_at_1": 0.8}, INPUTS, max_loss=0.0)  # more is welcome


def test_recall_counts_texts_that_find_their_own_image() -> None:
    images = torch.eye(4)
    assert measure_recall(images, images) == 1.0
    assert measure_recall(images[[1, 0, 2, 3]], images) == 0.5
    assert measure_recall(torch.ones(4, 4), images) == 0.0  # ties count against the texts
