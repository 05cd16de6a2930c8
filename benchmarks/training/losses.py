"""Seconds of a step of every loss of `align`, forward and backward, on random embeddings.

    python -m benchmarks.training.losses

The losses take turns. No tower runs, so that the time is that of the loss alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.shared.provenance import describe_run, write_result
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.heads_llm2clip import LogitRule
from modeling_llm2clip.training.losses.choose_loss import build_loss
from modeling_llm2clip.training.losses.loss import Loss, LossInputs

DIMS = {"image": 768, "text": 768, "vision": 1024, "caption": 2048}
BATCH_SIZES = (512, 4096)
OPTIONS: dict[str, Mapping[str, Any]] = {
    "contrastive": {},
    "contrastive, in chunks of 512": {"loss_chunk_size": 512},
    "sigmoid": {"loss": "sigmoid"},
    "Matryoshka, 256 and 64": {"matryoshka_dims": (256, 64)},
    "with STRUCTURE": {"structure_weight": 10.0},
    "with self-distillation": {"distillation_weight": 1.0, "vision_training": "full"},
}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7)
    output = Path(__file__).parents[1] / "results" / "losses.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    losses = {name: build_loss(AlignConfig(**options)) for name, options in OPTIONS.items()}
    seconds: dict[str, dict[str, float]] = {name: {} for name in losses}
    for batch_size in BATCH_SIZES:
        inputs = make_inputs(batch_size)
        rounds = [
            {name: time_step(loss, inputs) for name, loss in losses.items()}
            for _ in range(arguments.rounds + 1)
        ][1:]  # the first one warms up
        for name in losses:
            middle = statistics.median(times[name] for times in rounds)
            seconds[name][str(batch_size)] = round(middle, 4)
    write_result(
        arguments.output,
        {**describe_run("torch"), "dims": DIMS, "rounds": arguments.rounds, "seconds": seconds},
    )


def make_inputs(batch_size: int) -> LossInputs:
    """Random embeddings, of which those that a model projects need gradients."""
    generator = torch.Generator().manual_seed(0)
    rows = {n: torch.randn(batch_size, dim, generator=generator) for n, dim in DIMS.items()}
    image, text = (F.normalize(rows[name], dim=-1).requires_grad_() for name in ("image", "text"))
    return LossInputs(
        image, text, LogitRule(torch.tensor([50.0])), torch.arange(batch_size),
        torch.arange(batch_size), vision_embeds=rows["vision"].requires_grad_(),
        caption_embeds=rows["caption"],
        teacher_embeds=rows["vision"].detach() + 0.1 * torch.randn(rows["vision"].shape),
    )  # fmt: skip


def time_step(loss: Loss, inputs: LossInputs) -> float:
    """Seconds of the loss and its gradients."""
    started = time.perf_counter()
    loss(inputs).backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
