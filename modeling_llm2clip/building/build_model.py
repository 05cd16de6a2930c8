"""Builds an untrained LLM2CLIP model from two trained towers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_llm2clip import TEXT_POOLINGS, VISION_POOLINGS, LLM2CLIPConfig
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .attention_checks import measure_text_width, require_bidirectional
from .image_choices import NORMALIZATIONS
from .image_settings import set_image_size, set_normalization
from .lora_merging import merge_lora
from .prompt_presets import PROMPT_NAMES
from .prompts import derive_prompt, resolve_template, write_prompt
from .tokenizer_code import require_pinned
from .tower_sources import require_sources
from .towers import load_text_tower, load_vision_tower, require_own_tokenizer
from .vision_checks import require_deterministic, require_pixels_alone


@dataclass(frozen=True)
class BuildArguments:
    """What is chosen when a model is put together.

    Attributes:
        prompt: a name of `prompts.PROMPT_PRESETS`, `"chat-template"`, or None with `prefix` or
            `suffix` given.
        projection_dim: width of the shared space.
        max_text_length: most tokens of a text, prompt included.
        bidirectional: False keeps the LLM causal, to compare with.
        vision_pooling, text_pooling, text_adapter_layers, normalize_text_before_adapter,
        visual_projection_bias: see `LLM2CLIPConfig`.
        image_size: side of the images in pixels, where the tower's own is not wanted; see
            `images.set_image_size`.
        normalization: mean and std of the images; see `images.set_normalization`.
        seed: of adapter and projections, which start at random.
    """

    prompt: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    projection_dim: int = 512
    max_text_length: int = 512
    bidirectional: bool = True
    text_pooling: str = "mean"
    vision_pooling: str = "pooler"
    text_adapter_layers: int = 4
    normalize_text_before_adapter: bool = True
    visual_projection_bias: bool = True
    image_size: int | None = None
    normalization: str = "own"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompt is None and self.prefix is None and self.suffix is None:
            raise ValueError(
                f"Choose a prompt: one of {PROMPT_NAMES}, or a prefix and suffix of your own. It "
                "is never guessed, because the embeddings depend on it."
            )
        errors = []
        if self.prompt is not None:
            if self.prefix is not None or self.suffix is not None:
                errors.append(
                    f"prompt={self.prompt!r} excludes a prefix or suffix; give one choice"
                )
            if self.prompt not in PROMPT_NAMES:
                errors.append(f"prompt={self.prompt!r} must be one of {PROMPT_NAMES}")
        for name, least in _LEAST_VALUES.items():
            value = getattr(self, name)
            if value is not None and value < least:
                errors.append(f"{name}={value} must be at least {least}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                errors.append(f"{name}={getattr(self, name)!r} must be one of {known}")
        if errors:
            raise ValueError(f"{'; '.join(errors)}.")


_LEAST_VALUES = {
    "projection_dim": 1,
    "max_text_length": 1,
    "text_adapter_layers": 0,
    "image_size": 1,
}
_CHOICES = {
    "text_pooling": TEXT_POOLINGS,
    "vision_pooling": VISION_POOLINGS,
    "normalization": NORMALIZATIONS,
}


def join_towers(
    vision: str | Path,
    llm: str | Path,
    arguments: BuildArguments,
    *,
    dtype: torch.dtype = torch.float32,
    caption_lora: str | Path | None = None,
    accept_lora_base: str | None = None,
    tokenizer_code: str | None = None,
) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    """Load two towers (Hub ids, folders, a `.gguf` file) and build a model of them.

    Args:
        caption_lora: Hub id or folder of a LoRA for the LLM, merged into it.
        accept_lora_base: what the LoRA calls its base, where that is this LLM under another
            name.
        tokenizer_code: commit of the LLM's Hub repository at which its tokenizer's code is run.
    Raises: ValueError when a source is nowhere, which is told before any is loaded, or a tower does
        not fit its place; see `towers`, `adapters` and `build_model`.
    """
    require_sources(vision=vision, llm=llm, caption_lora=caption_lora)
    if tokenizer_code is not None:
        require_pinned(llm, tokenizer_code)
    vision_model, image_processor = load_vision_tower(
        vision, dtype=dtype, allow_missing_pooler=arguments.vision_pooling != "pooler"
    )
    text_model, tokenizer = load_text_tower(llm, dtype=dtype, tokenizer_code=tokenizer_code)
    if caption_lora is not None:
        merge_lora(text_model, caption_lora, accepted_base=accept_lora_base)
    return build_model(vision_model, image_processor, text_model, tokenizer, arguments)


def configure_model(
    vision_config: PreTrainedConfig,
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    arguments: BuildArguments,
    *,
    text_width: int | None = None,
) -> tuple[LLM2CLIPConfig, PreTrainedTokenizerBase]:
    """Describe a whole model, and write its prompt into a copy of the tokenizer.

    Args:
        text_width: of the hidden states that the LLM returns; None for its `hidden_size`.
    Raises: ValueError when the tokenizer is another model's, or the prompt does not fit it.
    """
    require_own_tokenizer(text_config, tokenizer, "The LLM")
    template = resolve_template(
        tokenizer, arguments.prompt, prefix=arguments.prefix, suffix=arguments.suffix
    )
    prompt = derive_prompt(tokenizer, template)
    tokenizer = write_prompt(tokenizer, prompt, max_length=arguments.max_text_length)
    # Asked of the tokenizer as it is saved: writing the prompt drops extra special tokens.
    ends_special = bool(prompt.suffix_ids) and prompt.suffix_ids[-1] in tokenizer.all_special_ids
    text_config.pad_token_id = tokenizer.pad_token_id
    # A stated direction of the bare LLM gives way to the one chosen here.
    text_config.is_causal = not arguments.bidirectional
    config = LLM2CLIPConfig(
        vision_config,
        text_config,
        projection_dim=arguments.projection_dim,
        text_width=text_width,
        bidirectional=arguments.bidirectional,
        text_pooling=arguments.text_pooling,
        prompt_prefix_ids=prompt.prefix_ids,
        prompt_suffix_ids=prompt.suffix_ids,
        prompt_suffix_ends_special=ends_special,
        max_text_length=arguments.max_text_length,
        normalize_text_before_adapter=arguments.normalize_text_before_adapter,
        text_adapter_layers=arguments.text_adapter_layers,
        vision_pooling=arguments.vision_pooling,
        visual_projection_bias=arguments.visual_projection_bias,
    )
    return config, tokenizer


def build_model(
    vision_model: PreTrainedModel,
    image_processor: Any,
    text_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: BuildArguments,
) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    """Build a model and its processor from loaded towers; adapter and projections are random.

    Raises: ValueError when the tokenizer is another model's, the prompt does not fit it, the
        vision tower cannot take the image size or draws at random, or the LLM's family cannot
        be made bidirectional.
    """
    require_pixels_alone(vision_model)
    image_processor = set_normalization(image_processor, arguments.normalization)
    if arguments.image_size is not None:
        vision_model, image_processor = set_image_size(
            vision_model, image_processor, arguments.image_size
        )
    config, tokenizer = configure_model(
        vision_model.config,
        text_model.config,
        tokenizer,
        arguments,
        text_width=measure_text_width(text_model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        model = LLM2CLIPModel(config, vision_model, text_model)
    model.eval()  # type: ignore[no-untyped-call]
    for part in (model.text_adapter, model.text_projection, model.visual_projection):
        part.to(text_model.dtype)  # not the temperature, which stays float32
    if arguments.bidirectional:
        require_bidirectional(model.text_model)
    processor = LLM2CLIPProcessor(image_processor, tokenizer, arguments.max_text_length)
    require_deterministic(model, processor)
    return model, processor
