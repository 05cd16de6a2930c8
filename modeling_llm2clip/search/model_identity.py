"""Which model an index is of: what decides its embeddings, and a digest that is found at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import hash_json
from ..model_folders.fingerprint import fingerprint_embeddings
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_types import require_own_model
from ..model_folders.training_state import require_trained
from .index_about import About, require_same_fingerprint

_WHOLE = "LLM2CLIPModel"
_MODALITIES: tuple[Literal["text", "image"], ...] = ("text", "image")


def find_whole_model(source: str | Path) -> Path:
    """Find the folder of a model that texts and images can be searched with."""
    require_own_model(source)
    folder = find_model_folder(source)
    config = LLM2CLIPConfig.from_pretrained(folder)
    if config.architectures not in (None, [_WHOLE]):
        raise ValueError(
            f"{folder} holds a {config.architectures[0]}; a search needs a whole model, with both "
            "towers."
        )
    require_trained(config, purpose="search", source=source)
    return folder


def name_model(source: str | Path) -> str:
    """Return how an index names its model: the whole path of a folder, or a Hub id."""
    return str(Path(source).resolve()) if Path(source).is_dir() else str(source)


def fingerprint_whole_model(folder: Path) -> dict[str, dict[str, str]]:
    """Describe what decides the embeddings of texts and of images."""
    return {modality: fingerprint_embeddings(folder, modality) for modality in _MODALITIES}


def hash_file_facts(folder: Path) -> str:
    """Hash names, sizes and times of a model's files, which takes no time."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return hash_json(
        [[f.name, (s := f.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns] for f in files]
    )


def require_same_model(location: str, about: About, source: str | Path, folder: Path) -> None:
    """Refuse a model that is not the one of an index."""
    if about.model_files == hash_file_facts(folder):
        return
    require_same_fingerprint(location, about, source, fingerprint_whole_model(folder))
