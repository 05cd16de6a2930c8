"""Captions of two dozen images and a short run on them, for the tests of the fine-tuning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import tiny_model

from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.data.captions.caption_groups import CaptionGroup, group_captions
from modeling_llm2clip.data.captions.text_pairs import TextPair
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm
from modeling_llm2clip.training.run_folder import read_results

RECORDS = [
    CaptionedImage(
        image=None,
        name=f"{n}.jpg",
        group_id=f"image {n}",
        captions=tuple(f"{view} of {n} {n * 7 % 31}" for view in "abcde"),
    )
    for n in range(24)
]
GROUPS: list[CaptionGroup] = list(group_captions(RECORDS))
# Long enough for two checkpoints, short enough for a test.
SHORT = FinetuneConfig(
    max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, warmup_steps=1 / 3,
    num_held_out=4, save_steps=3, precision="float32", merge=False, device="cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """A finished fine-tuning, as its folder describes it."""

    output: Path

    @property
    def lora(self) -> Path:
        return self.output / "lora"

    @property
    def weights(self) -> Path:
        return self.lora / "adapter_model.safetensors"

    @property
    def results(self) -> dict[str, Any]:
        return read_results(self.output)

    def copy_unfinished(self, output: Path) -> Path:
        """Copy the run as if it had been killed between its two checkpoints."""
        shutil.copytree(self.output, output)
        shutil.rmtree(output / "checkpoints" / "checkpoint-6")
        shutil.rmtree(output / "lora")
        return output


# Flags of the command for a run of one step.
FLAGS = [
    "--max-steps", "1", "--per-device-train-batch-size", "4", "--num-held-out", "4", "--device",
    "cpu",
]  # fmt: skip


def write_captions(file: Path, *singles: str) -> Path:
    """Write the captions of `GROUPS` for the command, and some images with a single caption."""
    groups = [*((g.group_id, g.captions) for g in GROUPS), *((name, [name]) for name in singles)]
    lines = [json.dumps({"group_id": name, "captions": captions}) for name, captions in groups]
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def write_pairs(file: Path, pairs: Iterable[TextPair]) -> Path:
    """Write text pairs in the format of `text_pairs`."""
    lines = [
        json.dumps({"query": p.anchor, "positive": p.positive, "negatives": list(p.negatives)})
        for p in pairs
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def hold_out_short() -> list[CaptionGroup]:
    """Return the groups that runs with `SHORT` hold out."""
    return [*group_captions(RECORDS).hold_out(4, seed=SHORT.seed)[1]]


def tune(output: Path, config: FinetuneConfig = SHORT, **options: Any) -> Tuned:
    finetune_llm(tiny_model(), RECORDS, output, config, **options)
    return Tuned(output)
