"""What both training stages add to a Trainer: precision, reports, warm-up, progress."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainingArguments

from modeling_llm2clip.configs.config_fields import TrainingConfig
from modeling_llm2clip.training.trainer_mixins import (
    computes_in_bfloat16,
    training_arguments_on,
)


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize(("precision", "wanted"), [("bfloat16", True), ("float32", False)])
def test_a_given_precision_is_used_everywhere(precision: str, wanted: bool, on_gpu: bool) -> None:
    assert computes_in_bfloat16(precision, on_gpu=on_gpu) is wanted


def test_precision_auto_is_float32_on_a_cpu() -> None:
    assert not computes_in_bfloat16("auto", on_gpu=False)


@pytest.mark.parametrize("has_instructions", [True, False])
def test_precision_auto_is_float32_on_a_gpu_that_only_emulates_bfloat16(
    monkeypatch: pytest.MonkeyPatch, has_instructions: bool
) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or has_instructions,
    )
    assert computes_in_bfloat16("auto", on_gpu=True) is has_instructions


@pytest.mark.parametrize("launched", ["no", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("precision", "computed"), [("float32", "no"), ("auto", "no"), ("bfloat16", "bf16")]
)
@pytest.mark.parametrize("kind", [TrainingArguments, SentenceTransformerTrainingArguments])
def test_the_precision_of_a_run_is_not_that_of_its_launcher(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: type[TrainingArguments],
    precision: str,
    computed: str,
    launched: str,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config = TrainingConfig(precision=precision, device="cpu")  # type: ignore[arg-type]
    arguments = training_arguments_on(torch.device("cpu"), kind, tmp_path, config)
    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        chosen = Accelerator(mixed_precision=getattr(arguments, "mixed_precision", None), cpu=True)
        assert chosen.mixed_precision == computed
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)
