"""Builds an untrained model from a vision tower and a language model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._suggestions import counted
from ..configs.build_config import (
    DEFAULT_ADAPTER_LAYERS,
    DEFAULT_PROJECTION_DIM,
    DEFAULT_TEXT_LENGTH,
    OWN_PROMPT,
    BuildConfig,
    list_vision_sources,
)
from ..configs.export_config import CardConfig
from ..configuration_llm2clip import LOGIT_SCALE_INIT, LLM2CLIPConfig
from ..data.atomic_files import require_new_folder
from ..encoding.devices import find_device
from ..loading_llm2clip import naming_fields
from ..model_folders.model_card import (
    CardData,
    find_license,
    read_card_data,
    set_base_models,
    update_card_data,
)
from ..model_folders.model_folder import find_model_folder, require_sources
from ..model_folders.model_writing import require_as_written, save_model
from ..modeling_llm2clip import LLM2CLIPModel
from ..pooling_llm2clip import TEXT_POOLINGS
from ..processing_llm2clip import LLM2CLIPProcessor
from .lora_merging import merge_lora
from .part_loading import cut_layers
from .pretrained_towers import find_origin
from .prompts import derive_own_prompt, derive_prompt, resolve_template, write_prompt
from .text_embedders import TextEmbedder, read_embedder
from .text_towers import load_text_tower, require_own_tokenizer, take_settings
from .tower_checks import (
    measure_text_width,
    measure_vision_width,
    require_deterministic,
    require_direction,
    require_loadable,
    require_pixels_alone,
    require_positions,
)
from .vision_towers import (
    join_vision_towers,
    load_vision_tower,
    set_image_size,
    set_normalization,
)

# A Hub id or folder, or a loaded tower with its image processor; or a list of these.
OneVisionSource: TypeAlias = str | Path | tuple[PreTrainedModel, Any]
VisionSource: TypeAlias = OneVisionSource | list[OneVisionSource]
# A Hub id, folder or .gguf file, or a loaded LLM with its tokenizer.
TextSource: TypeAlias = str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase]


def build_model(
    vision: VisionSource,
    text: TextSource,
    output: str | Path,
    config: BuildConfig,
    *,
    card: CardConfig | None = None,
) -> Path:
    """Build an untrained model from two towers, write its folder, and check that it loads back.

    Args:
        vision: As in `join_towers`.
        text: As in `join_towers`.
        output: Output folder, new or empty.
        config: As in `join_towers`. The golden embeddings are computed on `config.device`.
        card: Entries of the model card. By default, the towers' licenses come from their own cards.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and is not empty.
        ValueError: For the reasons listed in `join_towers`, or because the written folder loads
            with different embeddings; the folder is then removed.

    Examples:
        >>> vision, text = "openai/clip-vit-base-patch16", "HuggingFaceTB/SmolLM2-135M-Instruct"
        >>> build_model(vision, text, "base", BuildConfig(prompt="chatml"))  # doctest: +SKIP
    """
    require_new_folder(Path(output))
    lora = CardData()
    if config.lora is not None:
        require_sources(lora=config.lora)
        lora = read_card_data(find_model_folder(config.lora), training_alone=True)
    model, processor = join_towers(vision, text, config)
    card = card or CardConfig()
    visions = list_vision_sources(vision)
    licenses = sorted({_find_license(each) or "" for each in visions})
    stated = CardData(
        vision_license=card.vision_license or (", ".join(licenses) if all(licenses) else None),
        text_license=card.text_license or _find_license(text),
        training_data=lora.training_data,
        text_training_data=lora.training_data,
    )
    for tower in (model.config.vision_config, model.config.text_config):
        tower._name_or_path = find_origin(tower._name_or_path or "")
    set_base_models(model.config, card.base_models)
    model.to(find_device(config.device))  # type: ignore[arg-type]

    def verify(folder: Path) -> None:
        if not any(isinstance(source, tuple) for source in (*visions, text)):
            model.to("meta")  # type: ignore[arg-type]  # two copies of a large LLM would not fit
        require_as_written(folder, device=config.device)

    return save_model(model, processor, output, card=update_card_data(stated, card), verify=verify)


def join_towers(
    vision: VisionSource, text: TextSource, config: BuildConfig
) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    """Build an untrained model from two towers, with a random text adapter and projections.

    Args:
        vision: Hub id or folder of a vision tower, or a loaded tower and its image processor.
            `A+B`, or a list, joins several towers into one. They share the image processor of the
            one with the largest images.
        text: Hub id, folder or `.gguf` file of a language model, or a loaded LLM without its head
            and its tokenizer. A loaded LLM is changed in place: a LoRA is merged into it, and its
            upper layers are removed. With the prompt `own`, Hub id or folder of a
            sentence-transformers model, whose embeddings `get_caption_embeds` then returns. The
            pooling and length of an LLM or LoRA saved by LLM2Vec are kept.
        config: How to join the towers. Sources that are not loaded yet are loaded in
            `config.dtype`.

    Returns:
        The model on the CPU, in evaluation mode, and its processor.

    Raises:
        ValueError: No prompt is chosen; `keep_projection` is set for a tower without a text
            encoder, for several towers, or with another `projection_dim`; several towers do not
            have one fixed size each, or differ in dtype or order of channels; no vision tower is
            listed, or one twice; a source does not exist (checked before any tower is loaded);
            the tokenizer belongs to another model, or the prompt does not fit it; the vision tower
            does not support the image size, or is not deterministic; the LLM has too few layers for
            `text_layers`, or cannot be cut; the LoRA is for another LLM or for more layers than are
            kept; the LLM's family cannot be made bidirectional, or kept causal; a tower's
            configuration does not describe its network, so it would load as a different network; or
            an embedder cannot be reproduced exactly.
        MissingExtraError: The prompt is `own`, and sentence-transformers is not installed.

    Examples:
        >>> vision, text = "openai/clip-vit-base-patch16", "HuggingFaceTB/SmolLM2-135M-Instruct"
        >>> model, processor = join_towers(
        ...     vision, text, BuildConfig(prompt="chatml")
        ... )  # doctest: +SKIP
    """
    config.require_prompt()
    visions = list_vision_sources(vision)
    if not visions:
        raise ValueError("vision is an empty list. List at least one vision tower.")
    vision_names = [source for source in visions if not isinstance(source, tuple)]
    if repeated := [name for name in {*vision_names} if vision_names.count(name) > 1]:
        raise ValueError(f"vision: {repeated[0]} is named twice. Name each vision tower once.")
    text_name = None if isinstance(text, tuple) else text
    require_sources(vision=vision_names, text=text_name, lora=config.lora)
    for source in (text_name, config.lora):
        if source is not None and config.prompt != OWN_PROMPT:
            config = take_settings(source, config)
    if config.keep_projection and len(visions) > 1:
        raise ValueError(
            "keep_projection keeps the image projection of one dual encoder, not of "
            f"{len(visions)} vision towers. Name one vision tower, or remove keep_projection."
        )
    towers = [_take_vision_tower(source, config) for source in visions]
    (vision_model, image_processor, kept), *others = towers
    if others:
        vision_model, image_processor = join_vision_towers([tower[:2] for tower in towers])
    if kept is not None:
        if config.projection_dim not in (None, len(kept)):
            raise ValueError(
                f"projection_dim={config.projection_dim} cannot be combined with keep_projection: "
                f"the projection of {vision_names[0]} has {counted(len(kept), 'dimension')}. "
                "Remove projection_dim."
            )
        config = replace(config, projection_dim=len(kept), visual_projection_bias=False)
    embedder = None
    if config.prompt == OWN_PROMPT:
        if text_name is None:
            raise ValueError(
                "prompt=own needs the folder or Hub id of an embedder, not a loaded LLM and "
                "tokenizer."
            )
        with naming_fields(text_name):
            embedder = read_embedder(text_name, config)
    text_model, tokenizer = _take_text_tower(text, config)
    model, processor = _join(vision_model, image_processor, text_model, tokenizer, config, embedder)
    if kept is not None:
        model.visual_projection.weight.data.copy_(kept)
    return model, processor


def _take_vision_tower(
    source: OneVisionSource, config: BuildConfig
) -> tuple[PreTrainedModel, Any, Tensor | None]:
    """Load a vision tower unless already loaded; set its normalization and image size.

    Also return its image processor, and the projection to keep.
    """
    kept = None
    if isinstance(source, tuple):
        if config.keep_projection:
            raise ValueError(
                "keep_projection keeps the image projection of a dual encoder, but a loaded vision "
                "tower has none. Pass its folder or Hub id instead."
            )
        vision_model, image_processor = source
        require_pixels_alone(vision_model)
    else:
        with naming_fields(source):
            vision_model, image_processor, kept = load_vision_tower(
                source,
                dtype=getattr(torch, config.dtype),
                allow_missing_pooler=config.vision_pooling != "pooler",
                keep_projection=config.keep_projection,
            )
    image_processor = set_normalization(image_processor, config.normalization)
    if config.image_size is not None:
        vision_model, image_processor = set_image_size(
            vision_model, image_processor, config.image_size
        )
    return vision_model, image_processor, kept


def _take_text_tower(
    text: TextSource, config: BuildConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an LLM and its tokenizer unless already loaded; remove layers and merge a LoRA."""
    if isinstance(text, tuple):
        text_model, tokenizer = text
        require_own_tokenizer(text_model.config, tokenizer, "The LLM")
        if config.text_layers is not None:
            cut_layers(text_model, config.text_layers)
    else:
        with naming_fields(text):
            text_model, tokenizer = load_text_tower(
                text,
                dtype=getattr(torch, config.dtype),
                num_layers=config.text_layers,
                is_embedder=config.prompt == OWN_PROMPT,
            )
    if config.lora is not None:
        merge_lora(text_model, config.lora)
    return text_model, tokenizer


def configure_model(
    vision_config: PreTrainedConfig,
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: BuildConfig,
    *,
    vision_width: int | None = None,
    text_width: int | None = None,
    embedder: TextEmbedder | None = None,
) -> tuple[LLM2CLIPConfig, PreTrainedTokenizerBase]:
    """Make the configuration of a whole model, and write its prompt into a copy of the tokenizer.

    Changes the LLM's configuration in place. The widths are measured on the towers. If a width is
    None, the tower's configuration states it.
    """
    max_text_length = config.max_text_length or DEFAULT_TEXT_LENGTH
    bidirectional = config.bidirectional is not False
    pooling: str = config.text_pooling or "mean"
    num_blocks = config.text_adapter_layers
    num_blocks = DEFAULT_ADAPTER_LAYERS if num_blocks is None else num_blocks
    dense_width = None
    projection_dim = config.projection_dim or DEFAULT_PROJECTION_DIM
    log_scale = config.logit_scale_init_value
    if embedder is None:
        template = resolve_template(
            tokenizer, config.prompt, prefix=config.prompt_prefix, suffix=config.prompt_suffix
        )
        prompt = derive_prompt(tokenizer, template)
    else:
        # Poolings that sentence-transformers has no name for exclude the prompt.
        is_pooled = TEXT_POOLINGS[embedder.pooling].sentence_transformers is not None
        prompt = derive_own_prompt(tokenizer, embedder.prompt, is_pooled=is_pooled)
        max_text_length, bidirectional = embedder.max_length, embedder.bidirectional
        pooling = embedder.pooling
        if embedder.dense is not None:
            text_width, dense_width = embedder.dense[0].shape
        if config.keep_embeddings:
            projection_dim = text_width or text_config.hidden_size
    tokenizer = write_prompt(tokenizer, prompt, max_length=max_text_length)
    # Asks the saved tokenizer, because writing the prompt drops extra special tokens.
    ends_special = bool(prompt.suffix_ids) and prompt.suffix_ids[-1] in tokenizer.all_special_ids
    text_config.pad_token_id = tokenizer.pad_token_id
    _set_direction(text_config, bidirectional=bidirectional)
    model_config = LLM2CLIPConfig(
        vision_config,
        text_config,
        projection_dim=projection_dim,
        vision_width=vision_width,
        text_width=text_width,
        text_dense_width=dense_width,
        bidirectional=bidirectional,
        text_pooling=pooling,
        prompt_prefix_ids=prompt.prefix_ids,
        prompt_suffix_ids=prompt.suffix_ids,
        prompt_suffix_ends_special=ends_special,
        max_text_length=max_text_length,
        normalize_text_before_adapter=(
            config.normalize_text_before_adapter and not config.keep_embeddings
        ),
        text_adapter_layers=None if config.keep_embeddings else num_blocks,
        vision_pooling=config.vision_pooling,
        visual_projection_bias=config.visual_projection_bias,
        logit_scale_init_value=LOGIT_SCALE_INIT if log_scale is None else log_scale,
    )
    return model_config, tokenizer


def _set_direction(text_config: PreTrainedConfig, *, bidirectional: bool) -> None:
    """Set the chosen attention direction in the LLM's configuration."""
    if bidirectional and text_config.model_type == "gemma3_text":
        # With Gemma's own flag, the window excludes its bound; with `is_causal=False`, not.
        text_config.sliding_window -= bool(text_config.use_bidirectional_attention)
        text_config.use_bidirectional_attention = False
    text_config.is_causal = not bidirectional


def _join(
    vision_model: PreTrainedModel,
    image_processor: Any,
    text_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: BuildConfig,
    embedder: TextEmbedder | None,
) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    if embedder is not None:
        embedder = embedder.join_network(text_model)
    model_config, tokenizer = configure_model(
        vision_model.config,
        text_model.config,
        tokenizer,
        config,
        vision_width=measure_vision_width(vision_model, image_processor, config.vision_pooling),
        text_width=measure_text_width(text_model),
        embedder=embedder,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LLM2CLIPModel(model_config, vision_model, text_model)
    if config.keep_embeddings:
        nn.init.eye_(model.text_projection.weight)
        nn.init.zeros_(model.text_projection.bias)
    model.eval()  # type: ignore[no-untyped-call]
    for part in (model.text_adapter, model.text_projection, model.visual_projection):
        part.to(text_model.dtype)  # the temperature stays float32
    require_direction(model.text_model, bidirectional=model_config.bidirectional)
    processor = LLM2CLIPProcessor(image_processor, tokenizer, model_config.max_text_length)
    require_deterministic(model, processor)
    require_positions(model, processor)
    require_loadable(model, processor)
    if embedder is not None:
        embedder.require_same_embeddings(model, processor)
    return model, processor


def _find_license(source: OneVisionSource | TextSource) -> str | None:
    return None if isinstance(source, tuple) else find_license(source)
