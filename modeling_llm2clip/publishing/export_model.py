"""Writes a model folder anew: one tower, another dtype, smaller files, another card, ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..configs.export_config import ExportConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..encoding.devices import find_device
from ..model_folders.atomic_folder import require_new_folder
from ..model_folders.golden_embeddings import require_golden
from ..model_folders.model_card_data import (
    CardData,
    read_card_data,
    set_base_models,
    update_card_data,
)
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_loading import CLASS_OF_COMPONENTS, MODEL_CLASSES, find_model_class
from ..model_folders.model_writing import find_carried_files, save_model
from ..processing_llm2clip import LLM2CLIPProcessor
from ..sentence_transformers_llm2clip import read_instructions
from .card_results import read_card_results, require_own_results
from .hosting_files import render_hosting_files
from .onnx_export import export_onnx
from .vision_tower_export import export_vision_tower


def export_model(
    source: str | Path,
    output: str | Path,
    config: ExportConfig | None = None,
    *,
    revision: str | None = None,
    name: str | None = None,
) -> Path:
    """Write a model folder anew, from one that still gives its recorded embeddings.

    Instructions, licenses, training data and the record of a conversion are carried over, and
    results where all weights stay the same.

    Args:
        source: Folder or Hub id of an LLM2CLIP model.
        output: New or empty folder.
        config: What is written; None for the whole model as it is.
        revision: Branch, tag or commit of the Hub repository.
        name: What the card calls the model; None for the folder's last name.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and is not empty.
        ValueError: The source is neither a folder nor a Hub id, lacks the component, or no longer
            gives its golden embeddings; results were measured with another model; or an ONNX graph
            fails its check, see `export_onnx`.

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
    hosting = render_hosting_files(config, model.config, name=name or Path(output).name)
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
    """Load what is exported, once it gave its golden embeddings in the dtype that it was saved in.

    Another dtype is loaded anew: a model that is cast in memory loses digits of its temperature.
    """
    model_class = MODEL_CLASSES[CLASS_OF_COMPONENTS[config.components]]
    device = find_device(config.device)
    model = model_class.from_pretrained(folder, dtype="auto").eval().to(device)
    require_golden(folder, model, processor)
    dtype = getattr(torch, config.dtype) if config.dtype else model.dtype
    if dtype != model.dtype:
        del model
        model = model_class.from_pretrained(folder, dtype=dtype).eval().to(device)
    return model


def plan_card(folder: Path, config: ExportConfig) -> CardData:
    """Return what the card of an export states.

    Args:
        folder: Folder of the model that is exported.
        config: What is written, and what the card states anew.

    Raises:
        ValueError: A file of results is not one; see `read_card_results`.
    """
    card = read_card_data(folder)
    if config.results:
        return update_card_data(card, config, results=read_card_results(config.results))
    saved = LLM2CLIPConfig.from_pretrained(folder).dtype
    keeps_dtype = config.dtype is None or getattr(torch, config.dtype) == saved
    name = CLASS_OF_COMPONENTS[config.components]
    if not (keeps_dtype and find_model_class(folder).__name__ == name):
        card = replace(card, results=())
    return update_card_data(card, config)
