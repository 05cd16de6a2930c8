"""Captions of two dozen images and a short run on them, for the tests of the caption tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_model

from modeling_llm2clip.data.caption_groups import CaptionGroup
from modeling_llm2clip.training.finetuning.finetune_llm import (
    TuneArguments,
    TuneResult,
    finetune_llm,
)

GROUPS = [
    CaptionGroup(f"image {n}", tuple(f"{view} of {n} {n * 7 % 31}" for view in "abcde"))
    for n in range(24)
]
# Long enough for two checkpoints, short enough for a test.
SHORT = TuneArguments(
    steps=6, batch_size=8, lr=1e-2, warmup_steps=1 / 3, held_out=4, save_every=3,
    precision="float32",
)  # fmt: skip


def tune(output: Path, arguments: TuneArguments = SHORT, **settings: Any) -> TuneResult:
    return finetune_llm(*tiny_model(), GROUPS, output, arguments, **settings)
