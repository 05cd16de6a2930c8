"""Converts an official checkpoint to a model folder, and verifies the folder.

The origin of every weight is determined before any weight is read or written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.image_utils import PILImageResampling

from .._environment import list_versions
from ..building.build_model import configure_model
from ..building.vision_towers import MEAN_AND_STD
from ..configs.build_config import BuildConfig
from ..configs.export_config import ConvertConfig, SourceFormat
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import hash_file, require_new_folder
from ..doctor.check_model import check_model
from ..heads_llm2clip import MAX_LOG_SCALE
from ..image_cropping_llm2clip import LLM2CLIPImageProcessor
from ..loading_llm2clip import build_tower, naming_fields
from ..model_folders.model_card import (
    CardData,
    find_license,
    set_base_models,
    update_card_data,
)
from ..model_folders.model_folder import RECORD_FILE
from ..model_folders.model_loading import CLASS_OF_COMPONENTS, MODEL_CLASSES
from ..model_folders.model_writing import LazyModel, cast_weights, save_model
from ..model_folders.weights import LazyTensor, warn_of_rounding
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .layouts import find_layout
from .layouts.layout import Layout, RenamedWeights, Rule, apply_rules, count_blocks, rename
from .source_checkpoint import (
    Checkpoint,
    CheckpointSource,
    LanguageModel,
    LLMSource,
    find_commit,
    open_checkpoint,
    open_language_model,
    open_llm_weights,
    public_name,
    require_layout,
    split_revision,
)

_NOT_REQUESTED = "belongs to the tower that was not requested"
# Training clamps to ln 100, which half precision rounds up.
_LARGEST_LOG_SCALE = float(torch.tensor(MAX_LOG_SCALE, dtype=torch.float16)) + 1e-6
_LLMS_BY_WIDTH = {
    2048: "Llama-3.2-1B (official: LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned)",
    4096: "Llama-3-8B and Llama-3.1-8B (official: LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned, or "
    "the LoRA LLM2CLIP-Llama-3.1-8B on Llama-3.1-8B-Instruct)",
}


@dataclass(frozen=True)
class ConversionPlan:
    """A model whose weights are still in the files of the official checkpoint.

    Attributes:
        config: Its configuration.
        model_class: Class of the full, text-only or vision-only model.
        tokenizer: The model's tokenizer, with the prompt.
        image_processor: Its image processor.
        weights: Every weight of the model, by name.
        dropped: Unneeded key of the checkpoint or LLM → reason for dropping it.
        files: All files from which weights are read.
        lora_counts: Per LoRA, the entries of each weight that changed, counted while weights are
            read.
    """

    config: LLM2CLIPConfig
    model_class: Any
    tokenizer: PreTrainedTokenizerBase
    image_processor: LLM2CLIPImageProcessor
    weights: dict[str, LazyTensor]
    dropped: dict[str, str]
    files: list[Path]
    lora_counts: list[dict[str, tuple[int, int]]]


def convert_checkpoint(
    source: str | Path | CheckpointSource,
    text_model: str | Path | LLMSource,
    output: str | Path,
    source_format: SourceFormat,
    config: ConvertConfig | None = None,
    *,
    name: str | None = None,
) -> Path:
    """Convert an official checkpoint together with its LLM.

    The model is written to a temporary folder, loaded through AutoModel and checked by
    `check_model` before the folder gets its name. Memory holds one weight file at a time, and then
    the whole model once.

    Args:
        source: Checkpoint with vision tower and text adapter: a weight file, a folder or a Hub id.
        text_model: The checkpoint's language model: folder or Hub id. With `components="vision"`,
            only the LLM's configuration and tokenizer are read.
        output: Output folder, new or empty.
        source_format: Properties that the weights do not record.
        config: Parts to write, and entries of the card. By default, the towers' licenses come from
            the sources' cards.
        name: Model name on the card. Default: the folder's name.

    Returns:
        The folder. The file `conversion.json` in the folder records the sources, the SHA-256 of
        each file, the dropped keys, and for each LoRA, the fraction of changed entries that survive
        rounding (`share_changed_by_merging`).

    Raises:
        FileExistsError: The folder exists and is not empty.
        ValueError: Checkpoint, LLM and source format do not belong together.
        OSError: There is too little disk space.
        RuntimeError: The written model fails a check, so it is removed.

    Examples:
        >>> convert_checkpoint(
        ...     "microsoft/LLM2CLIP-Openai-L-14-336",
        ...     "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned",
        ...     "converted",
        ...     SourceFormat(layout="hub_clip"),
        ... )  # doctest: +SKIP
    """
    source = source if isinstance(source, CheckpointSource) else CheckpointSource(source)
    llm = text_model if isinstance(text_model, LLMSource) else LLMSource(text_model)
    config = config or ConvertConfig()
    output = Path(output)
    require_new_folder(output)
    layout = find_layout(source_format)
    card = update_card_data(CardData(), config)
    card = replace(
        card,
        vision_license=card.vision_license or find_license(source.name, revision=source.revision),
        text_license=card.text_license or find_license(llm.name, revision=llm.revision),
    )
    language = open_language_model(llm)
    # No variable keeps the checkpoint, because the plan has its weights.
    plan = plan_conversion(open_checkpoint(source), language, layout, source_format, config)
    dtype: torch.dtype = getattr(torch, config.dtype)
    for part in (plan.config, plan.config.vision_config, plan.config.text_config):
        part.dtype = dtype
    set_base_models(plan.config, config.base_models)
    weights = cast_weights(plan.weights, dtype, plan.model_class)
    record = _make_record(plan, source, language, source_format)
    return save_model(
        LazyModel(plan.model_class, plan.config, weights),
        LLM2CLIPProcessor(plan.image_processor, plan.tokenizer, source_format.max_text_length),
        output,
        card=card,
        name=name,
        max_shard_size=config.max_shard_size,
        device=config.device,
        verify=partial(_finish, plan, record, dtype, config.device),
    )


def _finish(
    plan: ConversionPlan, record: dict[str, Any], dtype: torch.dtype, device: str, folder: Path
) -> None:
    """Add the effect of each LoRA to the record, write the record, and check the model."""
    for lora, counts in zip(record["llm"]["loras"], plan.lora_counts, strict=False):
        what = f"Merging the LoRA {lora['name']}"
        lora["share_changed_by_merging"] = warn_of_rounding(counts.values(), dtype, what=what)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD_FILE).write_text(text, encoding="utf-8")
    report = check_model(folder, device=device)
    if not report.healthy:
        raise RuntimeError(f"The converted model is not healthy:\n{report}")


def _make_record(
    plan: ConversionPlan,
    source: CheckpointSource,
    language: LanguageModel,
    source_format: SourceFormat,
) -> dict[str, Any]:
    """Describe the model's sources for its `conversion.json`, with file names instead of paths."""
    assert source_format.preprocessing is not None
    mean, std = MEAN_AND_STD[source_format.preprocessing]
    llm, paths = language.source, [*plan.files, language.folder]
    by_reason: dict[str, list[str]] = {}
    for key, reason in plan.dropped.items():
        by_reason.setdefault(reason, []).append(key)
    return {
        "modeling_llm2clip": list_versions()["modeling_llm2clip"],
        "checkpoint": {
            "name": public_name(source.name),
            "revision": find_commit(source.name, paths),
        },
        "llm": {
            "name": public_name(llm.name),
            "revision": find_commit(llm.name, paths),
            "loras": [
                {"name": public_name(name), "revision": find_commit(name, paths)}
                for name, _ in map(split_revision, llm.loras)
            ],
        },
        "num_parameters": sum(tensor.num_elements for tensor in plan.weights.values()),
        "files": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in plan.files
        ],
        "source_format": asdict(source_format),
        "pixels": {"mean": mean, "std": std},
        "dropped": {reason: sorted(keys) for reason, keys in by_reason.items()},
    }


def plan_conversion(
    checkpoint: Checkpoint,
    language: LanguageModel,
    layout: Layout,
    source_format: SourceFormat,
    config: ConvertConfig,
) -> ConversionPlan:
    """Determine the configuration and the origin of every weight, reading only shapes."""
    source = str(checkpoint.source.name)
    require_layout(checkpoint, layout)
    sizes = _read_adapter_sizes(layout.adapter_prefix, checkpoint.tensors, source=source)
    width, taken = language.config.hidden_size, sizes["width"]
    if width != taken:
        fitting = _LLMS_BY_WIDTH.get(taken, "the one it was trained with")
        raise ValueError(
            f"The text adapter of {source} takes embeddings of width {taken}, but "
            f"{language.source.name} has width {width}. LLMs of width {taken}: {fitting}. Use the "
            "LLM that the checkpoint was trained with."
        )
    model_config, tokenizer = _configure(checkpoint, layout, sizes, language, source_format)
    vision: Any = model_config.vision_config
    model_args = getattr(vision, "model_args", None)  # of a network of timm
    size = int(model_args["img_size"] if model_args else vision.image_size)
    image_processor = make_image_processor(source_format, size)
    prefix = layout.llm_prefix
    inside = {key: t for key, t in checkpoint.tensors.items() if prefix and key.startswith(prefix)}
    renamed = _rename_checkpoint(checkpoint, layout, leave_out=set(inside), source=source)
    if not layout.has_projection:
        width = sizes["projection_dim"]
        identity = LazyTensor((width, width), torch.float32, lambda: torch.eye(width))
        renamed.weights["visual_projection.weight"] = identity
    files, counts = list(checkpoint.files), list[dict[str, tuple[int, int]]]()
    if config.components != "vision":
        stripped = {key.removeprefix(prefix or ""): tensor for key, tensor in inside.items()}
        dtype = getattr(torch, config.dtype)
        with naming_fields(language.source.name), torch.device("meta"):
            build_tower(language.config)  # so errors in the LLM's fields do not name the checkpoint
        llm, llm_files, counts = open_llm_weights(language, stripped, dtype=dtype)
        renamed.weights |= llm.weights
        renamed.origins |= llm.origins
        renamed.dropped |= llm.dropped
        files += llm_files
    else:
        renamed.dropped |= dict.fromkeys(inside, _NOT_REQUESTED)
    model_class = MODEL_CLASSES[CLASS_OF_COMPONENTS[config.components]]
    with naming_fields(source):
        weights = _fit(renamed, model_class, model_config, source)
    return ConversionPlan(
        model_config,
        model_class,
        tokenizer,
        image_processor,
        weights,
        renamed.dropped,
        files,
        counts,
    )


def make_image_processor(source_format: SourceFormat, size: int) -> LLM2CLIPImageProcessor:
    """Make the image processor: bicubic resize of the shortest side, center crop, normalization.

    The image processor produces the same pixels as the official code, which uses torchvision.
    """
    if source_format.preprocessing is None:
        raise ValueError(
            "preprocessing is missing. Choose the one that the checkpoint was trained with: "
            "'openai' (the official training code uses OpenAI's mean and standard deviation for "
            "every tower) or 'half' (0.5, as in SigLIP). It is never guessed, because the weights "
            "do not record it."
        )
    mean, std = MEAN_AND_STD[source_format.preprocessing]
    return LLM2CLIPImageProcessor(
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
    sizes: Mapping[str, int],
    language: LanguageModel,
    source_format: SourceFormat,
) -> tuple[LLM2CLIPConfig, PreTrainedTokenizerBase]:
    vision_config = layout.make_vision_config(
        checkpoint.tensors, source_format, checkpoint.stated_config
    )
    vision_config._name_or_path = public_name(checkpoint.source.name)
    chosen = BuildConfig(
        prompt=source_format.prompt,
        prompt_prefix=source_format.prompt_prefix,
        prompt_suffix=source_format.prompt_suffix,
        projection_dim=sizes["projection_dim"],
        max_text_length=source_format.max_text_length,
        text_pooling=source_format.text_pooling,
        text_adapter_layers=sizes["num_layers"],
        normalize_text_before_adapter=source_format.normalize_text_before_adapter,
        visual_projection_bias=layout.projection_bias,
    )
    config, tokenizer = configure_model(vision_config, language.config, language.tokenizer, chosen)
    config.text_adapter_expansion = sizes["expansion"]
    config.random_heads = []
    return config, tokenizer


def _rename_checkpoint(
    checkpoint: Checkpoint, layout: Layout, *, leave_out: set[str], source: str
) -> RenamedWeights:
    tensors = {key: value for key, value in checkpoint.tensors.items() if key not in leave_out}
    rules = [*layout.rules, *_list_adapter_rules(layout.adapter_prefix, tensors)]
    renamed = apply_rules(tensors, rules, layout.drops, source=source)
    log_scale = float(tensors["logit_scale"].read()) if "logit_scale" in tensors else 0.0
    if not 0.0 <= log_scale <= _LARGEST_LOG_SCALE:
        raise ValueError(
            f"{source} has logit_scale {log_scale:.4g}, but training keeps it between 0 and ln 100 "
            f"= {MAX_LOG_SCALE:.4f}. The run diverged, or this is not an LLM2CLIP checkpoint."
        )
    return renamed


def _list_adapter_rules(prefix: str, tensors: Mapping[str, LazyTensor]) -> list[Rule]:
    """List the rules for the text adapter and the temperature, which all official layouts share.

    The text adapter is `Sequential(block, …, LayerNorm, Linear)`. A block has a `Sequential(Linear,
    GELU, Dropout, Linear)` named `fn` and a LayerNorm named `ln`.
    """
    start, num_layers = re.escape(prefix), count_blocks(tensors, prefix + "{}.fn.0.weight")
    part = r"(weight|bias)"
    return [
        rename(rf"{start}(\d+)\.fn\.0\.{part}", r"text_adapter.blocks.\1.up.\2"),
        rename(rf"{start}(\d+)\.fn\.3\.{part}", r"text_adapter.blocks.\1.down.\2"),
        rename(rf"{start}(\d+)\.ln\.{part}", r"text_adapter.blocks.\1.norm.\2"),
        rename(rf"{start}{num_layers}\.{part}", r"text_adapter.norm.\1"),
        rename(rf"{start}{num_layers + 1}\.{part}", r"text_projection.\1"),
        rename(
            r"logit_scale",
            "logit_scale.log_scale",
            lambda log_scale: log_scale.reshape(1).float().clamp(max=MAX_LOG_SCALE),
        ),
    ]


def _read_adapter_sizes(
    prefix: str, tensors: Mapping[str, LazyTensor], *, source: str
) -> dict[str, int]:
    """Derive the sizes of a text adapter from its weights."""
    num_layers = count_blocks(tensors, prefix + "{}.fn.0.weight")
    last = tensors.get(f"{prefix}{num_layers + 1}.weight")
    keys = sorted(key for key in tensors if key.startswith(prefix))
    if not keys:
        raise ValueError(
            f"{source} has no text adapter under {prefix!r}: a bare vision tower cannot be "
            "converted to an LLM2CLIP model. Use the checkpoint with the adapter (in the official "
            "EVA02 repositories, the .pt file)."
        )
    if last is None or f"{prefix}0.fn.0.weight" not in tensors:
        raise ValueError(f"{source} has only a part of a text adapter: {', '.join(keys)}.")
    inner, width = tensors[f"{prefix}0.fn.0.weight"].shape
    return {
        "width": width,
        "projection_dim": last.shape[0],
        "num_layers": num_layers,
        "expansion": inner // width,
    }


def _fit(
    renamed: RenamedWeights, model_class: Any, config: LLM2CLIPConfig, source: str
) -> dict[str, LazyTensor]:
    """Put the weights in the model's order; raise if any is missing or has the wrong shape."""
    shapes = _list_shapes(lambda: model_class(config))
    whole = shapes if model_class is LLM2CLIPModel else _list_shapes(lambda: LLM2CLIPModel(config))
    for name in sorted(set(renamed.weights) & set(whole) - set(shapes)):
        del renamed.weights[name]
        if name in renamed.origins:
            renamed.dropped[renamed.origins[name]] = _NOT_REQUESTED
    missing = sorted(set(shapes) - set(renamed.weights))
    unknown = sorted(
        f"{renamed.origins.get(name, name)} (would be {name})"
        for name in set(renamed.weights) - set(shapes)
    )
    misshapen = sorted(
        f"{renamed.origins.get(name, name)}: {renamed.weights[name].shape}, {name} is {shape}"
        for name, shape in shapes.items()
        if name in renamed.weights and renamed.weights[name].shape != shape
    )
    integers = sorted(
        f"{name}: {weight.dtype}"
        for name, weight in renamed.weights.items()
        if name.endswith((".weight", ".bias")) and not weight.dtype.is_floating_point
    )
    errors = {
        "missing": missing,
        "not in the model": unknown,
        "of another shape": misshapen,
        "not floating-point (quantized weights cannot be converted)": integers,
    }
    if any(errors.values()):
        shown = "".join(
            f"\n{len(names)} {what}:\n  " + "\n  ".join(names)
            for what, names in errors.items()
            if names
        )
        raise ValueError(
            f"{source} does not make a complete {model_class.__name__}, so nothing is converted."
            f"{shown}\nUse the complete checkpoint, the LLM it was trained with, and its source "
            "format."
        )
    return {name: renamed.weights[name] for name in shapes}


def _list_shapes(build: Callable[[], Any]) -> Mapping[str, tuple[int, ...]]:
    """List the names and shapes of a model's weights without allocating memory for them."""
    # The second one is for older timm, which reads values of tensors while it builds a network.
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        model = build()
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
