"""Turns an official checkpoint into a folder that loads everywhere, and proves it."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from .. import __version__
from ..base_llm2clip import _CODE_OF_EVERY_FOLDER
from ..data.atomic_files import hash_file
from ..doctor import check_model
from ..doctor.model_report import ModelReport
from ..encoding.devices import find_device
from ..loading_llm2clip import load_without_code
from ..model_folders.atomic_folder import atomic_folder, clear_leftovers, require_new_folder
from ..model_folders.golden_embeddings import write_golden
from ..model_folders.model_card import write_model_card
from ..model_folders.model_card_data import CardData, find_license, require_license
from ..model_folders.model_folder import RECORD_FILE, list_uploaded_files
from ..model_folders.sentence_transformers_files import write_sentence_transformers_files
from ..processing_llm2clip import LLM2CLIPProcessor
from ..publishing.export_model import DEFAULT_PROMPTS, list_modalities
from .conversion_plan import Plan, plan_conversion
from .public_names import find_commit, public_name, split_revision
from .source_checkpoint import CheckpointSource, open_checkpoint
from .source_formats import PREPROCESSINGS, OutputArguments, SourceFormat
from .source_llm import LanguageModel, LLMSource, open_language_model
from .weight_writing import require_space, write_weights


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        folder: the written model.
        num_parameters: of the written model.
        dropped: keys of the sources that were left out → reason.
        diagnosis: of the written model, all checks passed.
    """

    folder: Path
    num_parameters: int
    dropped: Mapping[str, str]
    diagnosis: ModelReport


def convert_checkpoint(
    source: CheckpointSource,
    llm: LLMSource,
    output: str | Path,
    *,
    recipe: SourceFormat,
    arguments: OutputArguments | None = None,
    facts: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> ConversionReport:
    """Convert an official checkpoint together with its LLM.

    Everything goes into a temporary folder beside the target. There the model is loaded through
    AutoModel and examined by `doctor`; only a healthy one is renamed to the target. Memory holds
    one weight file at a time, and then the model once.

    Args:
        source: the checkpoint with vision tower and adapter.
        llm: its language model; of `components="vision"` only configuration and tokenizer are
            read.
        recipe: what the weights do not say, e.g. one of `recipes.SOURCE_FORMATS`.
        facts: fields of `CardData`; the towers' licenses are else those on the sources' cards.
        device: where the written model is loaded and examined; see `find_device`.
    Raises:
        FileExistsError: the target exists and is not empty.
        ValueError: facts that cannot be stated, before anything is opened; the sources do not fit
            each other or the recipe, see `plan_conversion`.
        OSError: no space.
        RuntimeError: the written model is not healthy; nothing is left.
    """
    arguments = arguments or OutputArguments()
    output, device = Path(output), str(find_device(device))
    require_new_folder(output)
    card_facts = _gather_facts(source, llm, facts or {}, arguments)
    checkpoint, language = open_checkpoint(source), open_language_model(llm)
    plan = plan_conversion(checkpoint, language, recipe, arguments)
    del checkpoint  # the plan has its weights
    size = sum(prod(tensor.shape) for tensor in plan.weights.values())
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(output)
    require_space(plan.weights, dtype, output.parent)
    with atomic_folder(output) as unfinished:
        # The configuration comes after the weights: what a kill leaves does not load before they
        # are complete, and has a hidden name, never the target's, until it is examined.
        write_weights(
            plan.weights, unfinished, dtype=dtype, shard_bytes=arguments.shard_size_mb * 1_000_000
        )
        plan = replace(plan, weights={})  # what they keep in memory goes before a model is loaded
        processor = LLM2CLIPProcessor(plan.image_processor, plan.tokenizer, recipe.max_text_length)
        processor.save_pretrained(unfinished)
        _write_record(unfinished, plan, source, language, recipe)
        _write_config(unfinished, plan, dtype, arguments.base_models)
        name = arguments.name or output.name
        _write_faces(unfinished, plan, processor, facts=card_facts, name=name, device=device)
        diagnosis = check_model(unfinished, device=device)
        if not diagnosis.healthy:
            raise RuntimeError(f"The converted model is not healthy:\n{diagnosis.report()}")
    told = _tell_of(output, unfinished, diagnosis)
    return ConversionReport(output, size, plan.dropped, told)


def _gather_facts(
    source: CheckpointSource,
    llm: LLMSource,
    stated: Mapping[str, Any],
    arguments: OutputArguments,
) -> CardData:
    """Make what the card states; the licenses of the towers that were not given are looked up."""
    facts = CardData(**stated)
    facts = replace(
        facts,
        vision_license=facts.vision_license or find_license(source.name, revision=source.revision),
        text_license=facts.text_license or find_license(llm.name, revision=llm.revision),
    )
    if arguments.requires_license:
        require_license(facts, source.name)
    return facts


def _tell_of(folder: Path, unfinished: Path, diagnosis: ModelReport) -> ModelReport:
    """Name the folder that is there now where the examined one is named, which is gone."""
    checks = [
        replace(check, message=check.message.replace(str(unfinished), str(folder)))
        for check in diagnosis.checks
    ]
    return replace(diagnosis, source=str(folder), checks=checks)


def _write_config(
    folder: Path, plan: Plan, dtype: torch.dtype, base_models: tuple[str, str] | None
) -> None:
    """Write `config.json` as `save_pretrained` of a loaded model would, and the code."""
    config = plan.config
    config.architectures = [plan.model_class.__name__]
    config.auto_map = {**_CODE_OF_EVERY_FOLDER, **plan.model_class._auto_classes}
    for part in (config, config.vision_config, config.text_config):
        part.dtype = dtype
    if base_models is not None:
        config.vision_config._name_or_path, config.text_config._name_or_path = base_models
    for path in list_uploaded_files():
        shutil.copy2(path, folder / path.name)
    config.save_pretrained(folder)


def _write_faces(
    folder: Path,
    plan: Plan,
    processor: LLM2CLIPProcessor,
    *,
    facts: CardData,
    name: str,
    device: str,
) -> None:
    """Write golden embeddings, sentence-transformers' files and the card, as an export does."""
    model = load_without_code(AutoModel, folder, local_files_only=True).eval().to(device)
    write_sentence_transformers_files(
        folder,
        plan.config,
        plan.tokenizer,
        prompts=DEFAULT_PROMPTS,
        modalities=list_modalities(model),
    )
    write_golden(folder, model, processor)
    (folder / "golden_embeddings.safetensors").chmod(0o644)
    del model
    gc.collect()  # doctor loads it again
    write_model_card(folder, facts, name=name)


def _write_record(
    folder: Path,
    plan: Plan,
    source: CheckpointSource,
    language: LanguageModel,
    recipe: SourceFormat,
) -> None:
    """Tell for good what the folder was made of; names of files, not their paths."""
    assert recipe.preprocessing is not None
    mean, std = PREPROCESSINGS[recipe.preprocessing]
    llm, paths = language.source, [*plan.files, language.folder]
    by_reason: dict[str, list[str]] = {}
    for key, reason in plan.dropped.items():
        by_reason.setdefault(reason, []).append(key)
    record = {
        "modeling_llm2clip": __version__,
        "checkpoint": {
            "name": public_name(source.name),
            "revision": find_commit(source.name, paths),
        },
        "llm": {
            "name": public_name(llm.name),
            "revision": find_commit(llm.name, paths),
            "adapters": [_describe_adapter(adapter, paths) for adapter in llm.adapters],
        },
        "files": [_describe_file(path) for path in plan.files],
        "recipe": asdict(recipe),
        "pixels": {"mean": mean, "std": std},
        "dropped": {reason: sorted(keys) for reason, keys in by_reason.items()},
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD_FILE).write_text(text, encoding="utf-8")


def _describe_adapter(adapter: str | Path, paths: list[Path]) -> dict[str, str | None]:
    name, _ = split_revision(adapter)
    return {"name": public_name(name), "revision": find_commit(name, paths)}


def _describe_file(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)}
