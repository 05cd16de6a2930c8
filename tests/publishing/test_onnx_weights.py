"""Rounded weights: what is rounded, how, and what is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from onnx_folders import shared_graphs, shared_source
from shared_models import CAPTIONS
from torch import nn

from modeling_llm2clip import load_model, load_onnx_encoder
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.publishing.onnx_checks import (
    CheckInputs,
    measure_recall,
    require_near_texts,
    require_recall,
)
from modeling_llm2clip.publishing.onnx_graphs import (
    _round,
    choose_exact_layers,
    measure_layers,
)

INPUTS = CheckInputs(captions=["a"] * 4, texts=["a"] * 4, images=[None] * 4, data="some images")


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.slow
def test_the_effect_of_rounding_is_measured_with_onnx_runtimes_own_numbers(
    weights: Any, bits: int
) -> None:
    model, processor = load_model(shared_source(), device="cpu")
    exact = encode_texts(model, processor, CAPTIONS)
    for module in model.text_model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = _round(module.weight.data, bits)
    wanted = encode_texts(model, processor, CAPTIONS)
    found = load_onnx_encoder(shared_graphs(), weights=weights).encode_texts(CAPTIONS)
    # A value in the middle of two steps may be rounded to either: far less than rounding itself.
    assert (found - wanted).norm() < 0.1 * (wanted - exact).norm()


def test_measuring_layers_leaves_the_model_as_it_is() -> None:
    model, processor = load_model(shared_source(), device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    errors = measure_layers(model, processor, CAPTIONS, bits=4)
    assert set(errors) == {"layers.0", "layers.1"} and min(errors.values()) > 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_layers_with_the_largest_errors_stay_exact() -> None:
    errors = {"a": 1.0, "b": 4.0, "c": 3.0, "d": 2.0}
    assert choose_exact_layers(errors, share=1.0) == []
    assert choose_exact_layers(errors, share=0.6) == ["b"]
    assert choose_exact_layers(errors, share=0.59) == ["b", "c"]
    assert choose_exact_layers(errors, share=0.0) == ["b", "c", "d", "a"]


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
