"""Runs on one or two processes with a loss that has a parameter or does not use the temperature."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from aligning import SHORT_RUN
from torch import Tensor

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.losses.loss import LossInputs

LONG = {"max_steps": 8, "save_steps": 4, "held_out_ratio": 0.2, "eval_steps": 2, "loss": "sigmoid"}
BIAS = "loss.logit_bias"


def cosine(inputs: LossInputs) -> Tensor:
    """Compute the loss of docs/contributing/add-a-loss.md, which does not use the temperature."""
    return (1 - (inputs.image_embeds * inputs.text_embeds).sum(dim=-1)).mean()


def train(prepared: Path, output: Path, *, resume: bool = False, **options: Any) -> None:
    """Align on the data of `prepare` with the sigmoid loss, or with the cosine (`by_cosine`)."""
    from modeling_llm2clip.data.records.record_loading import load_records

    callbacks = options.pop("callbacks", ())
    loss = cosine if options.pop("by_cosine", False) else None
    config = AlignConfig(**{**SHORT_RUN, **LONG, **options})
    align(
        prepared / "exported", load_records(prepared / "data"), output, config,
        caption_store=prepared / "captions", image_store=prepared / "images",
        loss=loss, resume=resume, callbacks=callbacks,
    )  # fmt: skip


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
