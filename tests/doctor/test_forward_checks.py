"""A loaded model that no longer does what its config says is found by running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import load_tested
from transformers import AutoConfig, AutoModel

from modeling_llm2clip.base_llm2clip import set_attention_direction
from modeling_llm2clip.doctor.forward_checks import (
    check_attention_direction,
    check_batch_invariance,
    check_padding_invariance,
    check_pooled_span,
)


def test_a_loaded_model_that_turned_causal_is_found(good: Path) -> None:
    tested = load_tested(good)
    set_attention_direction(tested.model.text_model, bidirectional=False)
    with pytest.raises(ValueError, match=r"2 attention modules.*does not see the last"):
        check_attention_direction(tested)


def test_a_causal_model_that_sees_ahead_is_found(good: Path) -> None:
    tested = load_tested(good)
    tested.model.config.bidirectional = False
    with pytest.raises(ValueError, match=r"contradict.*, a token sees a later one"):
        check_attention_direction(tested)


def test_a_causal_encoder_that_sees_ahead_with_padding_alone_is_found(good: Path) -> None:
    tested = load_tested(good)
    config = AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = AutoModel.from_config(config).eval()
    set_attention_direction(encoder, bidirectional=False)
    tested.model.text_model = encoder
    tested.model.config.text_config = config
    tested.model.config.bidirectional = False
    with pytest.raises(ValueError, match=r"^with padding, a token sees a later one"):
        check_attention_direction(tested)


def test_a_pooling_that_takes_other_tokens_is_found(good: Path) -> None:
    tested = load_tested(good)
    tested.model.config.text_pooling = "last_token"  # another object than tested.config
    with pytest.raises(
        ValueError, match=r"pooling 'a dog' differs by .* from pooling its caption and suffix"
    ):
        check_pooled_span(tested)


def test_attention_to_padding_is_found(good: Path) -> None:
    tested = load_tested(good)

    def forget_mask(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": None}

    tested.model.text_model.register_forward_pre_hook(forget_mask, with_kwargs=True)
    with pytest.raises(ValueError, match=r"texts in one batch: row \d moves by"):
        check_batch_invariance(tested)
    with pytest.raises(ValueError, match=r"left- and right-padded texts: row \d moves by"):
        check_padding_invariance(tested)
