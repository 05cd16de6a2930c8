"""Settings of the cross-modal alignment."""

from __future__ import annotations

from dataclasses import dataclass

from ...encoding.devices import DEVICE_NAMES, is_device_name
from ..settings import list_faults

VISION_TRAININGS = ("frozen", "lora", "full")
TEXT_TRAININGS = ("stored", "frozen-online", "lora")
STARTS = ("as-is", "canonical-correlation")


@dataclass(frozen=True)
class AlignArguments:
    """What is trained, on what, and how long.

    Attributes:
        vision_training: of the vision tower nothing, a LoRA on its attention, or everything.
        text_training: `"stored"` reads caption vectors and never loads the LLM;
            `"frozen-online"` runs the frozen LLM at each step; `"lora"` trains a LoRA on it end
            to end, which the paper compares with.
        epochs, steps: how long; `steps`, where given, counts.
        batch_size: pictures in a batch, over all processes together.
        lr, vision_lr: peak rate of adapter, projections and LoRAs, and of a wholly trained vision
            tower; `vision_lr` is `lr` where it is not given.
        layer_decay: how much slower each layer of a wholly trained vision tower learns than the
            one above it (upstream: 0.85); 1 for all alike.
        long_share: probability that a picture with short and long captions shows a long one.
        loss_chunk: rows of the logits computed at a time; see `keyed_contrastive_loss`.
        start: where the projections start: as they are in the model, or where a linear fit of the
            stored vectors puts them.
        vision_rank, vision_alpha, text_rank, text_alpha: of the LoRAs (paper: 32, 32; 16, 32).
        clip_norm: longest gradient.
        num_workers: processes that decode pictures or tokenize captions.
        precision: `"auto"` computes in bfloat16 on GPUs that can; weights stay float32.
        device: one of `DEVICE_NAMES`; see `find_device`.
        log_every, save_every: steps between two lines of metrics, two checkpoints; the last step
            has both.
    """

    vision_training: str = "frozen"
    text_training: str = "stored"
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 512
    lr: float = 1e-3
    vision_lr: float | None = None
    weight_decay: float = 0.05
    layer_decay: float = 0.85
    long_share: float = 0.5
    loss_chunk: int | None = None
    start: str = "as-is"
    vision_rank: int = 32
    vision_alpha: int = 32
    text_rank: int = 16
    text_alpha: int = 32
    clip_norm: float = 1.0
    gradient_checkpointing: bool = False
    num_workers: int = 0
    precision: str = "auto"
    device: str = "auto"
    log_every: int = 10
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        faults = list_faults(
            self,
            least={
                "batch_size": 2, "num_workers": 0, "log_every": 1, "save_every": 1,
                "vision_rank": 1, "text_rank": 1, "steps": 1, "loss_chunk": 1,
            },
            positive=("epochs", "lr", "vision_lr", "clip_norm", "vision_alpha", "text_alpha"),
            choices={
                "vision_training": VISION_TRAININGS,
                "text_training": TEXT_TRAININGS,
                "start": STARTS,
                "precision": ("auto", "float32", "bfloat16"),
            },
        )  # fmt: skip
        if not is_device_name(self.device):
            faults.append(f"device={self.device!r}, wanted one of {DEVICE_NAMES}")
        if not 0 <= self.long_share <= 1:
            faults.append(f"long_share={self.long_share}, wanted a number from 0 to 1")
        if not 0 < self.layer_decay <= 1:
            faults.append(f"layer_decay={self.layer_decay}, wanted more than 0 and at most 1")
        if self.weight_decay < 0:
            faults.append(f"weight_decay={self.weight_decay}, wanted 0 or more")
        if faults:
            raise ValueError("; ".join(faults) + ".")

    @property
    def needs_llm(self) -> bool:
        """Whether the LLM is loaded at all."""
        return self.text_training != "stored"

    def count_steps(self, num_items: int) -> int:
        """Steps of the whole run; an epoch leaves the last, smaller batch out."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * (num_items // self.batch_size)))
