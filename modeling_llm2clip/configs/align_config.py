"""Options for stage 3, the alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .config_fields import TrainingConfig
from .encoding_config import JpegConfig


@dataclass(frozen=True, kw_only=True)
class AlignConfig(TrainingConfig, JpegConfig):
    """Options for `align`: what to train, on what data and how long (paper, section 3.2)."""

    without_flags = (
        "beta2", "compile", "deterministic", "early_stopping_patience", "eval_steps",
        "inherit_steps", "jpeg_decoding", "keep_weight", "long_caption_ratio", "lora_rank",
        "loss_chunk_size", "loss_precision", "max_grad_norm", "min_crop_area", "mini_batch_size",
        "structure_weight", "vision_learning_rate", "weight_decay",
    )  # fmt: skip

    vision_training: Literal["frozen", "lora", "full"] = "frozen"
    """Part of the vision tower to train: nothing (frozen), a LoRA on its attention (lora), or all
    of it (full)."""
    text_training: Literal["stored", "frozen-online", "lora"] = "stored"
    """Source of caption embeddings: the caption store, without loading the LLM (stored); the frozen
    LLM, run at every step (frozen-online); or the LLM, trained end to end with a LoRA (lora)."""
    lock_text: bool = False
    """Train only the image side. The text adapter and text projection stay fixed, so every text
    embedding remains bit-identical."""
    projection_init: Literal["auto", "model", "cca"] = "auto"
    """Initial projections: the model's own weights (model), or a canonical correlation analysis of
    the stored embeddings (cca). auto uses cca if both stores are given; if the model's projections
    are already trained, it uses whichever start has the lower held-out loss."""
    inherit_steps: Annotated[int, Interval(ge=0)] = 300
    """Steps that train the text adapter and text projection to match the embeddings in
    `inherit_from`, starting from a closed-form fit; 0 uses only the closed-form fit (ProCLIP,
    arXiv:2510.18795)."""
    loss: str = "contrastive"
    """Loss to train with: contrastive, sigmoid, or another name registered in
    `training/losses/loss.py`."""
    matryoshka_dims: tuple[Annotated[int, Interval(ge=1)], ...] = ()
    """Smaller embedding sizes to train as well, so embeddings can be truncated to them (Matryoshka,
    arXiv:2205.13147). Default: none."""
    distillation_weight: Annotated[float, Interval(ge=0)] = 0.0
    """Weight of the self-distillation loss, which keeps the embeddings of a trained vision tower
    close to the original tower's. The original embeddings are read from the image store; without
    one, a frozen copy of the tower computes them at every step (ProCLIP, arXiv:2510.18795)."""
    structure_weight: Annotated[float, Interval(ge=0)] = 0.0
    """Weight of a loss that makes the projections preserve each embedding's neighbors, for small
    datasets (STRUCTURE, arXiv:2506.16895; its authors use 10)."""
    keep_texts: str | None = None
    """Texts, such as class names and frequent queries, to keep close to their embeddings by the
    CLIP model that contains the vision tower (`--teacher`): a file of labels, as for `tag`, or
    NAME=FOLDER of a classification dataset. Each text is kept both on its own and in the
    classification templates. Default: none."""
    keep_weight: Annotated[float, Interval(ge=0)] = 10.0
    """Weight of the squared error on up to 256 kept texts per step. The held-out loss does not
    include this error."""
    max_steps: Annotated[int, Interval(ge=0)] | None = None
    """Number of training steps; 0 writes the closed-form solution without training. Default: set by
    `num_train_epochs`."""
    num_train_epochs: Annotated[float, Interval(gt=0)] | None = None
    """Number of passes over the data. Default: 10, but at least 300 steps."""
    global_batch_size: Annotated[int, Interval(ge=2)] | None = None
    """Records per batch across all processes; an image has one record per language. Default: 512,
    or fewer if there are fewer training records."""
    mini_batch_size: Annotated[int, Interval(ge=1)] | None = None
    """Images and captions that towers encode at a time on each process, with gradient caching
    (arXiv:2101.06983), so a batch of any size fits into memory. A trained tower runs twice as
    often. Default: the whole batch at once."""
    learning_rate: Annotated[float, Interval(gt=0)] | None = None
    """Peak learning rate of the adapter, projections and LoRAs. Default: 1e-4 from a trained model
    or a closed-form start, 1e-3 from random weights."""
    vision_learning_rate: Annotated[float, Interval(gt=0)] | None = None
    """Peak learning rate of a vision tower whose weights are all trained. Default:
    `learning_rate`."""
    layer_decay: Annotated[float, Interval(gt=0, le=1)] = 0.85
    """Layer-wise learning rate decay for a fully trained vision tower: each layer trains at this
    multiple of the learning rate of the layer above it. 1 uses the same rate for all layers."""
    warmup_steps: Annotated[float, Interval(ge=0)] = 0.1
    """Warmup steps until the learning rate reaches its peak. A value below 1 is a share of the run,
    but at least 20 steps, so very short runs never reach the peak. 0 disables warmup."""
    weight_decay: Annotated[float, Interval(ge=0)] = 0.05
    """AdamW weight decay."""
    beta2: Annotated[float, Interval(gt=0, lt=1)] = 0.98
    """AdamW decay of the squared gradients: 0.98 as for CLIP (arXiv:2103.00020, table 18);
    LLM2CLIP's released training code uses 0.999."""
    max_grad_norm: Annotated[float, Interval(gt=0)] = 1.0
    """Maximum gradient norm; larger gradients are clipped."""
    min_crop_area: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """Train on random crops of the decoded images that keep at least this share of the area, before
    the image processor's own center crop; LLM2CLIP's released training code uses 0.9. Default: no
    crops."""
    image_noise: Annotated[float, Interval(ge=0)] = 1.0
    """Norm of the Gaussian noise added to each stored image embedding, relative to the embedding's
    norm. Reduces overfitting on small datasets."""
    caption_noise: Annotated[float, Interval(ge=0)] = 0.5
    """Norm of the Gaussian noise added to each stored caption embedding, relative to the
    embedding's norm."""
    long_caption_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Probability of using a long caption for an image that has both short and long ones."""
    held_out_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Share of image groups to hold out for choosing the weights: at most 1,000 groups, and at
    least 20 or a fifth of all groups, whichever is fewer. 0 holds out none."""
    refit: bool | None = None
    """After choosing weights on held-out images, train again on all images, with the same
    shrinkage, number of steps and interpolation from the start. Default: only if both stores are
    given; otherwise, the second training would run the towers again."""
    zero_shot: str | None = None
    """Labeled images for measuring zero-shot accuracy before, during and after training:
    NAME=FOLDER of a classification dataset, such as image-folder=FOLDER. Default: none."""
    choose_by: Literal["loss", "zero_shot", "last_step"] = "loss"
    """Criterion for choosing the weights: the lowest loss on the held-out images (loss), the
    highest accuracy on the labeled ones (zero_shot), or the last step, whatever its scores
    (last_step)."""
    eval_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between evaluations on the held-out images. Default: one twentieth of the run."""
    early_stopping_patience: Annotated[int, Interval(ge=0)] = 6
    """Stop after this many evaluations in a row without a better `choose_by` score; 0 never stops
    early."""
    loss_chunk_size: Annotated[int, Interval(ge=1)] | None = None
    """Number of logit rows to compute at a time; smaller chunks save memory. Default: all at once.
    """
    loss_precision: Literal["float32", "tf32"] = "float32"
    """Precision in which a GPU multiplies the float32 matrices of the loss, which takes most of a
    step if a batch has tens of thousands of stored embeddings: exact (float32), or several times
    faster with operands rounded to 10 bits (tf32). Evaluation is always exact."""
    lora_rank: Annotated[int, Interval(ge=1)] | None = None
    """LoRA rank. Default: 16 in the LLM, 32 in the vision tower. LoRA alpha is twice the rank in
    the LLM and equal to the rank in the vision tower."""
    num_workers: Annotated[int, Interval(ge=0)] | None = None
    """Number of worker processes that decode images or tokenize captions; 0 uses none. Default: if
    images are decoded for a GPU, this process's share of the CPU cores, at most 32; otherwise none.
    """
    save_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between checkpoints; the last step is always saved. Default: 500, or more if 500 steps
    take less than five minutes."""
    logging_steps: Annotated[int, Interval(ge=1)] = 10
    """Steps between logged metrics."""

    def _list_conflicts(self) -> dict[str, object]:
        ways = f"vision_training={self.vision_training} and text_training={self.text_training}"
        kept = "lock_text" if self.lock_text else "projection_init=model"
        return {
            **super()._list_conflicts(),
            f"max_steps=0 with {kept} leaves the model unchanged. Raise max_steps.": (
                self.max_steps == 0 and (self.lock_text or self.projection_init == "model")
            ),
            f"matryoshka_dims has duplicates: {self.matryoshka_dims}. List each once.": (
                len(set(self.matryoshka_dims)) < len(self.matryoshka_dims)
            ),
            "lock_text cannot be combined with text_training=lora, which trains the LLM.": (
                self.lock_text and self.text_training == "lora"
            ),
            "lock_text cannot be combined with projection_init=cca, which replaces the text "
            "projection.": self.lock_text and self.projection_init == "cca",
            "keep_texts has no effect with lock_text, which keeps all texts. Leave it out.": (
                self.lock_text and self.keep_texts
            ),
            "keep_texts cannot be combined with text_training=lora: its embeddings are computed "
            "once, before training.": self.keep_texts and self.text_training == "lora",
            "keep_texts cannot be combined with projection_init=cca, which replaces CLIP's image "
            "projection.": self.keep_texts and self.projection_init == "cca",
            "keep_texts has no effect with max_steps=0. Leave it out.": (
                self.keep_texts and self.max_steps == 0
            ),
            "keep_weight has no effect without keep_texts. Set keep_texts as well.": (
                "keep_weight" in self.list_given() and not self.keep_texts
            ),
            "distillation_weight has no effect with vision_training=frozen. Choose "
            "vision_training=lora or full.": (
                self.distillation_weight and self.vision_training == "frozen"
            ),
            "loss_precision=tf32 cannot be combined with precision=float32, which keeps all "
            "matrix products exact. Leave one out.": (
                self.loss_precision == "tf32" and self.precision == "float32"
            ),
            f"vision_learning_rate needs vision_training=full, not {ways}.": (
                self.vision_learning_rate and self.vision_training != "full"
            ),
            f"lora_rank needs vision_training=lora or text_training=lora, not {ways}.": (
                self.lora_rank and "lora" not in (self.vision_training, self.text_training)
            ),
            "choose_by=zero_shot needs labeled images. Set zero_shot=NAME=FOLDER.": (
                self.choose_by == "zero_shot" and not self.zero_shot
            ),
            "zero_shot needs held-out images as well. Raise held_out_ratio above 0.": (
                self.zero_shot and not self.held_out_ratio
            ),
            "refit=True needs held-out images. Raise held_out_ratio above 0.": (
                self.refit and not self.held_out_ratio
            ),
        }

    def require_stores(
        self, caption_store: object, image_store: object, inherit_from: object = None
    ) -> None:
        """Refuse options that conflict with the stores passed to `align`.

        Args:
            caption_store: Store of caption embeddings; only whether it is None matters.
            image_store: Store of image embeddings.
            inherit_from: Store of a teacher's caption embeddings.

        Raises:
            ValueError: A store is missing or has no effect; the message lists all conflicts.
        """
        stores = (caption_store, image_store, inherit_from)
        captions, images, teacher = (store is not None for store in stores)
        is_frozen = self.vision_training == "frozen"
        is_stored = captions and images and is_frozen
        needs_both = "needs a caption_store, an image_store and vision_training=frozen"
        refused = {
            "inherit_steps needs inherit_from, a teacher's store (in a recipe, inherit=True)": (
                not teacher and "inherit_steps" in self.list_given()
            ),
            "lock_text cannot be combined with inherit_from, which trains the text side": (
                teacher and self.lock_text
            ),
            "inherit_from already determines the initial projections: leave projection_init out": (
                teacher and self.projection_init != "auto"
            ),
            "inherit_from needs a caption_store with embeddings of the same captions": (
                teacher and not captions
            ),
            "text_training=stored needs a caption_store: write one with llm2clip extract, or "
            "choose text_training=frozen-online or text_training=lora": (
                self.text_training == "stored" and not captions
            ),
            f"text_training={self.text_training} runs the LLM, so the caption_store has no "
            "effect: leave it out": self.text_training != "stored" and captions,
            f"vision_training={self.vision_training} changes the image embeddings, so the "
            "image_store has no effect without distillation_weight": (
                images and not (is_frozen or self.distillation_weight)
            ),
            f"image_noise={self.image_noise} applies to stored embeddings: pass an image_store "
            "with vision_training=frozen, or leave image_noise out": (
                self.image_noise != 0
                and "image_noise" in self.list_given()
                and not (images and is_frozen)
            ),
            f"caption_noise={self.caption_noise} applies to stored embeddings: pass a "
            "caption_store, or leave caption_noise out": (
                self.caption_noise != 0 and "caption_noise" in self.list_given() and not captions
            ),
            f"jpeg_decoding={self.jpeg_decoding} applies to decoded images, but the image_store "
            "replaces them: leave jpeg_decoding out": (
                self.jpeg_decoding != "full" and images and is_frozen
            ),
            f"min_crop_area={self.min_crop_area} cannot be combined with an image_store, whose "
            "embeddings are of whole images": self.min_crop_area and images,
            f"mini_batch_size={self.mini_batch_size} has no effect if both sides are stored and no "
            "tower runs: leave it out": self.mini_batch_size and is_stored,
            "compile=True has no effect if both sides are stored and no tower runs: leave it out": (
                self.compile and is_stored
            ),
            f"projection_init=cca {needs_both}": self.projection_init == "cca" and not is_stored,
            f"max_steps=0 writes the closed-form solution, which {needs_both}": (
                self.max_steps == 0 and not is_stored
            ),
        }
        if errors := [message for message, is_refused in refused.items() if is_refused]:
            raise ValueError("; ".join(errors) + ".")
