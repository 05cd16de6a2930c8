"""Builds an untrained LLM2CLIP model from two trained towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configs.build_config import BuildConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .attention_checks import measure_text_width, require_bidirectional
from .image_settings import set_image_size, set_normalization
from .lora_merging import merge_lora
from .prompts import derive_prompt, resolve_template, write_prompt
from .tokenizer_code import require_pinned
from .tower_sources import require_sources
from .towers import load_text_tower, load_vision_tower, require_own_tokenizer
from .vision_checks import require_deterministic, require_pixels_alone


def join_towers(
    vision: str | Path, llm: str | Path, config: BuildConfig
) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    """Load two towers (Hub ids, folders, a `.gguf` file) and build a model of them.

    Args:
        vision: Hub id or folder of a vision tower.
        llm: Hub id, folder or `.gguf` file of a language model.
        config: How they are joined; its LoRA is merged into the LLM.

    Returns:
        The untrained model on the CPU, and its processor.

    Raises:
        ValueError: No prompt is chosen, a source is nowhere, which is reported before any is
            loaded, or a tower does not fit its place; see `towers`, `lora_merging` and
            `build_model`.
    """
    config.require_prompt()
    require_sources(vision=vision, llm=llm, caption_lora=config.lora)
    if config.tokenizer_code is not None:
        require_pinned(llm, config.tokenizer_code)
    dtype = getattr(torch, config.dtype)
    vision_model, image_processor = load_vision_tower(
        vision, dtype=dtype, allow_missing_pooler=config.vision_pooling != "pooler"
    )
    text_model, tokenizer = load_text_tower(llm, dtype=dtype, tokenizer_code=config.tokenizer_code)
    if config.lora is not None:
        text_model = merge_lora(text_model, config.lora, accepted_base=config.accept_lora_base)
    return build_model(vision_model, image_processor, text_model, tokenizer, config)


def configure_model(
    vision_config: PreTrainedConfig,
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: BuildConfig,
    *,
    text_width: int | None = None,
) -> tuple[LLM2CLIPConfig, PreTrainedTokenizerBase]:
    """Describe a whole model, and write its prompt into a copy of the tokenizer.

    Args:
        text_width: of the hidden states that the LLM returns; None for its `hidden_size`.
    Raises: ValueError when the tokenizer is another model's, or the prompt does not fit it.
    """
    config.require_prompt()
    require_own_tokenizer(text_config, tokenizer, "The LLM")
    template = resolve_template(
        tokenizer, config.prompt, prefix=config.prompt_prefix, suffix=config.prompt_suffix
    )
    prompt = derive_prompt(tokenizer, template)
    tokenizer = write_prompt(tokenizer, prompt, max_length=config.max_text_length)
    # Asked of the tokenizer as it is saved: writing the prompt drops extra special tokens.
    ends_special = bool(prompt.suffix_ids) and prompt.suffix_ids[-1] in tokenizer.all_special_ids
    text_config.pad_token_id = tokenizer.pad_token_id
    # A stated direction of the bare LLM gives way to the one chosen here.
    text_config.is_causal = not config.bidirectional
    model_config = LLM2CLIPConfig(
        vision_config,
        text_config,
        projection_dim=config.projection_dim,
        text_width=text_width,
        bidirectional=config.bidirectional,
        text_pooling=config.text_pooling,
        prompt_prefix_ids=prompt.prefix_ids,
        prompt_suffix_ids=prompt.suffix_ids,
        prompt_suffix_ends_special=ends_special,
        max_text_length=config.max_text_length,
        normalize_text_before_adapter=config.normalize_text_before_adapter,
        text_adapter_layers=config.text_adapter_layers,
        vision_pooling=config.vision_pooling,
        visual_projection_bias=config.visual_projection_bias,
    )
    return model_config, tokenizer


def build_model(
    vision_model: PreTrainedModel,
    image_processor: Any,
    text_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: BuildConfig,
) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    """Build a model and its processor from loaded towers; adapter and projections are random.

    Raises: ValueError when the tokenizer is another model's, the prompt does not fit it, the
        vision tower cannot take the image size or draws at random, or the LLM's family cannot
        be made bidirectional.
    """
    require_pixels_alone(vision_model)
    image_processor = set_normalization(image_processor, config.normalization)
    if config.image_size is not None:
        vision_model, image_processor = set_image_size(
            vision_model, image_processor, config.image_size
        )
    model_config, tokenizer = configure_model(
        vision_model.config,
        text_model.config,
        tokenizer,
        config,
        text_width=measure_text_width(text_model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LLM2CLIPModel(model_config, vision_model, text_model)
    model.eval()  # type: ignore[no-untyped-call]
    for part in (model.text_adapter, model.text_projection, model.visual_projection):
        part.to(text_model.dtype)  # not the temperature, which stays float32
    if config.bidirectional:
        require_bidirectional(model.text_model)
    processor = LLM2CLIPProcessor(image_processor, tokenizer, config.max_text_length)
    require_deterministic(model, processor)
    return model, processor
