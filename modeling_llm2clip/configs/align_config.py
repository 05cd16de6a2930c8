"""Options of stage 3, the alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .config_fields import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class AlignConfig(TrainingConfig):
    """Options of `align`: the trained parts, the data and the duration (paper, section 3.2)."""

    without_flags = (
        "early_stopping_patience", "eval_steps", "inherit_steps", "keep_weight",
        "long_caption_ratio", "lora_rank", "loss_chunk_size", "max_grad_norm", "structure_weight",
        "vision_learning_rate", "weight_decay",
    )  # fmt: skip

    vision_training: Literal["frozen", "lora", "full"] = "frozen"
    """Trained part of the vision tower: nothing, a LoRA on its attention, or everything."""
    text_training: Literal["stored", "frozen-online", "lora"] = "stored"
    """Source of caption embeddings: the caption store, without loading the LLM; the frozen LLM at
    each step; or the LLM with a LoRA that is trained end to end."""
    lock_text: bool = False
    """Train the image side alone: text adapter and text projection stay as they are, and so does
    every embedding of a text, bit for bit."""
    projection_init: Literal["auto", "model", "cca"] = "auto"
    """Start of the projections: the model's own weights, or the canonical correlation of the stored
    embeddings. auto is cca if both stores are given; for a model with trained projections it is the
    start with the lower held-out loss."""
    inherit_steps: Annotated[int, Interval(ge=0)] = 300
    """Steps in which text adapter and text projection learn the embeddings of `--inherit-from`,
    from the closed form; 0 for the closed form alone (ProCLIP, arXiv:2510.18795)."""
    loss: str = "contrastive"
    """Name of the loss, one of `training/losses/loss.py`."""
    matryoshka_dims: tuple[Annotated[int, Interval(ge=1)], ...] = ()
    """Numbers of first dimensions whose embeddings are trained, too, so that they can be cut to
    these sizes (arXiv:2205.13147). Default: none."""
    distillation_weight: Annotated[float, Interval(ge=0)] = 0.0
    """Weight of the distance of a trained vision tower from its frozen self, whose embeddings the
    image store has; without one, it runs beside the trained one (ProCLIP, arXiv:2510.18795)."""
    structure_weight: Annotated[float, Interval(ge=0)] = 0.0
    """Weight of the change of neighborhoods by the projections, for small data (STRUCTURE,
    arXiv:2506.16895, whose authors use 10)."""
    keep_texts: str | None = None
    """Texts that stay where the vision tower's own CLIP, `--teacher`, has them, such as class names
    and frequent queries: a file as `tag` reads labels, one per line, or NAME=FOLDER of a dataset
    for classification. Each is kept bare and in the templates of classification. Default: none."""
    keep_weight: Annotated[float, Interval(ge=0)] = 10.0
    """Weight of the squared error of kept texts, of which each step reads up to 256. The held-out
    loss leaves them out."""
    max_steps: Annotated[int, Interval(ge=0)] | None = None
    """Number of steps; 0 writes the closed form without training. Default: set by
    `num_train_epochs`."""
    num_train_epochs: Annotated[float, Interval(gt=0)] | None = None
    """Passes over the data. Default: 10, and at least 300 steps."""
    global_batch_size: Annotated[int, Interval(ge=2)] | None = None
    """Records per batch over all processes; an image has one record per language. Default: 512, or
    less if the data are smaller."""
    learning_rate: Annotated[float, Interval(gt=0)] | None = None
    """Peak learning rate of adapter, projections and LoRAs. Default: 1e-4 from a trained model or
    a closed-form start, 1e-3 from random weights."""
    vision_learning_rate: Annotated[float, Interval(gt=0)] | None = None
    """Peak learning rate of a fully trained vision tower. Default: `learning_rate`."""
    layer_decay: Annotated[float, Interval(gt=0, le=1)] = 0.85
    """Factor of the learning rate from each layer of a fully trained vision tower to the layer
    below; 1 for equal rates."""
    warmup_steps: Annotated[float, Interval(ge=0)] = 0.1
    """Steps until the learning rate reaches its peak. Below 1, a share of the run, and at least 20
    steps, so that a very short run stays below the peak. 0 for none."""
    weight_decay: Annotated[float, Interval(ge=0)] = 0.05
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Interval(gt=0)] = 1.0
    """Maximum norm of the gradient."""
    image_noise: Annotated[float, Interval(ge=0)] = 1.0
    """Standard deviation of the noise on stored image embeddings, as a share of their length;
    reduces overfitting on small data."""
    caption_noise: Annotated[float, Interval(ge=0)] = 0.5
    """Standard deviation of the noise on stored caption embeddings, as a share of their length."""
    long_caption_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Probability that an image with short and long captions uses a long one."""
    held_out_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Share of the groups of images that is held out to choose the weights, at most 1,000 groups
    and in small data at least 20; 0 for none."""
    refit: bool | None = None
    """After held-out images have chosen the weights, fit once more on all images with the chosen
    shrinkages, number of steps and share of the way from the start. Default: only if both stores
    are given, because otherwise the towers run twice as often."""
    zero_shot: str | None = None
    """Labeled images that weights classify, too, before, during and after: NAME=FOLDER of a dataset
    for classification, such as image-folder=FOLDER. Default: none."""
    choose_by: Literal["loss", "zero_shot"] = "loss"
    """Score that chooses the weights: the lowest loss on the held-out images, or the highest
    accuracy on the labeled ones."""
    eval_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between evaluations on the held-out images. Default: a twentieth of the run."""
    early_stopping_patience: Annotated[int, Interval(ge=0)] = 6
    """Stop after this many evaluations in a row without a better score (choose_by); 0 for never."""
    loss_chunk_size: Annotated[int, Interval(ge=1)] | None = None
    """Rows of the logits computed at a time. Default: all at once."""
    lora_rank: Annotated[int, Interval(ge=1)] | None = None
    """Rank of the LoRAs. Default: 16 in the LLM, 32 in the vision tower. Their alpha is twice the
    rank in the LLM, and the rank in the vision tower."""
    num_workers: Annotated[int, Interval(ge=0)] | None = None
    """Processes that decode images or tokenize captions; 0 for none. Default: this process's share
    of the cores, at most 8, if images are decoded for a GPU; otherwise none."""
    save_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between checkpoints; the last step has one too. Default: 500, or as many more as take
    five minutes."""
    logging_steps: Annotated[int, Interval(ge=1)] = 10
    """Steps between lines of metrics."""

    def _list_conflicts(self) -> dict[str, object]:
        ways = f"vision_training={self.vision_training} and text_training={self.text_training}"
        kept = "lock_text" if self.lock_text else "projection_init=model"
        return {
            **super()._list_conflicts(),
            f"max_steps=0 with {kept} writes the model as it is. Train it.": (
                self.max_steps == 0 and (self.lock_text or self.projection_init == "model")
            ),
            f"matryoshka_dims has a size twice: {self.matryoshka_dims}. Give each once.": (
                len(set(self.matryoshka_dims)) < len(self.matryoshka_dims)
            ),
            "lock_text keeps texts as they are, and text_training=lora trains the LLM.": (
                self.lock_text and self.text_training == "lora"
            ),
            "lock_text keeps the text projection, and projection_init=cca fits a new one.": (
                self.lock_text and self.projection_init == "cca"
            ),
            "lock_text keeps every text as it is. Leave keep_texts out.": (
                self.lock_text and self.keep_texts
            ),
            "keep_texts reads its texts by the LLM once, and text_training=lora trains the LLM.": (
                self.keep_texts and self.text_training == "lora"
            ),
            "keep_texts needs the image projection of CLIP, and projection_init=cca fits a new "
            "one.": self.keep_texts and self.projection_init == "cca",
            "max_steps=0 trains nothing, so that it keeps nothing either. Leave keep_texts out.": (
                self.keep_texts and self.max_steps == 0
            ),
            "keep_weight weighs keep_texts. Give a list, or leave it out.": (
                "keep_weight" in self.list_given() and not self.keep_texts
            ),
            "distillation_weight keeps a trained vision tower near its frozen self, and "
            "vision_training=frozen trains none. Choose vision_training=lora or full.": (
                self.distillation_weight and self.vision_training == "frozen"
            ),
            f"vision_learning_rate needs vision_training=full, not {ways}.": (
                self.vision_learning_rate and self.vision_training != "full"
            ),
            f"lora_rank needs vision_training=lora or text_training=lora, not {ways}.": (
                self.lora_rank and "lora" not in (self.vision_training, self.text_training)
            ),
            "choose_by=zero_shot needs labeled images: zero_shot=NAME=FOLDER.": (
                self.choose_by == "zero_shot" and not self.zero_shot
            ),
            "zero_shot is measured with held-out images, and held_out_ratio=0 has none.": (
                self.zero_shot and not self.held_out_ratio
            ),
            "refit=True needs held-out images to choose by, and held_out_ratio=0 has none.": (
                self.refit and not self.held_out_ratio
            ),
        }

    def require_stores(
        self, caption_store: object, image_store: object, inherit_from: object = None
    ) -> None:
        """Refuse options that contradict the stores that are given.

        Args:
            caption_store: A store of captions, in any form; None for none.
            image_store: A store of images.
            inherit_from: A store of a teacher's embeddings of the captions.

        Raises:
            ValueError: A store is missing or of no use; all that is wrong is named.
        """
        stores = (caption_store, image_store, inherit_from)
        captions, images, teacher = (store is not None for store in stores)
        is_frozen = self.vision_training == "frozen"
        is_stored = captions and images and is_frozen
        needs_both = "needs a caption_store and an image_store, and vision_training=frozen"
        refused = {
            "inherit_steps needs inherit_from, the store of a teacher (in a recipe, "
            "inherit=True)": (not teacher and "inherit_steps" in self.list_given()),
            "lock_text keeps the text side as it is, and inherit_from trains it": (
                teacher and self.lock_text
            ),
            "inherit_from is a start of its own: leave projection_init out": (
                teacher and self.projection_init != "auto"
            ),
            "inherit_from needs a caption_store, whose embeddings learn the teacher's": (
                teacher and not captions
            ),
            "text_training=stored needs a caption_store, which llm2clip extract writes; or choose "
            "text_training=frozen-online or text_training=lora": (
                self.text_training == "stored" and not captions
            ),
            f"text_training={self.text_training} runs the LLM and reads no caption_store": (
                self.text_training != "stored" and captions
            ),
            f"vision_training={self.vision_training} changes the image embeddings, so an "
            "image_store is of no use without distillation_weight": (
                images and not (is_frozen or self.distillation_weight)
            ),
            f"image_noise={self.image_noise} is noise on stored embeddings: give an image_store "
            "and vision_training=frozen, or leave it out": (
                self.image_noise != 0
                and "image_noise" in self.list_given()
                and not (images and is_frozen)
            ),
            f"caption_noise={self.caption_noise} is noise on stored embeddings: give a "
            "caption_store, or leave it out": (
                self.caption_noise != 0 and "caption_noise" in self.list_given() and not captions
            ),
            f"projection_init=cca {needs_both}": self.projection_init == "cca" and not is_stored,
            f"max_steps=0 writes the closed form, which {needs_both}": (
                self.max_steps == 0 and not is_stored
            ),
        }
        if errors := [message for message, is_refused in refused.items() if is_refused]:
            raise ValueError("; ".join(errors) + ".")
