"""Identify the model of an index: its name, its fingerprint and its tally of encoded images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import hash_json
from ..model_folders.fingerprint import fingerprint_embeddings
from ..model_folders.model_folder import find_model_folder, require_own_model
from ..model_folders.model_loading import require_trained
from ..model_folders.training_images import ImageTally
from .index_about import About
from .index_database import IndexDatabase

_DIGITS = 4  # decimals to keep of sums of numbers below 1


def find_whole_model(source: str | Path) -> Path:
    """Return the folder of a trained model with both towers; raise ValueError for other models."""
    require_own_model(source)
    folder = find_model_folder(source)
    config = LLM2CLIPConfig.from_pretrained(folder)
    if config.architectures not in (None, ["LLM2CLIPModel"]):
        raise ValueError(
            f"{folder} holds a {config.architectures[0]}, but search needs both towers. Pass a "
            "whole model."
        )
    require_trained(config, purpose="search", source=source)
    return folder


def name_model(source: str | Path) -> str:
    """Return the name an index stores for a model: the absolute path of a folder, or a Hub id."""
    return str(Path(source).resolve()) if Path(source).is_dir() else str(source)


def fingerprint_whole_model(folder: Path) -> dict[str, dict[str, str]]:
    return {
        "text": fingerprint_embeddings(folder, "text"),
        "image": fingerprint_embeddings(folder, "image"),
    }


def hash_file_facts(folder: Path) -> str:
    """Hash the names, sizes and times of a model's files without reading them."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return hash_json(
        [[f.name, (s := f.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns] for f in files]
    )


def require_same_model(database: IndexDatabase, source: str | Path, folder: Path) -> None:
    """Raise ValueError if the model's embeddings differ from the index's embeddings."""
    if database.about.model_files != hash_file_facts(folder):
        database.require_same_fingerprint(source, fingerprint_whole_model(folder))


def restore_tally(about: About) -> ImageTally:
    stored = about.tally
    if stored is None:
        return ImageTally()
    return ImageTally(stored["num_images"], np.asarray(stored["total"]))


def store_tally(tally: ImageTally) -> dict[str, Any] | None:
    if not tally.num_images:
        return None
    return {"num_images": tally.num_images, "total": np.round(tally.total, _DIGITS).tolist()}
