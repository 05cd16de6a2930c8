"""Additions of both training stages to a Trainer: precision, reports, warm-up, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import AutoConfig, AutoModel, TrainingArguments

from modeling_llm2clip.configs.config_fields import TrainingConfig
from modeling_llm2clip.training.trainer_mixins import (
    computes_in_bfloat16,
    find_without_gradient,
    training_arguments_on,
)


@pytest.mark.parametrize(
    ("precision", "on_gpu", "has_instructions", "in_bfloat16"),
    [
        ("bfloat16", False, False, True),
        ("float32", True, True, False),
        ("auto", False, True, False),
        ("auto", True, False, False),  # a GPU that only emulates it
        ("auto", True, True, True),
    ],
)
def test_a_run_computes_in_bfloat16_on_request_or_by_a_gpu_that_has_it(
    monkeypatch: Any, precision: str, on_gpu: bool, has_instructions: bool, in_bfloat16: bool
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation or has_instructions

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert computes_in_bfloat16(precision, on_gpu=on_gpu) is in_bfloat16


@pytest.mark.parametrize("kind", [TrainingArguments, SentenceTransformerTrainingArguments])
@pytest.mark.parametrize(
    ("launched", "precision", "computed"),
    [
        ("fp16", "float32", "no"), ("bf16", "float32", "no"), ("bf16", "auto", "no"),
        ("no", "bfloat16", "bf16"), ("fp16", "bfloat16", "bf16"),
    ],
)  # fmt: skip
def test_the_precision_of_a_run_is_not_that_of_its_launcher(
    monkeypatch: Any, tmp_path: Path, kind: Any, launched: str, precision: Any, computed: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config = TrainingConfig(precision=precision, device="cpu")
    arguments = training_arguments_on(torch.device("cpu"), kind, tmp_path, config)
    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        chosen = Accelerator(mixed_precision=getattr(arguments, "mixed_precision", None), cpu=True)
        assert chosen.mixed_precision == computed
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)


@pytest.mark.parametrize("family", ["opt", "biogpt", "xglm"])
def test_a_layer_that_is_dropped_at_random_is_trained(family: str) -> None:
    """Its parameters get no gradient in a pass that leaves it out, here nearly every one."""
    sizes = {
        "vocab_size": 20, "hidden_size": 16, "d_model": 16, "num_hidden_layers": 2,
        "num_layers": 2, "num_attention_heads": 2, "attention_heads": 2, "intermediate_size": 32,
        "ffn_dim": 32, "word_embed_proj_dim": 16, "layerdrop": 0.999,
    }  # fmt: skip
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes))
    frozen = model.get_input_embeddings().requires_grad_(False)
    ids = torch.tensor([[3, 4, 5]])
    missing = find_without_gradient(model, lambda: model(input_ids=ids).last_hidden_state.sum())
    assert missing == []
    assert {m.layerdrop for m in model.modules() if hasattr(m, "layerdrop")} == {0.999}
    assert frozen.weight.grad is None
