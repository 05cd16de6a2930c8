"""The checkpoint to convert: where it lies, its weights, and which family they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers import AutoConfig, PreTrainedConfig

from ..configs.source_format import SOURCE_FORMATS
from ..data.safetensors_files import list_weight_files
from ..loading_llm2clip import load_without_code
from ..model_folders.model_folder import find_model_folder
from .layouts.eva02 import EVA02
from .layouts.hub_clip import HUB_CLIP
from .layouts.layout import Layout
from .layouts.openai import OPENAI
from .layouts.siglip2 import SIGLIP2
from .lazy_tensors import WEIGHT_NAMES, LazyTensor, open_weights
from .public_names import require_no_revision

_LAYOUTS = (HUB_CLIP, OPENAI, EVA02, SIGLIP2)
_KEYS_SHOWN = 6


@dataclass(frozen=True)
class CheckpointSource:
    """Where a checkpoint is taken from.

    Attributes:
        name: a weight file, a folder, or a Hub id.
        file: name of the weight file inside a folder or Hub repository; None where it has the
            names that transformers gives.
        revision: of the Hub repository.
    """

    name: str | Path
    file: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; its weights lie on the disk.

    Attributes:
        stated_config: the repository's own configuration, where it came with one.
    """

    source: CheckpointSource
    files: list[Path]
    tensors: dict[str, LazyTensor]
    stated_config: PreTrainedConfig | None


def open_checkpoint(source: CheckpointSource) -> Checkpoint:
    """Open a checkpoint; a Hub repository is downloaded first.

    Raises: ValueError when there is none, it is broken, or a local one is given a revision.
    """
    require_no_revision(source.name, source.revision)
    path = Path(source.name)
    if source.file is not None and not path.is_dir():
        path = Path(hf_hub_download(str(source.name), source.file, revision=source.revision))
    elif source.file is not None:
        path = path / source.file
    elif not path.is_file():
        path = find_model_folder(source.name, revision=source.revision)
    if not path.exists():
        raise ValueError(f"{path}: no such file. Correct the path or the file's name.")
    has_config = path.is_dir() and (path / "config.json").is_file()
    stated = load_without_code(AutoConfig, path, local_files_only=True) if has_config else None
    return Checkpoint(
        source, list_weight_files(path, names=WEIGHT_NAMES), open_weights(path), stated
    )


def require_layout(checkpoint: Checkpoint, name: str) -> Layout:
    """Return the layout of a recipe, which the checkpoint's keys must have.

    Raises: ValueError naming the recipe that fits, or showing keys of a family that none knows.
    """
    fitting = [layout for layout in _LAYOUTS if all(m in checkpoint.tensors for m in layout.marks)]
    chosen = next(layout for layout in _LAYOUTS if layout.name == name)
    if chosen in fitting and len(fitting) == 1:
        return chosen
    source = checkpoint.source.name
    recipes = {recipe.layout: name for name, recipe in SOURCE_FORMATS.items()}
    if len(fitting) == 1:
        found = fitting[0].name
        raise ValueError(
            f"{source} has keys of the family {found!r}, the recipe is for {name!r}. Choose the "
            f"recipe {recipes[found]!r}."
        )
    shown = sorted(checkpoint.tensors)[:_KEYS_SHOWN]
    raise ValueError(
        f"{source} has keys of {len(fitting)} known families, wanted one of {sorted(recipes)}. Its "
        f"first keys: {shown}. A checkpoint of plain CLIP or of another code base cannot be "
        "converted; build a new model from its tower instead (llm2clip build)."
    )
