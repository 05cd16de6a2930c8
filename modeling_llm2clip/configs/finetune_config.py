"""Options of stage 1, the fine-tuning of the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from .config_fields import TrainingConfig, WeightDtype


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Options of `finetune_llm`, which trains a LoRA on captions (paper, section 3.1)."""

    without_flags = ("eval_steps", "lora_dtype", "num_pairings", "scale")

    num_train_epochs: Annotated[float, Interval(gt=0)] = 1.0
    """Passes over the data."""
    learning_rate: Annotated[float, Interval(gt=0)] = 2e-4
    """Peak learning rate."""
    save_steps: Annotated[int, Interval(ge=1)] = 100
    """Steps between checkpoints; the last step has one too."""
    logging_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between lines of metrics. Default: 1 in runs below 200 steps, else 10."""
    per_device_train_batch_size: Annotated[int, Interval(ge=2)] = 64
    """Caption pairs per batch of each process; pairs of other processes are negatives too."""
    mini_batch_size: Annotated[int, Interval(ge=1)] | None = None
    """Pairs computed at a time, with cached gradients (arXiv:2101.06983), so that any batch fits
    into memory. Default: the whole batch at once."""
    scale: Annotated[float, Interval(gt=0)] = 50.0
    """Inverse temperature of the loss."""
    negatives: Literal["query-to-doc", "symmetric", "all"] = "symmetric"
    """Comparisons within a batch: first captions with all second ones (query-to-doc, as upstream),
    also in reverse (symmetric, as CLIP), or each text with every other text (all)."""
    num_pairings: Annotated[int, Interval(ge=1)] = 1
    """Number of times per epoch that the captions of each image are paired anew."""
    num_hard_negatives: Annotated[int, Interval(ge=0)] = 0
    """Number of images in a batch with each image because the initial model finds their captions
    most similar. 0 samples batches at random."""
    num_held_out: Annotated[int, Interval(ge=2)] | None = None
    """Images held out to measure caption retrieval accuracy. Default: a fifth, at most 1,000."""
    skip_single_captions: bool = False
    """Skip images with one caption, which cannot form a pair."""
    text_pairs: tuple[tuple[Path, Annotated[float, Interval(gt=0)]], ...] = ()
    """Other text pairs to add: FILE (JSON lines of query, positive, negatives) and WEIGHT, the
    number of their batches for each batch of captions; repeatable. Default: none."""
    init_lora: Path | None = None
    """Folder of a LoRA of the same shape to start from. Default: a new LoRA."""
    lora_rank: Annotated[int, Interval(ge=1)] = 16
    """Rank of the LoRA, whose alpha is twice the rank."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers that get a LoRA, as in peft."""
    lora_dtype: WeightDtype = "float32"
    """Dtype of the saved LoRA."""
    merge: bool = True
    """Merge the LoRA into a new model, output/model; False leaves it at output/lora."""
    eval_steps: Annotated[int, Interval(ge=0)] = 0
    """Steps between measurements; 0 measures only before and after the run."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            **super()._list_conflicts(),
            "lora_target_modules is empty. Name linear layers, or all-linear.": (
                not self.lora_target_modules
            ),
        }
