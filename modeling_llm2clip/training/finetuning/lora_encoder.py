"""The LLM with a LoRA as sentence-transformers' trainer takes it: captions in, pooled states out.

Lives only while it is trained. What is kept is the adapter; a folder for sentence-transformers is
written by `hub.export`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Module
from torch import Tensor

from ...encoding.text_encoding import encode_captions
from ...model_folders.lora_base import (
    BASE_WEIGHTS,
    LORA_CONFIG,
    LORA_WEIGHTS,
    PLAIN_STARTS,
    is_same_base,
)
from ...modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from ...processing_llm2clip import LLM2CLIPProcessor, check_texts

# Settings of an adapter that its weights do not show and that change what they do.
_MEANING = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication",
)  # fmt: skip
# What others take out of their base was not taken out of ours.
_BASE_LEFT_AS_IT_IS = (*PLAIN_STARTS, "orthogonal", "eva")


@dataclass(frozen=True)
class LoraArguments:
    """Size and place of the low-rank matrices (paper, appendix: rank 16, alpha 32).

    Attributes:
        targets: names of the linear layers, as peft takes them; "all-linear" for every one.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"rank={self.rank} must be at least 1, alpha={self.alpha} positive, "
                f"dropout={self.dropout} in [0, 1)."
            )


class CaptionEncoder(Module):  # type: ignore[misc]  # sentence-transformers is typed in part
    """Tokens to unprojected caption embeddings, as a module of sentence-transformers.

    Args:
        model: its LLM gets the LoRA layers in place; all else is frozen.
        processor: the checkpoint's own, with its prompt.
    """

    save_in_root = True  # so that a checkpoint is an adapter folder

    def __init__(
        self,
        model: LLM2CLIPModel | LLM2CLIPTextModel,
        processor: LLM2CLIPProcessor,
        lora: LoraArguments,
    ) -> None:
        super().__init__()
        self.llm2clip = model.requires_grad_(False)
        self.llm2clip.packs_in_training = True
        self.processor = processor
        self.tokenizer = processor.tokenizer
        # The wrapper changes the LLM in place; only it knows how an adapter is written, and it
        # must not become a second path to the same parameters.
        self._adapted: list[PeftModel] = [get_peft_model(model.text_model, configure_lora(lora))]

    @property
    def adapted(self) -> PeftModel:
        """The LLM in peft's wrapper."""
        return self._adapted[0]

    @property
    def trained_weights(self) -> dict[str, Tensor]:
        """The LoRA's matrices, by name."""
        return {n: p.detach() for n, p in self.adapted.named_parameters() if p.requires_grad}

    @property
    def modalities(self) -> list[str]:
        """What it encodes."""
        return ["text"]

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> Any:
        """Tokenize captions with the checkpoint's prompt: `input_ids`, `attention_mask` (B, L)."""
        if prompt:
            raise ValueError(f"Captions are tuned without an instruction; got {prompt!r}.")
        check_texts(list(inputs))
        return dict(self.processor(text=list(inputs)))

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Add `sentence_embedding`, (B, D) float32, not projected and not normalized."""
        features["sentence_embedding"] = self.llm2clip.get_caption_embeds(
            features["input_ids"], features.get("attention_mask")
        )
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the adapter alone."""
        _save_adapter(self.adapted, output_path)

    def load_adapter(self, folder: Path) -> None:
        """Put the weights of a saved adapter into the LoRA layers.

        Raises: ValueError when a setting that its weights do not show is another, it names
            another base, or a weight of it is missing or has no place.
        """
        require_same_meaning(folder, self.adapted.peft_config["default"])
        _require_same_base(folder, str(self.llm2clip.text_model.config._name_or_path or ""))
        weights = load_file(folder / LORA_WEIGHTS)
        result = set_peft_model_state_dict(self.adapted, weights)
        missing = [key for key in result.missing_keys if "lora_" in key]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"{folder} does not fit this LLM and LoRA: missing {missing[:5]}, without a place "
                f"{result.unexpected_keys[:5]}."
            )

    def encode(self, captions: list[str]) -> Tensor:
        """Encode many captions, (N, D) float32, without gradients."""
        return encode_captions(self.llm2clip, self.processor, captions).caption_embeds


def wrap_encoder(encoder: CaptionEncoder) -> SentenceTransformer:
    """Make the model that sentence-transformers' trainer and losses take."""
    return SentenceTransformer(modules=[encoder], device=str(encoder.llm2clip.device))


def configure_lora(lora: LoraArguments) -> LoraConfig:
    """Translate our settings into peft's."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="FEATURE_EXTRACTION",
    )


def write_lora(
    encoder: CaptionEncoder, folder: Path, *, dtype: torch.dtype, base_weights: str | None
) -> None:
    """Write `adapter_config.json` and the weights, in a dtype of choice.

    Args:
        base_weights: SHA-256 of the LLM's weights; see `lora_base.require_base_weights`.
    """
    name_base_without_path(encoder.adapted)
    _save_adapter(encoder.adapted, str(folder))
    file = folder / LORA_WEIGHTS
    weights = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    known = {} if base_weights is None else {BASE_WEIGHTS: base_weights}
    save_file(weights, file, metadata={"format": "pt", **known})
    file.chmod(0o644)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form, not filled in


def _save_adapter(adapted: PeftModel, folder: str) -> None:
    """Write an adapter; left to itself, peft asks the Hub whether the vocabulary has changed."""
    adapted.save_pretrained(folder, save_embedding_layers=False)


def name_base_without_path(adapted: PeftModel) -> None:
    """Keep the name of the base model's folder and not its path: adapters get published."""
    config = adapted.peft_config["default"]
    base = Path(str(config.base_model_name_or_path))
    if base.exists():
        config.base_model_name_or_path = base.name


def require_same_meaning(folder: Path, wanted: LoraConfig) -> None:
    """Raise ValueError naming each setting that would make other embeddings of an adapter's
    weights.

    They would load without a word.
    """
    for name in (LORA_CONFIG, LORA_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}. Give the folder of an adapter.")
    saved = LoraConfig.from_pretrained(str(folder))
    pairs = {name: (getattr(saved, name, None), getattr(wanted, name, None)) for name in _MEANING}
    errors = [
        f"{name}={found!r}, in this run {here!r}"
        for name, (found, here) in pairs.items()
        if (found or None) != (here or None)  # whatever stands for nothing
    ]
    if saved.init_lora_weights not in _BASE_LEFT_AS_IT_IS:
        errors.append(f"init_lora_weights={saved.init_lora_weights!r}, which changes its base")
    if errors:
        raise ValueError(
            f"{folder} has {'; '.join(errors)}. Give this run the same rank and alpha (--rank, "
            "--alpha); what else differs, this training does not do."
        )


def _require_same_base(folder: Path, base: str) -> None:
    stated = str(LoraConfig.from_pretrained(str(folder)).base_model_name_or_path or "")
    if stated and base and not is_same_base(stated, base):  # both have a name to compare
        raise ValueError(
            f"{folder} is for the base {stated!r}, but the LLM is {base!r}. Begin from an adapter "
            "of this LLM, or name none."
        )
