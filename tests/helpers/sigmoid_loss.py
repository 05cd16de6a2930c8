"""A loss with a parameter of its own, and runs that train on it, on one process and on two."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from aligning import SHORT_RUN
from torch import Tensor, nn

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.losses.gathering import gather_with_gradient
from modeling_llm2clip.training.losses.loss import LossInputs

START = -2.0
LONG = {"max_steps": 8, "save_steps": 4, "held_out_ratio": 0.2, "eval_steps": 2}


class SigmoidLoss(nn.Module):
    """Whether each image and text are a pair (arXiv:2303.15343), with a learned bias."""

    def __init__(self, bias: float = START) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([bias]))

    def forward(self, inputs: LossInputs) -> Tensor:
        texts, first = inputs.text_embeds, 0
        if not inputs.is_whole and dist.is_initialized() and dist.get_world_size() > 1:
            first = dist.get_rank() * len(texts)
            texts = gather_with_gradient(texts)
        logits = inputs.logits(inputs.image_embeds, texts) + self.bias
        labels = torch.full_like(logits, -1.0)
        rows = torch.arange(len(logits))
        labels[rows, first + rows] = 1.0
        return -F.logsigmoid(labels * logits).sum() / len(logits)


def train(prepared: Path, output: Path, *, resume: bool = False, **options: Any) -> None:
    """Align on the data of `prepare` by this loss."""
    from modeling_llm2clip.data.records.record_loading import load_records

    callbacks = options.pop("callbacks", ())
    config = AlignConfig(**{**SHORT_RUN, **LONG, **options})
    align(
        prepared / "exported", load_records(prepared / "data"), output, config,
        caption_store=prepared / "captions", image_store=prepared / "images",
        loss=SigmoidLoss(), resume=resume, callbacks=callbacks,
    )  # fmt: skip


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
