"""Settings of the cross-modal alignment."""

from __future__ import annotations

from dataclasses import dataclass

from ...encoding.devices import DEVICE_NAMES, is_device_name
from ..settings import list_errors

VISION_TRAININGS = ("frozen", "lora", "full")
TEXT_TRAININGS = ("stored", "frozen-online", "lora")
STARTS = ("auto", "as-is", "canonical-correlation")
# Of a run whose length is not given: epochs, and at least so many steps.
DEFAULT_EPOCHS = 10
LEAST_DEFAULT_STEPS = 300
_LARGEST_DEFAULT_BATCH = 512
_NUM_EVALUATIONS = 20


@dataclass(frozen=True)
class AlignArguments:
    """What is trained, on what, and how long.

    Attributes:
        vision_training: of the vision tower nothing, a LoRA on its attention, or everything.
        text_training: `"stored"` reads caption embeddings and never loads the LLM;
            `"frozen-online"` runs the frozen LLM at each step; `"lora"` trains a LoRA on it end
            to end, which the paper compares with.
        epochs, steps: how long; `steps`, where given, counts. Neither: 10 epochs, and at least 300
            steps.
        batch_size: images in a batch, over all processes together; None for 512, or the largest
            multiple of the number of processes that the training images allow.
        lr, vision_lr: peak rate of adapter, projections and LoRAs, and of a wholly trained vision
            tower; `vision_lr` is `lr` where it is not given, and `lr` is 1e-4 from a trained model
            or the closed form, which a higher one overwrites, and 1e-3 from random weights.
        image_noise, caption_noise: standard deviation of the noise on stored embeddings at each
            step, as a share of their length; keeps small data from being learned by heart.
        held_out_share: share of the groups (`group_id`) that is never trained on and chooses the
            best weights of the run, at most 1,000 and in small data at least 20; 0 for none.
        evaluate_every: steps between two looks at the held-out images; None for a twentieth of the
            run.
        patience: stop after so many looks in a row without a lower held-out loss; None never.
        layer_decay: how much slower each layer of a wholly trained vision tower learns than the
            one above it (upstream: 0.85); 1 for all alike.
        long_share: probability that an image with short and long captions shows a long one.
        loss_chunk: rows of the logits computed at a time; see `grouped_contrastive_loss`.
        start: where the projections start: `"as-is"` in the model, or where
            `"canonical-correlation"` of the stored embeddings puts them; `"auto"` takes the second
            where both stores are given, and for a model with trained projections whichever has the
            lower held-out loss.
        vision_rank, vision_alpha, text_rank, text_alpha: of the LoRAs (paper: 32, 32; 16, 32).
        clip_norm: longest gradient.
        num_workers: processes that decode images or tokenize captions.
        precision: `"auto"` computes in bfloat16 on GPUs that can; weights stay float32.
        device: one of `DEVICE_NAMES`; see `find_device`.
        log_every, save_every: steps between two lines of metrics, two checkpoints; the last step
            has both.
    """

    vision_training: str = "frozen"
    text_training: str = "stored"
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    vision_lr: float | None = None
    weight_decay: float = 0.05
    layer_decay: float = 0.85
    long_share: float = 0.5
    loss_chunk: int | None = None
    start: str = "auto"
    image_noise: float = 1.0
    caption_noise: float = 0.5
    held_out_share: float = 0.1
    evaluate_every: int | None = None
    patience: int | None = 6
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
        errors = list_errors(
            self,
            least={
                "batch_size": 2, "num_workers": 0, "log_every": 1, "save_every": 1,
                "vision_rank": 1, "text_rank": 1, "steps": 1, "loss_chunk": 1,
                "evaluate_every": 1, "patience": 1,
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
            errors.append(f"device={self.device!r}, wanted one of {DEVICE_NAMES}")
        if not 0 <= self.long_share <= 1:
            errors.append(f"long_share={self.long_share}, wanted a number from 0 to 1")
        if not 0 < self.layer_decay <= 1:
            errors.append(f"layer_decay={self.layer_decay}, wanted more than 0 and at most 1")
        if not 0 <= self.held_out_share < 1:
            errors.append(f"held_out_share={self.held_out_share}, wanted 0 or more and below 1")
        errors += [
            f"{name}={getattr(self, name)}, wanted 0 or more"
            for name in ("weight_decay", "image_noise", "caption_noise")
            if getattr(self, name) < 0
        ]
        if errors:
            raise ValueError("; ".join(errors) + ".")

    @property
    def needs_llm(self) -> bool:
        """Whether the LLM is loaded at all."""
        return self.text_training != "stored"

    def choose_batch_size(self, num_items: int, num_processes: int) -> int:
        """Images of a batch; where it is not given, what the training images allow."""
        if self.batch_size is not None:
            return self.batch_size
        most = min(_LARGEST_DEFAULT_BATCH, num_items)
        return max(most // num_processes, 1) * num_processes

    def count_steps(self, num_items: int, batch_size: int) -> int:
        """Steps of the whole run; an epoch leaves the last, smaller batch out."""
        if self.steps is not None:
            return self.steps
        per_epoch = num_items // batch_size
        if self.epochs is not None:
            return max(1, round(self.epochs * per_epoch))
        return max(LEAST_DEFAULT_STEPS, DEFAULT_EPOCHS * per_epoch)

    def space_evaluations(self, num_steps: int) -> int:
        """Steps between two looks at the held-out images."""
        return self.evaluate_every or max(1, num_steps // _NUM_EVALUATIONS)
