"""Which model an index is of: what decides its embeddings, and a digest that is found at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import hash_json
from ..model_folders.fingerprint import fingerprint_embeddings
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_loading import require_trained
from ..model_folders.model_types import require_own_model
from .index_about import About, require_same_fingerprint

_WHOLE = "LLM2CLIPModel"
_MODALITIES: tuple[Literal["text", "image"], ...] = ("text", "image")


def find_whole_model(source: str | Path) -> Path:
    """Find the folder of a model that texts and images can be searched with.

    Args:
        source: Folder or Hub id.

    Raises:
        ValueError: It is not an LLM2CLIP model, has one tower alone, or is not trained.
    """
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
    """Return how an index names its model: the whole path of a folder, or a Hub id.

    Args:
        source: Folder or Hub id.
    """
    return str(Path(source).resolve()) if Path(source).is_dir() else str(source)


def fingerprint_whole_model(folder: Path) -> dict[str, dict[str, str]]:
    """Describe what decides the embeddings of texts and of images.

    Args:
        folder: Folder of a whole model.

    Returns:
        By modality, short texts to compare: weights, tokenizer, prompt and the like.
    """
    return {modality: fingerprint_embeddings(folder, modality) for modality in _MODALITIES}


def hash_file_facts(folder: Path) -> str:
    """Hash names, sizes and times of a model's files, which takes no time.

    Args:
        folder: Model folder.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return hash_json(
        [[f.name, (s := f.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns] for f in files]
    )


def require_same_model(location: str, about: About, source: str | Path, folder: Path) -> None:
    """Refuse a model that is not the one of an index.

    Args:
        location: Of the index, for the error.
        about: What the index is of.
        source: How the user named the model.
        folder: Its folder.

    Raises:
        ValueError: It would give other embeddings; every difference is named.
    """
    if about.model_files == hash_file_facts(folder):
        return
    require_same_fingerprint(location, about, source, fingerprint_whole_model(folder))
