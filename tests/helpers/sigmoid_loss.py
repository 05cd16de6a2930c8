"""Runs that train on a loss with a parameter of its own, on one process and on two."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from aligning import SHORT_RUN

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.training.alignment.align import align

LONG = {"max_steps": 8, "save_steps": 4, "held_out_ratio": 0.2, "eval_steps": 2, "loss": "sigmoid"}
BIAS = "loss.logit_bias"


def train(prepared: Path, output: Path, *, resume: bool = False, **options: Any) -> None:
    """Align on the data of `prepare` by this loss."""
    from modeling_llm2clip.data.records.record_loading import load_records

    callbacks = options.pop("callbacks", ())
    config = AlignConfig(**{**SHORT_RUN, **LONG, **options})
    align(
        prepared / "exported", load_records(prepared / "data"), output, config,
        caption_store=prepared / "captions", image_store=prepared / "images",
        resume=resume, callbacks=callbacks,
    )  # fmt: skip


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
