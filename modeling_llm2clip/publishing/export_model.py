"""Exports a model folder, optionally one tower, another dtype, smaller files, or ONNX graphs.

The card may include results of `llm2clip evaluate` if they were measured with the exported model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoImageProcessor, AutoModel, PreTrainedTokenizerFast

from .._suggestions import counted
from ..base_llm2clip import read_instructions
from ..building.part_loading import forget_code
from ..configs.export_config import ExportConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import atomic_folder, require_new_folder
from ..encoding.devices import find_device
from ..encoding.precision import load_on_device
from ..evaluation.report import label_dataset
from ..evaluation.results import Result, read_result
from ..loading_llm2clip import find_tower_class, load_without_code
from ..model_folders.fingerprint import fingerprint_model
from ..model_folders.golden_embeddings import require_golden
from ..model_folders.model_card import (
    CardData,
    CardResult,
    name_base_models,
    read_edited_card,
    set_base_models,
    update_card_data,
    write_model_card,
)
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_loading import CLASS_OF_COMPONENTS, MODEL_CLASSES, find_model_class
from ..model_folders.model_writing import find_carried_files, save_model
from ..modeling_llm2clip import LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor
from ..vision_llm2clip import list_towers
from .onnx_export import export_onnx

_VISION_TOWER_CARD = """
# {title}

The vision tower of an LLM2CLIP model ([arXiv:2411.04997](https://arxiv.org/abs/2411.04997)), an
ordinary `{architecture}` of transformers: `AutoModel` loads it without any further code.
{processor} It began as {origin}; the license of that applies.
"""
_PLAIN = "`AutoImageProcessor` does so too."
_CROPS = """`AutoImageProcessor` needs `trust_remote_code=True`, or `import modeling_llm2clip`
before: this tower takes images that are cropped as torchvision does, which transformers' own
classes miss by a pixel."""
# Packages that the model's code needs on a host.
_NEEDED_PACKAGES = (
    "accelerate", "numpy", "pillow", "safetensors", "torch", "torchvision", "transformers",
)  # fmt: skip
# Scores per language, class and category stay in the file: a card has no room for them.
_DETAILS = {"languages", "categories", "intervals", "top_1_of_class", "value", "low", "high"}


def export_model(
    source: str | Path,
    output: str | Path,
    config: ExportConfig | None = None,
    *,
    revision: str | None = None,
    name: str | None = None,
) -> Path:
    """Export a model folder after checking that it still returns its golden embeddings.

    Instructions, licenses, the list of training data and the record of a conversion are carried
    over. Evaluation results are also carried over if all weights stay the same.

    Args:
        source: Folder or Hub id of an LLM2CLIP model.
        output: New or empty folder.
        config: Parts and format to export; None for the full model, unchanged.
        revision: Branch, tag or commit of the Hub repository.
        name: Model name on the card; None for the folder's name.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and is not empty.
        ValueError: The source is neither a folder nor a Hub id, lacks the component, or no longer
            returns its golden embeddings; results were measured with another model; or an ONNX
            graph fails its check, see `export_onnx`.

    Examples:
        >>> folder = export_model("my-model", "to-publish", ExportConfig(dtype="bfloat16"))
    """
    config = config or ExportConfig()
    require_new_folder(Path(output))
    folder = find_model_folder(source, revision=revision)
    if config.components == "vision-tower":
        return export_vision_tower(folder, output, license=config.license)
    if config.onnx:
        return export_onnx(folder, output, config)
    card = plan_card(folder, config)
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    model = _load_checked(folder, processor, config)
    set_base_models(model.config, config.base_models)
    hosting = render_hosting_files(config, model.config)
    return save_model(
        model,
        processor,
        output,
        instructions=read_instructions(folder),
        card=card,
        name=name,
        files={**find_carried_files(folder), **hosting},
        max_shard_size=config.max_shard_size,
        verify=lambda written: require_own_results(card.results, written),
    )


def _load_checked(folder: Path, processor: LLM2CLIPProcessor, config: ExportConfig) -> Any:
    """Load a model to export, after comparing it with its golden embeddings in its own dtype.

    To export another dtype, the model is loaded again, because casting in memory would round the
    model's temperature.
    """
    model_class = MODEL_CLASSES[CLASS_OF_COMPONENTS[config.components]]
    device = find_device(config.device)
    model = load_on_device(model_class, folder, device)
    require_golden(folder, model, processor)
    dtype = getattr(torch, config.dtype) if config.dtype else model.dtype
    if dtype != model.dtype:
        del model
        model = load_on_device(model_class, folder, device, dtype=dtype)
    return model


def plan_card(folder: Path, config: ExportConfig) -> CardData:
    """Return the facts for an export's card; results are kept if all weights stay the same."""
    card = read_edited_card(folder)
    if config.results:
        return update_card_data(card, config, results=read_card_results(config.results))
    saved = LLM2CLIPConfig.from_pretrained(folder).dtype
    keeps_dtype = config.dtype is None or getattr(torch, config.dtype) == saved
    name = CLASS_OF_COMPONENTS[config.components]
    if not (keeps_dtype and find_model_class(folder).__name__ == name):
        card = replace(card, results=())
    return update_card_data(card, config)


def render_hosting_files(config: ExportConfig, model_config: LLM2CLIPConfig) -> dict[str, str]:
    """Render the files that Inference Endpoints need besides the model; returns path → content.

    Packages are pinned to the versions in this environment, which computes the folder's golden
    embeddings.
    """
    if not config.handler:
        return {}
    towers = list_towers(model_config.vision_config)
    is_timm = any(getattr(tower, "model_type", None) == "timm_wrapper" for tower in towers)
    packages = sorted([*_NEEDED_PACKAGES, *(["timm"] if is_timm else [])])
    return {
        "handler.py": Path(__file__).with_name("endpoint_handler.py").read_text(encoding="utf-8"),
        # Without build suffixes such as `+cpu`.
        "requirements.txt": "".join(f"{p}=={version(p).partition('+')[0]}\n" for p in packages),
    }


def export_vision_tower(folder: Path, output: str | Path, *, license: str | None = None) -> Path:
    """Export the vision tower of a model folder without reading the LLM or tokenizer.

    The projection into the shared space is not exported, because only captions need it. `AutoModel`
    loads the tower without this package, for a detector, a classifier or a multimodal LLM. An image
    processor that crops like torchvision needs the code that is saved with it.
    """
    require_new_folder(Path(output))  # before the weights are read
    config = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True).vision_config
    is_joined = hasattr(config, "towers")
    if is_joined or find_tower_class(config) is not AutoModel:
        kind = "joined towers (A+B)" if is_joined else f"{config.model_type!r} tower"
        raise ValueError(
            f"components=vision-tower: transformers' AutoModel has no {kind}, so the exported "
            "folder would not load. Export the full model."
        )
    model = LLM2CLIPVisionModel.from_pretrained(folder)
    image_processor = forget_code(load_without_code(AutoImageProcessor, folder))
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    processor = LLM2CLIPProcessor(image_processor, empty)
    require_golden(folder, model.eval(), processor, of_vision_tower=True)
    name = config._name_or_path or ""
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["llm2clip"],
        **name_base_models(name),
    )
    output = Path(output)
    body = _VISION_TOWER_CARD.format(
        title=output.name,
        architecture=type(model.vision_model).__name__,
        processor=_CROPS if image_processor._auto_class else _PLAIN,
        origin=f"`{name}`" if name else "a tower whose name is not recorded",
    )
    with atomic_folder(output) as unfinished:
        model.vision_model.save_pretrained(unfinished)
        image_processor.save_pretrained(unfinished)
        ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(unfinished / "README.md")
    return output


def read_card_results(files: Sequence[Path]) -> tuple[CardResult, ...]:
    """Read result files of `llm2clip evaluate`, and report all errors together.

    A nested score is named by its path, such as `t2i.hit_rate_at_1`. The dataset's name includes
    the language, unless it is English, and differences from the published dataset.
    """
    results: dict[tuple[str, str], CardResult] = {}
    errors = []
    for file in files:
        try:
            result = _summarize(read_result(file))
        except (OSError, ValueError) as error:
            errors.append(str(error))
            continue
        if (task := (result.task, result.dataset)) in results:
            errors.append(f"{file}: {result.task} on {result.dataset} is a duplicate.")
        results[task] = result
    if errors:
        raise ValueError(" ".join(errors))
    return tuple(results.values())


def require_own_results(results: Sequence[CardResult], folder: Path) -> None:
    """Refuse results measured with a different model; accept results without a fingerprint."""
    stated = [result for result in results if result.fingerprint is not None]
    if not stated:
        return
    fingerprint = fingerprint_model(folder)
    foreign = []
    for result in stated:
        measured = {"dtype": result.dtype or fingerprint["dtype"], **(result.fingerprint or {})}
        differing = [name for name, value in fingerprint.items() if measured.get(name) != value]
        if differing:
            foreign.append(f"{result.task} on {result.dataset} ({', '.join(differing)})")
    if foreign:
        raise ValueError(
            f"{'; '.join(foreign)}: not measured with the exported model. Export it first (another "
            "dtype changes the weights), evaluate the exported folder with --dtype saved as a "
            "model of this package, and pass these results."
        )


def add_card_results(folder: Path, files: Sequence[Path]) -> None:
    """Add results to the card of a model folder, replacing older ones for the same dataset.

    A card that already has these results is left unchanged.
    """
    results = read_card_results(files)
    require_own_results(results, folder)
    card = read_edited_card(folder)
    if all(result in card.results for result in results):
        return
    measured = {(result.task, result.dataset) for result in results}
    kept = [result for result in card.results if (result.task, result.dataset) not in measured]
    write_model_card(folder, replace(card, results=(*kept, *results)), name=folder.name)


def _summarize(result: Result) -> CardResult:
    measured = {name: (value, bounds) for name, value, bounds in _list_scores(result.scores)}
    return CardResult(
        result.task,
        label_dataset(result, with_languages=True),
        {name: value for name, (value, _) in measured.items()},
        fingerprint=result.fingerprint,
        dtype=result.protocol["model"]["dtype"],
        count=_describe_counts(result.counts),
        intervals={name: bounds for name, (_, bounds) in measured.items() if bounds},
    )


def _describe_counts(counts: Mapping[str, Any]) -> str:
    if "languages" in counts:  # languages may share images
        parts = counts["languages"].values()
        shown = {"language": len(parts), "text": sum(part["texts"] for part in parts)}
    else:
        nouns = ("item", "image") if "classes" in counts else ("item", "image", "text")
        shown = {noun: counts.get(f"{noun}s") for noun in nouns}
    return ", ".join(counted(count, noun) for noun, count in shown.items() if count)


def _list_scores(
    scores: Any, path: str = "", interval: Mapping[str, float] | None = None
) -> Iterator[tuple[str, float, tuple[float, ...]]]:
    """Yield the path of every score, its value, and the bounds of its interval, if any."""
    if isinstance(scores, Mapping):
        if "value" in scores:
            yield from _list_scores(scores["value"], path, scores)
        intervals = scores.get("intervals", {})
        for name, value in scores.items():
            if name not in _DETAILS:
                yield from _list_scores(value, f"{path}.{name}".strip("."), intervals.get(name))
    elif isinstance(scores, int | float):
        yield path, scores, () if interval is None else (interval["low"], interval["high"])
