"""Merges a caption-tuned LoRA into the LLM of a model folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...building.lora_merging import merge_lora
from ...model_folders.atomic_folder import require_new_folder
from ...model_folders.model_card_data import read_card_data
from ...model_folders.model_folder import find_model_folder
from ...model_folders.model_writing import find_carried_files, save_model
from ...modeling_llm2clip import LLM2CLIPModel
from ...processing_llm2clip import LLM2CLIPProcessor
from ...sentence_transformers_llm2clip import read_instructions


def merge_caption_adapter(model: str | Path, adapter: str | Path, output: Path) -> Path:
    """Write a copy of a model whose LLM carries the adapter in its own weights.

    The numbers are those of the unmerged LLM up to the rounding of one sum a weight. Instructions,
    licenses and the record of a conversion are taken over.

    Args:
        model: Hub id or folder the adapter was trained on.
        adapter: Hub id or folder of the LoRA.
        output: folder to write.
    Raises: FileExistsError when `output` is not empty; ValueError as `merge_lora`.
    """
    require_new_folder(output)
    loaded = LLM2CLIPModel.from_pretrained(model)
    merge_lora(loaded.text_model, adapter)
    folder = find_model_folder(model)
    return save_model(
        loaded,
        LLM2CLIPProcessor.from_pretrained(model),
        output,
        instructions=read_instructions(folder),
        files=find_carried_files(folder, trained_since=True),
        card=replace(read_card_data(folder), results=()),  # of other weights
    )
