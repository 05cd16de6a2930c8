"""What an export would write, found out without writing anything."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..configs.export_config import ExportConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..model_folders.atomic_folder import require_new_folder
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_loading import CLASS_OF_COMPONENTS, MODEL_CLASSES
from ..model_folders.model_writing import cast_weights, find_carried_files
from ..model_folders.weights import open_model_weights, plan_shards
from .card_results import require_own_results
from .export_model import plan_card
from .hosting_files import render_hosting_files
from .push_to_hub import require_healthy
from .uploaded_files import PlannedFile, list_own_files

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def plan_export(
    source: str | Path,
    output: str | Path,
    config: ExportConfig | None = None,
    *,
    revision: str | None = None,
) -> list[PlannedFile]:
    """Make the checks of `export_model` and `push_to_hub` that need no written folder.

    Args:
        source: As in `export_model`, like the other arguments.
        output: Folder that would be written.
        config: What would be written: the whole, the text-only or the vision-only model.
        revision: Branch, tag or commit of the Hub repository.

    Returns:
        The files that would be written. Weights have the size of their tensors, other files that
        of the source's.

    Raises:
        ValueError: The source is not healthy, a file to copy is a link that leaves it, or results
            were measured with another model.
        FileExistsError: `output` exists and is not empty.
    """
    config = config or ExportConfig()
    require_new_folder(Path(output))
    folder = find_model_folder(source, revision=revision)
    card = plan_card(folder, config)
    if config.components == "full" and config.dtype is None:
        require_own_results(card.results, folder)
    find_carried_files(folder)
    require_healthy(folder, device=config.device)
    hosting = render_hosting_files(
        config, LLM2CLIPConfig.from_pretrained(folder), name=Path(output).name
    )
    others = [
        file
        for file in list_own_files(folder)
        if not _WEIGHTS.fullmatch(file.path) and file.path not in hosting
    ]
    added = [PlannedFile(path, len(content.encode())) for path, content in hosting.items()]
    return sorted([*_plan_weights(folder, config), *others, *added], key=lambda file: file.path)


def _plan_weights(folder: Path, config: ExportConfig) -> list[PlannedFile]:
    """Distribute the weights as saving them would, from the headers of their files alone."""
    model_class = MODEL_CLASSES[CLASS_OF_COMPONENTS[config.components]]
    left_out = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
    weights = {
        name: tensor
        for name, tensor in open_model_weights(folder).items()
        if not any(re.search(pattern, name) for pattern in left_out)
    }
    if config.dtype is not None:
        weights = cast_weights(weights, getattr(torch, config.dtype), model_class)
    shards = plan_shards(weights, max_shard_size=config.max_shard_size)
    return [
        PlannedFile(file, sum(weights[name].num_bytes for name in names))
        for file, names in shards.items()
    ]
