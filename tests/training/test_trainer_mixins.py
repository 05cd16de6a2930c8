"""What both training stages add to a Trainer: precision, reports, warm-up, progress."""

from __future__ import annotations

import pytest
import torch

from modeling_llm2clip.training.trainer_mixins import computes_in_bfloat16


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
