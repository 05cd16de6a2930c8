"""The model that a stage works on: a folder, a Hub id, or a loaded pair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .model_card_data import read_card_data
from .model_folder import find_model_folder
from .model_writing import save_model

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
def open_source(source: Source, output: Path) -> Iterator[StageSource]:
    """Give the folder of a model; the processes of a launcher must have joined.

    A loaded pair is written to a temporary folder beside the output, so that a stage works on
    exactly these weights, knows them by their hash, and leaves the pair as it is. Licenses and
    training data are taken from the card of the folder that it was loaded from.

    Args:
        source: Folder, Hub id, or (model, processor).
        output: Folder of the stage.

    Raises:
        ValueError: The source is something else.
        OSError: The download failed, or the disk is full.
    """
    if isinstance(source, str | Path):
        yield StageSource(find_model_folder(source), str(source))
        return
    state, folders = PartialState(), [""]
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if state.is_main_process:
            temporary = TemporaryDirectory(prefix=f".{output.name}-source-", dir=output.parent)
            folders = [str(_save(source, Path(stack.enter_context(temporary)) / "model"))]
        broadcast_object_list(folders)
        yield StageSource(Path(folders[0]), type(source[0]).__name__)
        state.wait_for_everyone()  # before the folder is deleted


def _save(source: LoadedModel, folder: Path) -> Path:
    model, processor = source
    origin = Path(model.name_or_path or "")
    card = None
    if (origin / "README.md").is_file():
        card = replace(read_card_data(origin), results=())
    return save_model(model, processor, folder, card=card)
