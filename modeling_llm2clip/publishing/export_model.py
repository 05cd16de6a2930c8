"""Writes one folder that AutoModel, pipelines and sentence-transformers load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..configuration_llm2clip import LLM2CLIPConfig
from ..encoding.devices import find_device
from ..model_folders.atomic_folder import atomic_folder, require_new_folder
from ..model_folders.golden_embeddings import write_golden
from ..model_folders.model_card import write_model_card
from ..model_folders.model_card_data import (
    CardData,
    read_card_facts,
    require_license,
    require_own_results,
)
from ..model_folders.model_folder import find_model_folder, find_records
from ..model_folders.sentence_transformers_files import (
    SETTINGS_FILE,
    write_sentence_transformers_files,
)
from ..model_folders.training_state import require_trained
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor

DEFAULT_PROMPTS = {"query": "", "document": ""}
COMPONENTS: dict[str, Any] = {
    "full": LLM2CLIPModel,
    "text": LLM2CLIPTextModel,
    "vision": LLM2CLIPVisionModel,
}
DTYPES = ("float32", "bfloat16", "float16")
# As transformers has it by default; the Hub takes files up to 50 GB.
SHARD_SIZE = "50GB"


@dataclass(frozen=True)
class ExportArguments:
    """What of a checkpoint is written, and how.

    Attributes:
        components: `"full"`, or a half alone: `"text"` or `"vision"`.
        dtype: of the weights; None keeps theirs.
        max_shard_size: of a weight file, e.g. `"5GB"`.
        base_models: Hub ids of the vision tower and of the language model, for the card; None
            keeps the names that the configuration has.
        name: what the card calls the model; None for the folder's last name.
        requires_license: refuse, before anything is loaded, what could not be published: a model
            without a license, or an untrained one.
    """

    components: str = "full"
    dtype: str | None = None
    max_shard_size: str = SHARD_SIZE
    base_models: tuple[str, str] | None = None
    name: str | None = None
    requires_license: bool = False

    def __post_init__(self) -> None:
        errors = []
        if self.components not in COMPONENTS:
            errors.append(f"components={self.components!r} must be one of {list(COMPONENTS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            errors.append(f"dtype={self.dtype!r} must be one of {list(DTYPES)}")
        if errors:
            raise ValueError(f"ExportArguments: {'; '.join(errors)}.")


def export_model(
    source: str | Path,
    folder: str | Path,
    arguments: ExportArguments | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    revision: str | None = None,
    device: str = "cpu",
) -> Path:
    """Write a checkpoint anew: the whole or a half, in another dtype, in smaller files.

    Instructions, licenses and training data are taken over from its card, and its results where
    whole model and dtype stay; the record of its conversion too.

    Args:
        source: folder or Hub id of an LLM2CLIP model.
        folder: folder to write.
        facts: fields of `CardData` that are stated anew.
        revision: branch, tag or commit of a Hub id.
        device: where the golden embeddings are computed; see `find_device`.
    Raises: FileExistsError when `folder` exists and is not empty; ValueError for a source that is
        neither folder nor Hub id, or lacks the component.
    """
    arguments = arguments or ExportArguments()
    source, card_facts = check_export(source, folder, arguments, facts=facts, revision=revision)
    before = LLM2CLIPConfig.from_pretrained(source)
    processor = LLM2CLIPProcessor.from_pretrained(source)
    model = COMPONENTS[arguments.components].from_pretrained(
        source, dtype=getattr(torch, arguments.dtype) if arguments.dtype else "auto"
    )
    is_same = model.dtype == before.dtype and before.architectures == [type(model).__name__]
    if not is_same and "results" not in (facts or {}):
        card_facts = replace(card_facts, results=())
    if arguments.base_models:
        towers = (model.config.vision_config, model.config.text_config)
        for tower, name in zip(towers, arguments.base_models, strict=True):
            tower._name_or_path = name
    return save_model(
        model.eval().to(find_device(device)),
        processor,
        folder,
        prompts=read_prompts(source),
        facts=card_facts,
        name=arguments.name,
        max_shard_size=arguments.max_shard_size,
        records=find_records(source),
    )


def check_export(
    source: str | Path,
    folder: str | Path,
    arguments: ExportArguments,
    *,
    facts: Mapping[str, Any] | None,
    revision: str | None,
) -> tuple[Path, CardData]:
    """Make the checks of `export_model` that need no weights; its arguments and errors.

    Returns:
        The source's folder, and what the card will state.
    """
    require_new_folder(Path(folder))
    found = find_model_folder(source, revision=revision)
    card_facts = replace(read_card_facts(found), **(facts or {}))
    if arguments.requires_license:
        require_license(card_facts, found)
        config = LLM2CLIPConfig.from_pretrained(found)
        require_trained(config, purpose="publishing", source=found)
    return found, card_facts


def save_model(
    model: LLM2CLIPModel | LLM2CLIPTextModel | LLM2CLIPVisionModel,
    processor: LLM2CLIPProcessor,
    folder: str | Path,
    *,
    prompts: Mapping[str, str] | None = None,
    facts: CardData | None = None,
    name: str | None = None,
    max_shard_size: str = SHARD_SIZE,
    records: Mapping[str, Path] | None = None,
) -> Path:
    """Write weights, code, processor, sentence-transformers files, golden embeddings and a card.

    Everything goes into a temporary folder beside the target, which is renamed when complete: a
    broken-off export leaves nothing that loads.

    Args:
        model: a whole model, or a half of one; a half keeps the whole processor.
        prompts: instructions for sentence-transformers; see `check_instructions`.
        facts: what the card states beside what it reads in the folder.
        name: what the card calls the model; None for the folder's last name.
        max_shard_size: of a weight file.
        records: files of the model's history, copied under these names; see `find_records`.
    Returns: the folder.
    Raises: FileExistsError when the folder exists and is not empty; ValueError for a model of
        another class, whose code does not travel with it.
    """
    _require_own_class(model)
    folder = Path(folder)
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        processor.save_pretrained(unfinished)
        write_sentence_transformers_files(
            unfinished,
            model.config,
            processor.tokenizer,
            prompts=DEFAULT_PROMPTS if prompts is None else prompts,
            modalities=list_modalities(model),
        )
        write_golden(unfinished, model, processor)
        for record, path in (records or {}).items():
            shutil.copy2(path, unfinished / record)
        require_own_results(facts.results if facts else (), unfinished)
        write_model_card(unfinished, facts or CardData(), name=name or folder.name)
    return folder


def _require_own_class(model: Any) -> None:
    """The folder's code is the package's, so any other class would load as another model."""
    own = [kind.__name__ for kind in COMPONENTS.values()]
    found = type(model)
    if found.__name__ in own and found.__module__.rsplit(".", 1)[-1] == "modeling_llm2clip":
        return
    way_out = (
        "Merge the adapter into it first (merge_and_unload)."
        if hasattr(model, "merge_and_unload")
        else "A subclass must be published with code of its own (save_pretrained)."
    )
    raise ValueError(f"The model is a {found.__name__}; an export takes {own}. {way_out}")


def list_modalities(model: Any) -> list[str]:
    """What a model takes, in sentence-transformers' words."""
    towers = {"text": "text_model", "image": "vision_model"}
    return [modality for modality, tower in towers.items() if hasattr(model, tower)]


def read_prompts(folder: Path) -> dict[str, str] | None:
    """The instructions of an exported folder; None where it was not exported."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    return dict(json.loads(path.read_text(encoding="utf-8")).get("prompts") or {})
