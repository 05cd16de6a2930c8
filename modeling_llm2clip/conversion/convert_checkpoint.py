"""Turns an official checkpoint into a folder that loads everywhere, and proves it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .._environment import list_versions
from ..building.image_settings import MEAN_AND_STD
from ..configs.export_config import ConvertConfig
from ..configs.source_format import SourceFormat
from ..data.atomic_files import hash_file
from ..doctor.check_model import check_model
from ..model_folders.atomic_folder import require_new_folder
from ..model_folders.model_card import (
    CardData,
    find_license,
    set_base_models,
    update_card_data,
)
from ..model_folders.model_folder import RECORD_FILE
from ..model_folders.model_writing import LazyModel, cast_weights, save_model
from ..processing_llm2clip import LLM2CLIPProcessor
from .conversion_plan import ConversionPlan, plan_conversion
from .layouts import find_layout
from .source_checkpoint import (
    CheckpointSource,
    LanguageModel,
    LLMSource,
    find_commit,
    find_published_hash,
    open_checkpoint,
    open_language_model,
    public_name,
    split_revision,
)


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

    The result is loaded through AutoModel and examined by `check_model` before it gets its name.
    Memory holds one weight file at a time, and then the model once.

    Args:
        source: Checkpoint with vision tower and text adapter: a weight file, a folder or a Hub id.
        text_model: Its language model: folder or Hub id. For `components="vision"` only its
            configuration and tokenizer are read.
        output: New or empty folder.
        source_format: What the weights do not say.
        config: What is written, and what the card states; licenses of the towers that are not given
            are those on the sources' cards.
        name: What the card calls the model; None for the folder's last name.

    Returns:
        The folder. Its `conversion.json` records the sources, whether each file was compared with
            the Hub's SHA-256 (`as_published`), and the keys that were left out.

    Raises:
        FileExistsError: The folder exists and is not empty.
        ValueError: The sources do not fit each other or the source format, see `plan_conversion`;
            or a file that was downloaded from the Hub has not the SHA-256 that it had there.
        OSError: There is too little disk space.
        RuntimeError: The written model is not healthy; nothing is left of it.

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
    # The checkpoint is not held: the plan has its weights.
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
        files={RECORD_FILE: json.dumps(record, indent=2, ensure_ascii=False) + "\n"},
        max_shard_size=config.max_shard_size,
        device=config.device,
        verify=lambda folder: _require_healthy(folder, device=config.device),
    )


def _require_healthy(folder: Path, *, device: str) -> None:
    report = check_model(folder, device=device)
    if not report.healthy:
        raise RuntimeError(f"The converted model is not healthy:\n{report}")


def _make_record(
    plan: ConversionPlan,
    source: CheckpointSource,
    language: LanguageModel,
    source_format: SourceFormat,
) -> dict[str, Any]:
    """Record for good what the folder was made of; names of files, not their paths."""
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
        "files": [_describe_file(path) for path in plan.files],
        "source_format": asdict(source_format),
        "pixels": {"mean": mean, "std": std},
        "dropped": {reason: sorted(keys) for reason, keys in by_reason.items()},
    }


def _describe_file(path: Path) -> dict[str, Any]:
    """Hash a file, which has to be the one that the Hub published where that is known."""
    found, published = hash_file(path), find_published_hash(path)
    if published not in (None, found):
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {found}, the Hub's was {published}. Delete it, and "
            "download it again."
        )
    checked = published is not None
    size = path.stat().st_size
    return {"name": path.name, "bytes": size, "sha256": found, "as_published": checked}
