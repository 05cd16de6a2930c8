"""Where every weight of the new model comes from, settled before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessor, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.image_utils import PILImageResampling

from ..building.build_model import configure_model
from ..configs.build_config import BuildConfig
from ..configs.source_format import PREPROCESSINGS, SourceFormat
from ..configuration_llm2clip import LLM2CLIPConfig
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from .key_mapping import Renamed, apply_rules
from .layouts.layout import Layout
from .lazy_tensors import LazyTensor
from .output_arguments import OutputArguments
from .public_names import public_name
from .source_checkpoint import Checkpoint, require_layout
from .source_llm import LanguageModel, open_llm_weights
from .text_adapter_plan import (
    AdapterSizes,
    adapter_rules,
    read_sizes,
    require_temperature,
    require_width,
)

MODEL_CLASSES: dict[str, Any] = {
    "full": LLM2CLIPModel,
    "vision": LLM2CLIPVisionModel,
    "text": LLM2CLIPTextModel,
}
_OTHER_HALF = "belongs to the half of the model that was not asked for"


@dataclass(frozen=True)
class Plan:
    """A model whose weights are still in the files of others.

    Attributes:
        model_class: whole model, or one half.
        weights: every weight of the model, by name.
        dropped: keys of the sources that are not needed → reason.
        files: every file that weights come from.
    """

    config: LLM2CLIPConfig
    model_class: Any
    tokenizer: PreTrainedTokenizerBase
    image_processor: CLIPImageProcessor
    weights: dict[str, LazyTensor]
    dropped: dict[str, str]
    files: list[Path]


def plan_conversion(
    checkpoint: Checkpoint,
    language: LanguageModel,
    recipe: SourceFormat,
    arguments: OutputArguments,
) -> Plan:
    """Settle configuration and origin of every weight; reads shapes only.

    Raises: ValueError when the checkpoint is of another family, the LLM does not fit its adapter,
        a key has no account, a weight no origin, or preprocessing is not chosen.
    """
    source = str(checkpoint.source.name)
    layout = require_layout(checkpoint, recipe.layout)
    sizes = read_sizes(layout.adapter_prefix, checkpoint.tensors, source=source)
    require_width(sizes, language.config.hidden_size, source=source, llm=str(language.source.name))
    config, tokenizer = _configure(checkpoint, layout, sizes, language, recipe)
    image_processor = make_image_processor(recipe, _image_size(config))
    inside = _take_llm(checkpoint, layout)
    renamed = _rename_checkpoint(checkpoint, layout, leave_out=set(inside), source=source)
    if not layout.has_projection:
        renamed.weights["visual_projection.weight"] = _identity(sizes.projection_dim)
    files = list(checkpoint.files)
    if arguments.components != "vision":
        stripped = {key.removeprefix(layout.llm_prefix or ""): t for key, t in inside.items()}
        llm, llm_files = open_llm_weights(language, stripped)
        renamed.add(llm)
        files += llm_files
    else:
        renamed.dropped |= dict.fromkeys(inside, _OTHER_HALF)
    model_class = MODEL_CLASSES[arguments.components]
    weights = _fit(renamed, model_class, config, source)
    return Plan(config, model_class, tokenizer, image_processor, weights, renamed.dropped, files)


def make_image_processor(recipe: SourceFormat, size: int) -> CLIPImageProcessor:
    """Shortest side to `size`, bicubic; center crop; mean and standard deviation of the recipe.

    Raises: ValueError when the recipe leaves the preprocessing open.
    """
    if recipe.preprocessing is None:
        raise ValueError(
            "Choose the preprocessing that the checkpoint was trained with: 'openai' (the official "
            "training code gives every tower OpenAI's mean and standard deviation) or 'half' (0.5, "
            "SigLIP's own). The weights do not say, so it is not guessed."
        )
    mean, std = PREPROCESSINGS[recipe.preprocessing]
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=PILImageResampling.BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )


def _configure(
    checkpoint: Checkpoint,
    layout: Layout,
    sizes: AdapterSizes,
    language: LanguageModel,
    recipe: SourceFormat,
) -> tuple[LLM2CLIPConfig, PreTrainedTokenizerBase]:
    vision_config = layout.make_vision_config(checkpoint.tensors, recipe, checkpoint.stated_config)
    vision_config._name_or_path = public_name(checkpoint.source.name)
    chosen = BuildConfig(
        prompt=recipe.prompt,
        prompt_prefix=recipe.prompt_prefix,
        prompt_suffix=recipe.prompt_suffix,
        projection_dim=sizes.projection_dim,
        max_text_length=recipe.max_text_length,
        text_pooling=recipe.text_pooling,
        text_adapter_layers=sizes.num_layers,
        normalize_text_before_adapter=recipe.normalize_text_before_adapter,
        visual_projection_bias=layout.projection_bias,
    )
    config, tokenizer = configure_model(vision_config, language.config, language.tokenizer, chosen)
    config.text_adapter_expansion = sizes.expansion
    config.text_adapter_trained = config.projections_trained = True  # that is what it converts
    return config, tokenizer


def _image_size(config: LLM2CLIPConfig) -> int:
    vision = config.vision_config
    model_args = getattr(vision, "model_args", None)
    return int(model_args["img_size"] if model_args else vision.image_size)


def _take_llm(checkpoint: Checkpoint, layout: Layout) -> dict[str, LazyTensor]:
    prefix = layout.llm_prefix
    if prefix is None:
        return {}
    return {key: value for key, value in checkpoint.tensors.items() if key.startswith(prefix)}


def _rename_checkpoint(
    checkpoint: Checkpoint, layout: Layout, *, leave_out: set[str], source: str
) -> Renamed:
    own = {key: value for key, value in checkpoint.tensors.items() if key not in leave_out}
    rules = [*layout.rules, *adapter_rules(layout.adapter_prefix, own)]
    renamed = apply_rules(own, rules, layout.drops, source=source)
    temperature = own.get("logit_scale")
    if temperature is not None:
        require_temperature(float(temperature.read()), source=source)
    return renamed


def _identity(width: int) -> LazyTensor:
    """The projection of a tower whose own embedding is the image's embedding."""
    return LazyTensor((width, width), lambda: torch.eye(width))


def _fit(
    renamed: Renamed, model_class: Any, config: LLM2CLIPConfig, source: str
) -> dict[str, LazyTensor]:
    """Order the weights as the model has them; each must be there once and have its shape."""
    wanted = _list_weights(lambda: model_class(config))
    if model_class is LLM2CLIPModel:
        whole = wanted
    else:
        whole = _list_weights(lambda: LLM2CLIPModel(config))
    for name in sorted(set(renamed.weights) & set(whole) - set(wanted)):
        del renamed.weights[name]
        if name in renamed.origins:
            renamed.dropped[renamed.origins[name]] = _OTHER_HALF
    missing = sorted(set(wanted) - set(renamed.weights))
    unknown = sorted(
        f"{renamed.origins.get(name, name)} (would be {name})"
        for name in set(renamed.weights) - set(wanted)
    )
    misshapen = sorted(
        f"{renamed.origins.get(name, name)}: {renamed.weights[name].shape}, {name} is {shape}"
        for name, shape in wanted.items()
        if name in renamed.weights and renamed.weights[name].shape != shape
    )
    errors = {"missing": missing, "without a place": unknown, "of another shape": misshapen}
    if any(errors.values()):
        told = "".join(
            f"\n{len(names)} {what}:\n  " + "\n  ".join(names)
            for what, names in errors.items()
            if names
        )
        raise ValueError(
            f"{source} does not make a whole {model_class.__name__}, so nothing is converted."
            f"{told}\nGive the whole checkpoint, the LLM it was trained with, and its own recipe."
        )
    return {name: renamed.weights[name] for name in wanted}


def _list_weights(build: Callable[[], Any]) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a model's weights, without making them."""
    # The second: older timm asks numbers of a tensor while it builds, which meta tensors have not.
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        model = build()
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
