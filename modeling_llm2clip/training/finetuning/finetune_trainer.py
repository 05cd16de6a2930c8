"""The LLM with a LoRA as a module of sentence-transformers, its trainer, and the LoRA's files.

The module exists only during training; what is written is the LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
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
from ..run_folder import METRICS_FILE, require_finite
from ..trainer_mixins import (
    JsonLinesCallback,
    StageTrainerMixin,
    count_warmup_steps,
    find_pooler,
    training_arguments_on,
)
from .finetune_data import FinetuneData
from .pair_sampling import (
    NoDuplicateGroupsBatchSampler,
    PairCollator,
    WeightedBatchSampler,
    count_steps,
)

_SHORT_RUN = 200  # shorter runs log every step
# Value of `negatives` → what sentence-transformers' loss compares, and how it sums up.
_DIRECTIONS = {
    "query-to-doc": (("query_to_doc",), "joint"),
    "symmetric": (("query_to_doc", "doc_to_query"), "per_direction"),
    "all": (("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), "joint"),
}
# Options of a LoRA that change its effect, and that its weights do not show.
_MEANING = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication",
)  # fmt: skip
# Other initializations change the base weights, which ours does not.
_LEAVE_BASE_UNCHANGED = (*PLAIN_STARTS, "orthogonal", "eva")


class CaptionEncoder(Module):  # type: ignore[misc]  # sentence-transformers is typed in part
    """Tokens to unprojected caption embeddings, as a module of sentence-transformers.

    The LLM gets the LoRA layers in place; all else is frozen.
    """

    save_in_root = True  # so that a checkpoint is a folder of a LoRA

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
        # The wrapper changes the LLM in place. It alone can write a LoRA; in a list, it is no
        # second path to the same parameters.
        self._adapted: list[PeftModel] = [get_peft_model(model.text_model, lora)]

    @property
    def adapted(self) -> PeftModel:
        return self._adapted[0]

    @property
    def trained_weights(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.adapted.named_parameters() if p.requires_grad}

    @property
    def modalities(self) -> list[str]:
        """Texts alone, as sentence-transformers asks."""
        return ["text"]

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> Any:
        """Tokenize captions with the model's prompt."""
        if prompt:
            raise ValueError(f"Captions are trained on without an instruction, got {prompt!r}.")
        check_texts(list(inputs))
        return dict(self.processor(text=list(inputs)))

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        features["sentence_embedding"] = self.llm2clip.get_caption_embeds(
            features["input_ids"], features.get("attention_mask")
        )
        return features

    def sum_of_two(self) -> Tensor:
        """Add up the embeddings of two texts: a number that depends on everything trained."""
        features = self.preprocess(["a dog", "two red apples on a wooden table"])
        return self.forward(features)["sentence_embedding"].sum()

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the LoRA alone."""
        _save_lora(self.adapted, output_path)

    def load_lora(self, folder: Path) -> None:
        require_same_meaning(folder, self.adapted.peft_config["default"])
        base = str(self.llm2clip.text_model.config._name_or_path or "")
        stated = str(LoraConfig.from_pretrained(str(folder)).base_model_name_or_path or "")
        if stated and base and not is_same_base(stated, base):  # else nothing to compare
            raise ValueError(
                f"{folder} is for the base {stated!r}, but the LLM is {base!r}. Begin from a LoRA "
                "of this LLM, or leave init_lora out."
            )
        weights = load_file(folder / LORA_WEIGHTS)
        result = set_peft_model_state_dict(self.adapted, weights)
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
    """Write the LoRA as peft loads it."""
    name_base_without_path(encoder.adapted)
    _save_lora(encoder.adapted, str(folder))
    file = folder / LORA_WEIGHTS
    weights = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    known = {} if base_weights is None else {BASE_WEIGHTS: base_weights}
    file.write_bytes(serialize_tensors(weights, {"format": "pt", **known}))
    file.chmod(0o644)  # peft writes for its owner alone
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template


def _save_lora(adapted: PeftModel, folder: str) -> None:
    """Write a LoRA; by default, peft asks the Hub whether the vocabulary has changed."""
    adapted.save_pretrained(folder, save_embedding_layers=False)
    file = Path(folder) / LORA_CONFIG
    config = json.loads(file.read_text("utf-8"))
    # peft writes a set of names, whose order differs between processes.
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def name_base_without_path(adapted: PeftModel) -> None:
    """Replace the path of the base model by its last part, since a LoRA may be published."""
    config = adapted.peft_config["default"]
    base = Path(str(config.base_model_name_or_path))
    if base.exists():
        config.base_model_name_or_path = base.name


def require_same_meaning(folder: Path, config: LoraConfig) -> None:
    """Require that a LoRA's weights give the same embeddings under this run's options.

    With other options they would load without an error.
    """
    for name in (LORA_CONFIG, LORA_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}. Give the folder of a LoRA.")
    saved = LoraConfig.from_pretrained(str(folder))
    pairs = {name: (getattr(saved, name, None), getattr(config, name, None)) for name in _MEANING}
    errors = [
        f"{name}={value!r}, in this run {expected!r}"
        for name, (value, expected) in pairs.items()
        if (value or None) != (expected or None)  # None, 0 and an empty value are the same
    ]
    if saved.init_lora_weights not in _LEAVE_BASE_UNCHANGED:
        errors.append(f"init_lora_weights={saved.init_lora_weights!r}, which changes its base")
    if errors:
        raise ValueError(
            f"{folder} has {'; '.join(errors)}. Give this run the same lora_rank; "
            "other differences are not supported."
        )


class FinetuneTrainer(
    StageTrainerMixin,
    SentenceTransformerTrainer,  # type: ignore[misc]
):
    """Saves and loads a LoRA where sentence-transformers has a whole model; stops at NaN.

    To this trainer the whole run is one epoch; see `WeightedBatchSampler`. Token ids stay on the
    CPU: there the loss cuts mini-batches and the model checks and packs them, without a wait for
    the device. Only DistributedDataParallel copies them itself.
    """

    encoder: CaptionEncoder
    steps_per_epoch: int

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log metrics, with passes over the data as the epoch."""
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        super().log(logs, *args, **kwargs)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Collect nothing for a model card, since this LoRA is not published as it is."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_finite(self.encoder.trained_weights, step=self.state.global_step)
        super()._save_checkpoint(model, trial)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:  # every process is asked, and one writes
            super()._save(*args, **kwargs)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        self.encoder.load_lora(Path(checkpoint_path))

    def get_train_dataloader(self) -> Any:
        self.accelerator.device_placement = False
        return super().get_train_dataloader()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Gradient caching samples dropout again on the devices of what it is given.
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
    """The caption retrieval accuracy, as sentence-transformers' trainer asks for it."""

    def __init__(self, encoder: CaptionEncoder, groups: Sequence[CaptionGroup]) -> None:
        super().__init__()
        self.encoder, self.groups = encoder, groups
        self.primary_metric = "cra"

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        return {"cra": measure_caption_retrieval(self.encoder.encode, self.groups)}


def count_run_steps(data: FinetuneData, config: FinetuneConfig) -> tuple[int, int]:
    """Count the steps of the whole run, and of an epoch."""
    lengths = [len(table) for table in data.tables.values()]
    window_size = config.per_device_train_batch_size * PartialState().num_processes
    steps_per_epoch = sum(count_steps(lengths, data.weights, window_size))
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
    num_steps, steps_per_epoch = count_run_steps(data, config)
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
            WeightedBatchSampler, weights=data.weights, num_steps=num_steps
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
