"""Writes one folder that AutoModel, pipelines and sentence-transformers load, and publishes it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi

from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .golden import write_golden_vectors
from .model_card import write_model_card
from .sentence_transformers_files import write_sentence_transformers_files

DEFAULT_PROMPTS = {"query": "", "document": ""}


def export_model(
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    folder: str | Path,
    *,
    prompts: Mapping[str, str] | None = None,
    license_id: str | None = None,
    scores: Mapping[str, float] | None = None,
) -> Path:
    """Write weights, code, processor, sentence-transformers files, golden vectors and a card.

    Everything goes into a temporary folder beside the target, which is renamed when complete: a
    broken-off export leaves nothing that loads.

    Args:
        prompts: instructions for sentence-transformers; see `check_instructions`.
        license_id: SPDX or Hub name of the weights' licence, for the card.
        scores: measured figures for the card, e.g. `{"unseen_text_to_image_r1": 0.25}`.
    Returns: the folder.
    Raises: FileExistsError when the folder exists and is not empty.
    """
    folder = Path(folder)
    require_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        write_sentence_transformers_files(
            unfinished,
            model.config,
            processor.tokenizer,
            prompts=DEFAULT_PROMPTS if prompts is None else prompts,
        )
        write_golden_vectors(unfinished, model, processor)
        write_model_card(unfinished, model.config, license_id=license_id, scores=scores or {})
        unfinished.chmod(0o755)
        for file in unfinished.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes for its owner alone
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def require_new_folder(folder: Path) -> None:
    """Raise FileExistsError when a folder exists and is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty. Name a new folder, or remove it.")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    commit_message: str = "Upload LLM2CLIP model",
    revision: str | None = None,
) -> str:
    """Upload an exported folder in one commit; returns the commit's URL."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision
    )
    return str(commit.commit_url)
