"""Options of stage 3, the alignment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .training_config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class AlignConfig(TrainingConfig):
    """Options of `align`: the trained parts, the data and the duration (paper, section 3.2)."""

    vision_training: Literal["frozen", "lora", "full"] = "frozen"
    """Trained part of the vision tower: nothing, a LoRA on its attention, or everything."""
    text_training: Literal["stored", "frozen-online", "lora"] = "stored"
    """Where caption embeddings come from: the caption store, so that the LLM is never loaded; the
    frozen LLM at each step; or the LLM with a LoRA that is trained end to end."""
    projection_init: Literal["auto", "model", "cca"] = "auto"
    """Where the projections start: as they are in the model, or where the canonical correlation of
    the stored embeddings puts them; auto is cca where both stores are given, and for a model with
    trained projections the one with the lower held-out loss."""
    loss: str = "contrastive"
    """Name of the loss, one of `training/losses/loss.py`."""
    max_steps: Annotated[int, Interval(ge=0)] | None = None
    """Number of steps; 0 for the closed form alone. Default: what `num_train_epochs` comes to."""
    num_train_epochs: Annotated[float, Interval(gt=0)] | None = None
    """Passes over the data. Default: 10, and at least 300 steps."""
    global_batch_size: Annotated[int, Interval(ge=2)] | None = None
    """Records per batch, over all processes together; an image has one in each of its languages.
    Default: 512, or as many as the data allow."""
    learning_rate: Annotated[float, Interval(gt=0)] | None = None
    """Peak learning rate of adapter, projections and LoRAs. Default: 1e-4 from a trained model or
    a closed-form start, 1e-3 from random weights."""
    vision_learning_rate: Annotated[float, Interval(gt=0)] | None = None
    """Peak learning rate of a fully trained vision tower. Default: `learning_rate`."""
    layer_decay: Annotated[float, Interval(gt=0, le=1)] = 0.85
    """Factor of the learning rate from one layer of such a tower to the one below it; 1 for all
    alike."""
    warmup_steps: Annotated[float, Interval(ge=0)] = 0.1
    """Steps until the learning rate reaches its peak; below 1, a share of the run, of at least 20
    steps, so that a very short run stays below the peak. 0 for none."""
    weight_decay: Annotated[float, Interval(ge=0)] = 0.05
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Interval(gt=0)] = 1.0
    """Maximum norm of the gradient."""
    image_noise: Annotated[float, Interval(ge=0)] = 1.0
    """Standard deviation of the noise on stored image embeddings, as a share of their length;
    against overfitting on small data."""
    caption_noise: Annotated[float, Interval(ge=0)] = 0.5
    """Standard deviation of the noise on stored caption embeddings, as `image_noise`."""
    long_caption_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Probability that an image with short and long captions shows a long one."""
    held_out_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Share of the groups of images that is held out to choose the weights, at most 1,000 and in
    small data at least 20; 0 for none."""
    refit: bool | None = None
    """Once held-out images have chosen the weights, fit everything once more on all images, with
    the shrinkages, the number of steps and the share of the way from the start that they chose.
    Default: where both stores are given; elsewhere the towers would run twice as often."""
    eval_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between two evaluations on the held-out images. Default: a twentieth of the run."""
    early_stopping_patience: Annotated[int, Interval(ge=0)] = 6
    """Stop after this many evaluations in a row without a lower held-out loss; 0 for never."""
    loss_chunk_size: Annotated[int, Interval(ge=1)] | None = None
    """Rows of the logits computed at a time. Default: all at once."""
    lora_rank: Annotated[int, Interval(ge=1)] = 16
    """Rank of the LLM's LoRA."""
    lora_alpha: Annotated[int, Interval(ge=1)] = 32
    """Alpha of the LLM's LoRA."""
    vision_lora_rank: Annotated[int, Interval(ge=1)] = 32
    """Rank of the vision tower's LoRA."""
    vision_lora_alpha: Annotated[int, Interval(ge=1)] = 32
    """Alpha of the vision tower's LoRA."""
    num_workers: Annotated[int, Interval(ge=0)] | None = None
    """Processes that decode images or tokenize captions; 0 for none. Default: where images are
    decoded for a GPU, its share of the cores, 8 at most; otherwise none."""
    logging_steps: Annotated[int, Interval(ge=1)] = 10
    """Steps between lines of metrics."""

    def _find_conflicts(self) -> Iterator[str]:
        yield from super()._find_conflicts()
        if self.max_steps == 0 and self.projection_init == "model":
            yield "max_steps=0 with projection_init=model writes the model as it is. Train it."
        if self.refit and not self.held_out_ratio:
            yield "refit=True needs held-out images to choose by, and held_out_ratio=0 has none."
