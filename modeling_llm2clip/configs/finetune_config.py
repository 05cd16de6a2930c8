"""Options for stage 1, the fine-tuning of the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from .config_fields import TrainingConfig, WeightDtype


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Options for `finetune_llm`, which trains a LoRA on captions (paper, section 3.1)."""

    without_flags = ("deterministic", "eval_steps", "lora_dtype", "num_pairings", "scale")

    num_train_epochs: Annotated[float, Interval(gt=0)] = 1.0
    """Number of passes over the data."""
    learning_rate: Annotated[float, Interval(gt=0)] = 2e-4
    """Peak learning rate."""
    save_steps: Annotated[int, Interval(ge=1)] = 100
    """Steps between checkpoints; the last step is always saved."""
    logging_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between logged metrics. Default: 1 in runs of fewer than 200 steps, else 10."""
    per_device_train_batch_size: Annotated[int, Interval(ge=2)] = 64
    """Caption pairs per batch on each process; pairs on other processes also serve as negatives."""
    mini_batch_size: Annotated[int, Interval(ge=1)] | None = None
    """Pairs to process at a time with gradient caching (arXiv:2101.06983), so a batch of any size
    fits into memory. Default: the whole batch at once."""
    scale: Annotated[float, Interval(gt=0)] = 50.0
    """Inverse temperature of the loss."""
    negatives: Literal["query-to-doc", "symmetric", "all"] = "symmetric"
    """Texts to compare within a batch: each first caption with all second captions (query-to-doc,
    as in the official code), both directions (symmetric, as in CLIP), or each text with every other
    text (all)."""
    num_pairings: Annotated[int, Interval(ge=1)] = 1
    """Number of times per epoch to pair the captions of each image at random."""
    num_hard_negatives: Annotated[int, Interval(ge=0)] = 0
    """Hard negatives in the batch for each image: images whose captions are the most similar under
    the initial model. 0 samples batches at random."""
    num_held_out: Annotated[int, Interval(ge=2)] | None = None
    """Image groups to hold out for measuring caption retrieval accuracy. Default: a fifth of the
    groups, at most 1,000."""
    skip_single_captions: bool = False
    """Skip image groups with only one caption, which cannot form a pair. If not set, they are an
    error."""
    text_pairs: tuple[tuple[Path, Annotated[float, Interval(gt=0)]], ...] = ()
    """Additional text pairs: FILE (JSON lines with query, positive and negatives) and WEIGHT, the
    number of batches from FILE per batch of captions. Repeatable. Default: none."""
    init_lora: Path | None = None
    """Folder of a LoRA to start from. Its rank, alpha and target layers must match this run's.
    Default: a new LoRA."""
    lora_rank: Annotated[int, Interval(ge=1)] = 16
    """LoRA rank; alpha is twice the rank."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers to apply LoRA to, as in peft; all-linear selects all of them."""
    lora_dtype: WeightDtype = "float32"
    """Dtype of the saved LoRA."""
    merge: bool = True
    """Merge the LoRA into a new model at output/model. False writes only the LoRA, at output/lora.
    """
    eval_steps: Annotated[int, Interval(ge=0)] = 0
    """Steps between evaluations; 0 evaluates only before and after the run."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            **super()._list_conflicts(),
            "lora_target_modules is empty. List linear layers, or use all-linear.": (
                not self.lora_target_modules
            ),
        }
