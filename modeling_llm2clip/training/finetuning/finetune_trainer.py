"""The LLM with a LoRA as a sentence-transformers module, its trainer, and the LoRA's files.

The sentence-transformers module exists only during training; only the LoRA is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Module
from torch import Tensor, nn
from transformers import TrainerCallback

from ...building.lora_merging import BASE_WEIGHTS, PLAIN_STARTS, is_same_base
from ...configs.finetune_config import FinetuneConfig
from ...data.captions.caption_groups import CaptionGroup
from ...data.key_arrays import Array
from ...data.safetensors_files import serialize_tensors
from ...encoding.encode import encode_texts
from ...evaluation.tasks.retrieval import measure_caption_retrieval
from ...model_folders.model_folder import LORA_CONFIG, LORA_WEIGHTS
from ...modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from ...processing_llm2clip import LLM2CLIPProcessor, check_texts
from ..run_folder import METRICS_FILE, require_finite_weights
from ..trainer_mixins import (
    JsonLinesCallback,
    StageTrainerMixin,
    add_lora,
    count_warmup_steps,
    find_pooler,
    training_arguments_on,
)
from .finetune_data import FinetuneData
from .pair_sampling import (
    NoDuplicateGroupsBatchSampler,
    PairCollator,
    WeightedBatchSampler,
    count_table_batches,
)

_SHORT_RUN = 200  # shorter runs log every step
# Value of `negatives` → directions of sentence-transformers' loss, and their reduction.
_DIRECTIONS = {
    "query-to-doc": (("query_to_doc",), "joint"),
    "symmetric": (("query_to_doc", "doc_to_query"), "per_direction"),
    "all": (("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), "joint"),
}
# LoRA options that change its effect without changing the shapes of its weights.
_MEANING = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication",
)  # fmt: skip
# Initializations that leave the base weights unchanged, as ours does.
_LEAVE_BASE_UNCHANGED = (*PLAIN_STARTS, "orthogonal", "eva")


class CaptionEncoder(Module):  # type: ignore[misc]  # sentence-transformers is typed in part
    """Sentence-transformers module that maps tokens to unprojected caption embeddings.

    The LoRA layers are added to the LLM in place; all other weights are frozen.
    """

    save_in_root = True  # makes a checkpoint a LoRA folder

    def __init__(
        self,
        model: LLM2CLIPModel | LLM2CLIPTextModel,
        processor: LLM2CLIPProcessor,
        lora: LoraConfig,
    ) -> None:
        super().__init__()
        self.llm2clip = model.requires_grad_(False)
        self.llm2clip.packs_in_training = True
        self.processor = processor
        self.tokenizer = processor.tokenizer
        lora.exclude_modules = find_pooler(model.text_model)
        # The wrapper changes the LLM in place and is needed to write the LoRA. The list hides it
        # from torch, which would otherwise register the same parameters twice.
        self._adapted: list[PeftModel] = [add_lora(model.text_model, lora)]

    @property
    def adapted(self) -> PeftModel:
        return self._adapted[0]

    @property
    def trained_weights(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.adapted.named_parameters() if p.requires_grad}

    @property
    def modalities(self) -> list[str]:
        """Supported modalities, for sentence-transformers."""
        return ["text"]

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> Any:
        """Tokenize captions with the model's prompt."""
        if prompt:
            raise ValueError(f"Captions are trained without an instruction, not {prompt!r}.")
        check_texts(list(inputs))
        return dict(self.processor(text=list(inputs)))

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        features["sentence_embedding"] = self.llm2clip.get_caption_embeds(
            features["input_ids"], features.get("attention_mask")
        )
        return features

    def sum_of_two(self) -> Tensor:
        """Return the sum of two text embeddings, a scalar that depends on all trained weights."""
        features = self.preprocess(["a dog", "two red apples on a wooden table"])
        return self.forward(features)["sentence_embedding"].sum()

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        _save_lora(self.adapted, output_path)

    def load_lora(self, folder: Path) -> None:
        require_same_meaning(folder, self.adapted.peft_config["default"])
        base = str(self.llm2clip.text_model.config._name_or_path or "")
        stated = str(LoraConfig.from_pretrained(str(folder)).base_model_name_or_path or "")
        if stated and base and not is_same_base(stated, base):  # either may be unknown
            raise ValueError(
                f"{folder} is for the base {stated!r}, but the LLM is {base!r}. Start from a LoRA "
                "for this LLM, or leave init_lora out."
            )
        result = set_peft_model_state_dict(self.adapted, load_file(folder / LORA_WEIGHTS))
        missing = [key for key in result.missing_keys if "lora_" in key]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"{folder} does not fit this LLM and LoRA: missing {missing[:5]}, unexpected "
                f"{result.unexpected_keys[:5]}."
            )

    def encode(self, captions: list[str]) -> Tensor:
        """Encode many captions without gradients, in evaluation mode."""
        was_training = self.llm2clip.training
        self.llm2clip.eval()  # type: ignore[no-untyped-call]
        try:
            return encode_texts(self.llm2clip, self.processor, captions, project=False)
        finally:
            self.llm2clip.train(was_training)


def make_lora_config(config: FinetuneConfig) -> LoraConfig:
    targets = list(config.lora_target_modules)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="FEATURE_EXTRACTION",
    )


def write_lora(
    encoder: CaptionEncoder, folder: Path, *, dtype: torch.dtype, base_weights: str | None
) -> None:
    """Write the LoRA in peft's format."""
    name_base_without_path(encoder.adapted)
    _save_lora(encoder.adapted, str(folder))
    file = folder / LORA_WEIGHTS
    weights = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    metadata = {"format": "pt", **({} if base_weights is None else {BASE_WEIGHTS: base_weights})}
    file.write_bytes(serialize_tensors(weights, metadata))
    file.chmod(0o644)  # peft's file is only readable by its owner
    (folder / "README.md").unlink(missing_ok=True)  # peft writes an empty template


def _save_lora(adapted: PeftModel, folder: str) -> None:
    """Write a LoRA without asking the Hub for a changed vocabulary, as peft does by default."""
    adapted.save_pretrained(folder, save_embedding_layers=False)
    file = Path(folder) / LORA_CONFIG
    config = json.loads(file.read_text("utf-8"))
    # peft writes an unordered set, so sort it to make the file reproducible.
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def name_base_without_path(adapted: PeftModel) -> None:
    """Replace the base model's local path with its last component, in case the LoRA is shared."""
    config = adapted.peft_config["default"]
    base = Path(str(config.base_model_name_or_path))
    if base.exists():
        config.base_model_name_or_path = base.name


def require_same_meaning(folder: Path, config: LoraConfig) -> None:
    """Require that a LoRA's weights have the same effect under this run's options.

    With different options, the weights would load without an error but act differently.
    """
    for name in (LORA_CONFIG, LORA_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}. Choose a LoRA folder.")
    saved = LoraConfig.from_pretrained(str(folder))
    pairs = {name: (getattr(saved, name, None), getattr(config, name, None)) for name in _MEANING}
    errors = [
        f"{name}={value!r} instead of {expected!r}"
        for name, (value, expected) in pairs.items()
        if (value or None) != (expected or None)  # None, 0 and empty values are equivalent
    ]
    if saved.init_lora_weights not in _LEAVE_BASE_UNCHANGED:
        errors.append(f"init_lora_weights={saved.init_lora_weights!r}, which changes its base")
    if errors:
        raise ValueError(
            f"{folder} does not match this run: {'; '.join(errors)}. Set lora_rank to the LoRA's "
            "rank; other differences are not supported."
        )


class FinetuneTrainer(
    StageTrainerMixin,
    SentenceTransformerTrainer,  # type: ignore[misc]
):
    """Trainer that saves and loads only the LoRA instead of a whole model, and stops at NaN.

    The whole run is a single epoch to this trainer; see `WeightedBatchSampler`. Token ids stay on
    the CPU, so the loss can split mini-batches and the model can check and pack them without
    synchronizing the device. Only DistributedDataParallel copies token ids to the device by itself.
    """

    encoder: CaptionEncoder
    steps_per_epoch: int

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log metrics, with the number of passes over the data as the epoch."""
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        super().log(logs, *args, **kwargs)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Skip the model card, because this LoRA is not published as is."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_finite_weights(self.encoder.trained_weights, step=self.state.global_step)
        super()._save_checkpoint(model, trial)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:  # called on every process, but only one writes
            super()._save(*args, **kwargs)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        self.encoder.load_lora(Path(checkpoint_path))

    def get_train_dataloader(self) -> Any:
        self.accelerator.device_placement = False
        return super().get_train_dataloader()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Gradient caching restores dropout's random state only on the devices of its inputs.
        markers = {
            f"{name.removesuffix('input_ids')}device": torch.empty(
                len(ids), 0, device=self.args.device
            )
            for name, ids in inputs.items()
            if name.endswith("_input_ids")
        }
        return {**inputs, **markers}

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return self.watch_loss(super().compute_loss(*args, **kwargs))


class _CaptionRetrieval(BaseEvaluator):  # type: ignore[misc]
    """Caption retrieval accuracy as an evaluator for sentence-transformers' trainer."""

    def __init__(self, encoder: CaptionEncoder, groups: Sequence[CaptionGroup]) -> None:
        super().__init__()
        self.encoder, self.groups = encoder, groups
        self.primary_metric = "cra"

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        return {"cra": measure_caption_retrieval(self.encoder.encode, self.groups)}


def count_run_steps(num_rows: Sequence[int], config: FinetuneConfig) -> tuple[int, int]:
    """Return the number of steps in the whole run and in one epoch, by the rows of each table."""
    window_size = config.per_device_train_batch_size * PartialState().num_processes
    weights = [1.0, *(weight for _, weight in config.text_pairs)]
    steps_per_epoch = sum(count_table_batches(num_rows, weights, window_size))
    num_steps = config.max_steps or max(1, round(config.num_train_epochs * steps_per_epoch))
    return num_steps, steps_per_epoch


def make_trainer(
    encoder: CaptionEncoder,
    data: FinetuneData,
    nearest: Array | None,
    output: Path,
    config: FinetuneConfig,
    callbacks: Sequence[TrainerCallback],
) -> FinetuneTrainer:
    device = encoder.llm2clip.device
    wrapped = SentenceTransformer(modules=[encoder], device=str(device))
    num_steps, steps_per_epoch = count_run_steps([*data.tables.num_rows.values()], config)
    arguments = training_arguments_on(
        device,
        SentenceTransformerTrainingArguments,
        output,
        config,
        max_steps=num_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=count_warmup_steps(config.warmup_steps, num_steps),
        lr_scheduler_type="cosine",
        batch_sampler=partial(
            NoDuplicateGroupsBatchSampler,
            nearest=nearest,
            num_hard_negatives=config.num_hard_negatives,
        ),
        multi_dataset_batch_sampler=partial(
            WeightedBatchSampler,
            weights=[1.0, *(weight for _, weight in config.text_pairs)],
            num_steps=num_steps,
        ),
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        logging_steps=config.logging_steps or (1 if num_steps < _SHORT_RUN else 10),
        dataloader_drop_last=True,
    )
    trainer = FinetuneTrainer(
        model=wrapped,
        args=arguments,
        train_dataset=data.tables,
        loss=_make_loss(wrapped, config),
        evaluator=_CaptionRetrieval(encoder, data.held_out) if config.eval_steps else None,
        data_collator=PairCollator(wrapped.preprocess),
        callbacks=[JsonLinesCallback(output / METRICS_FILE), *callbacks],
    )
    trainer.encoder, trainer.steps_per_epoch = encoder, steps_per_epoch
    return trainer


def _make_loss(wrapped: Any, config: FinetuneConfig) -> nn.Module:
    directions, partition_mode = _DIRECTIONS[config.negatives]
    options: dict[str, Any] = {
        "scale": config.scale,
        "directions": directions,
        "partition_mode": partition_mode,
        "gather_across_devices": PartialState().num_processes > 1,
    }
    if config.mini_batch_size is None:
        return MultipleNegativesRankingLoss(wrapped, **options)  # type: ignore[no-any-return]
    return CachedMultipleNegativesRankingLoss(  # type: ignore[no-any-return]
        wrapped, mini_batch_size=config.mini_batch_size, **options
    )
