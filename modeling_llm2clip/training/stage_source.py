"""The model that a stage works on: a folder, a Hub id, or a loaded pair."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from ..model_folders.model_card_data import read_card_data
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_writing import save_model
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor

LoadedModel: TypeAlias = tuple[
    LLM2CLIPModel | LLM2CLIPTextModel | LLM2CLIPVisionModel, LLM2CLIPProcessor
]
Source: TypeAlias = str | Path | LoadedModel


@dataclass(frozen=True)
class StageSource:
    """Where a model is, and what it is called.

    Attributes:
        folder: Its folder.
        name: What the user gave, for records and messages.
    """

    folder: Path
    name: str


@contextmanager
def open_source(source: Source) -> Iterator[StageSource]:
    """Give the folder of a model.

    A loaded pair is written to a temporary folder, so that a stage works on exactly these weights,
    knows them by their hash, and leaves the pair as it is. Licenses and training data are taken
    from the card of the folder that it was loaded from.

    Args:
        source: Folder, Hub id, or (model, processor).

    Raises:
        ValueError: It is none of these.
        OSError: The download failed, or the disk is full.
    """
    if isinstance(source, str | Path):
        yield StageSource(find_model_folder(source), str(source))
        return
    model, processor = source
    origin = Path(model.name_or_path or "")
    card = replace(read_card_data(origin), results=()) if (origin / "README.md").is_file() else None
    with tempfile.TemporaryDirectory(prefix="llm2clip-") as scratch:
        folder = save_model(model, processor, Path(scratch) / "model", card=card)
        yield StageSource(folder, type(model).__name__)
