"""Which model an index is of: what decides its embeddings, and a digest that is found at once."""

from __future__ import annotations

from pathlib import Path

from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import hash_json, list_differences
from ..model_folders.fingerprint import fingerprint_model, fingerprint_text, fingerprint_vision
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_types import require_own_model
from ..model_folders.training_state import require_trained
from .index_database import About

_WHOLE = "LLM2CLIPModel"


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


def fingerprint_embeddings(folder: Path) -> dict[str, str]:
    """Describe what decides the embeddings of texts and images.

    Args:
        folder: Folder of a whole model.

    Returns:
        Short texts to compare: weights, tokenizer, prompt, image processor and the like.
    """
    text, vision = fingerprint_text(folder), fingerprint_vision(folder)
    return {
        **fingerprint_model(folder),
        "tokenizer": text["tokenizer"],
        "prompt": text["prompt"],
        "text_architecture": text["architecture"],
        "text_pooling": text["pooling"],
        "direction": text["direction"],
        "max_text_length": text["max_text_length"],
        "vision_architecture": vision["architecture"],
        "vision_pooling": vision["pooling"],
        "image_processor": vision["image_processor"],
    }


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
    found = fingerprint_embeddings(folder)
    if differences := list_differences(about.fingerprint, found):
        raise ValueError(
            f"{location} is an index of the model {about.model}, and {source} gives other "
            f"embeddings: {'; '.join(differences)}. Search with the model of the index, or index "
            "the images with this one into a new database."
        )
