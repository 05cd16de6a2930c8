"""Writes a new model folder from an older one and what a training changed.

Weights are copied file by file: memory holds one file at most, and the LLM is never built.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME

from ..model_folders.atomic_folder import atomic_folder, require_new_folder
from ..model_folders.golden_embeddings import GOLDEN_FILE, renew_golden, write_golden
from ..model_folders.model_card import write_model_card
from ..model_folders.model_card_data import CardResult, read_card_facts
from ..model_folders.model_folder import (
    RECORD_BEFORE_TRAINING,
    RECORD_FILE,
    find_records,
    list_uploaded_files,
)
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from ..training.alignment.alignment_model import AlignmentModel

_RECORDS = (RECORD_FILE, RECORD_BEFORE_TRAINING)
_WEIGHTS = "*.safetensors"
_NAMES_SHOWN = 5


def assemble_folder(
    source: Path,
    trained: Mapping[str, Tensor],
    folder: Path,
    *,
    training_data: Sequence[str] = (),
    text_adapter_trained: bool = True,
    projections_trained: bool = True,
    results: Sequence[CardResult] = (),
    caution: str | None = None,
) -> bool:
    """Write a model's folder with some of its weights replaced.

    Everything goes into a temporary folder beside the target, which is renamed when complete.
    Code, model card and golden embeddings are written anew, all else is copied; the record of a
    conversion under a name that says it is of the weights before training. Results on the old card
    were measured with other weights, and are left out.

    Args:
        source: folder of the model that was trained.
        trained: weights by their names there; each takes the dtype it had there.
        folder: folder to write.
        training_data: what was trained on, for the card, beside what the source states.
        text_adapter_trained, projections_trained: what the new config.json says of these parts.
        results: measured with the trained weights.
        caution: what the card must warn of.
    Returns: whether golden embeddings were recorded; not, where the source has none of its LLM.
    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: a weight has another name or shape than in the source.
    """
    require_new_folder(folder)
    _require_places(source, trained)
    facts = read_card_facts(source)
    data = dict.fromkeys((*facts.training_data, *training_data))
    with atomic_folder(folder) as unfinished:
        for path in source.glob("[!.]*"):  # no .git or .cache
            if path.is_dir():
                shutil.copytree(path, unfinished / path.name)
            elif path.suffix != ".safetensors" and path.name not in _RECORDS:
                shutil.copy2(path, unfinished / path.name)
        for name, path in find_records(source, trained_since=True).items():
            shutil.copy2(path, unfinished / name)
        for path in list_uploaded_files():
            shutil.copy2(path, unfinished / path.name)
        _write_training_state(
            unfinished,
            text_adapter_trained=text_adapter_trained,
            projections_trained=projections_trained,
        )
        for path in _list_weights(source):
            _copy_weights(path, unfinished / path.name, trained)
        has_golden = _record_golden(source, unfinished, trained)
        facts = replace(facts, results=tuple(results), caution=caution, training_data=tuple(data))
        write_model_card(unfinished, facts, name=folder.name)
    return has_golden


def _list_weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(_WEIGHTS) if path.name != GOLDEN_FILE)


def _require_places(source: Path, trained: Mapping[str, Tensor]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _list_weights(source):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    unknown = sorted(set(trained) - set(shapes))
    misshapen = {
        name: (tuple(value.shape), shapes[name])
        for name, value in trained.items()
        if name in shapes and tuple(value.shape) != shapes[name]
    }
    if unknown or misshapen:
        raise ValueError(
            f"{source} has no place for {len(unknown)} trained weights {unknown[:_NAMES_SHOWN]}, "
            f"and {len(misshapen)} have another shape (trained, there): "
            f"{dict(list(misshapen.items())[:_NAMES_SHOWN])}. Give the folder that was trained."
        )


def _copy_weights(source: Path, target: Path, trained: Mapping[str, Tensor]) -> None:
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    for name in set(tensors) & set(trained):
        tensors[name] = trained[name].to(tensors[name].dtype).contiguous()
    save_file(tensors, target, metadata=metadata)


def _write_training_state(folder: Path, **state: bool) -> None:
    path = folder / CONFIG_NAME
    content = json.loads(path.read_text(encoding="utf-8")) | state
    # As `save_pretrained` writes it.
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _record_golden(source: Path, folder: Path, trained: Mapping[str, Tensor]) -> bool:
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    if any(name.startswith("text_model.") for name in trained):
        model = LLM2CLIPModel.from_pretrained(folder).eval()
        write_golden(folder, model, processor)
        return True
    model = AlignmentModel.from_pretrained(folder).eval()
    return renew_golden(source, folder, model, processor)
