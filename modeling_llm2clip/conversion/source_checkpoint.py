"""Opens the checkpoint and the LLM of a conversion without reading their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .._suggestions import list_first
from ..building.lora_merging import merge_lora_weights
from ..building.text_towers import require_decoder, require_own_tokenizer
from ..loading_llm2clip import list_weight_files, load_without_code
from ..model_folders.model_folder import find_model_folder
from ..model_folders.weights import WEIGHT_NAMES, LazyTensor, is_lora_alone, open_weights
from .layouts import LAYOUTS
from .layouts.layout import Drop, Layout, RenamedWeights, apply_rules, rename

_RULES = (rename(r"(?:model\.)?((?:embed_tokens|layers|norm)\..*)", r"text_model.\1"),)
_FREQUENCIES = r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
_DROPS = (
    Drop(r"lm_head\.(?:weight|bias)", "the head for the next token, which is not used"),
    Drop(_FREQUENCIES, "rotary frequencies, which the LLM computes from its configuration"),
)
_PREFIX = "text_model."


@dataclass(frozen=True)
class CheckpointSource:
    """The location of a checkpoint.

    Attributes:
        name: A weight file, a folder, or a Hub id.
        file: Name of the weight file in the folder or Hub repository; None if the file has one of
            transformers' default names.
        revision: Branch, tag or commit of the Hub repository.
    """

    name: str | Path
    file: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, whose weights are still on disk.

    Attributes:
        source: Its location.
        files: Its weight files.
        tensors: The checkpoint's weights, by key.
        stated_config: The repository's own configuration; None if there is none.
    """

    source: CheckpointSource
    files: list[Path]
    tensors: dict[str, LazyTensor]
    stated_config: PreTrainedConfig | None


def open_checkpoint(source: CheckpointSource) -> Checkpoint:
    """Open a checkpoint; a Hub repository is downloaded first."""
    require_no_revision(source.name, source.revision)
    path = Path(source.name)
    if source.file is not None and not path.is_dir():
        path = Path(hf_hub_download(str(source.name), source.file, revision=source.revision))
    elif source.file is not None:
        path = path / source.file
    elif not path.is_file():
        path = find_model_folder(source.name, revision=source.revision)
    if not path.exists():
        raise ValueError(f"{path}: no such file. Correct the path or the file name.")
    has_config = path.is_dir() and (path / "config.json").is_file()
    stated = load_without_code(AutoConfig, path, local_files_only=True) if has_config else None
    return Checkpoint(
        source, list_weight_files(path, names=WEIGHT_NAMES), open_weights(path), stated
    )


def require_layout(checkpoint: Checkpoint, layout: Layout) -> None:
    """Refuse a checkpoint whose keys belong to another layout, and name that layout."""
    fitting = [
        layout
        for layout in LAYOUTS.values()
        if all(mark in checkpoint.tensors for mark in layout.marks)
    ]
    if fitting == [layout]:
        return
    source = checkpoint.source.name
    if len(fitting) == 1:
        raise ValueError(
            f"{source} has keys of the family {fitting[0].name!r}, but the source format is for "
            f"{layout.name!r}. Use the source format {fitting[0].choice!r}."
        )
    raise ValueError(
        f"{source} has keys of {len(fitting)} known families, expected one of "
        f"{sorted(layout.name for layout in LAYOUTS.values())}. Its keys: "
        f"{list_first(sorted(checkpoint.tensors))}. Checkpoints of plain CLIP or of another "
        "codebase cannot be converted; build a new model from the tower instead (llm2clip build)."
    )


def public_name(source: str | Path) -> str:
    """Return a Hub id, or the name of a local file or folder without its path.

    Models are published with the names of their sources, so the names must not contain paths.
    """
    return Path(source).name if Path(source).exists() else str(source)


def require_no_revision(source: str | Path, revision: str | None) -> None:
    """Refuse a revision if the source is local."""
    if revision is not None and Path(source).exists():
        raise ValueError(
            f"{source} is a local file or folder, which has no revision {revision!r}. Remove it."
        )


def split_revision(source: str | Path) -> tuple[str | Path, str | None]:
    """Split `owner/name@revision` into Hub id and revision; an existing path is never split."""
    if isinstance(source, Path) or "@" not in source or Path(source).exists():
        return source, None
    name, _, revision = source.partition("@")
    if not revision:
        raise ValueError(f"{source} has no revision after the '@'. Add one, or remove the '@'.")
    require_no_revision(name, revision)
    return name, revision


def find_commit(source: str | Path, paths: Iterable[Path]) -> str | None:
    """Find the commit at which files of a Hub repository were downloaded; None for local sources.

    Paths in huggingface_hub's cache contain the commit: `models--owner--name/snapshots/COMMIT`.
    """
    cache = f"models--{str(source).replace('/', '--')}"
    for path in paths:
        parts = path.parts
        if cache in parts:
            folder, *rest = parts[parts.index(cache) + 1 :]
            if folder == "snapshots" and rest:
                return rest[0]
    return None


@dataclass(frozen=True)
class LLMSource:
    """The location of an LLM and of its LoRAs.

    Attributes:
        name: Hub id, or folder with configuration, tokenizer and, usually, weights.
        revision: Branch, tag or commit of the Hub repository.
        loras: LoRAs to merge, in order: folders, or Hub ids as `owner/name` or
            `owner/name@revision`.
    """

    name: str | Path
    revision: str | None = None
    loras: Sequence[str | Path] = ()


@dataclass(frozen=True)
class LanguageModel:
    """An opened LLM, whose weights are still on disk.

    Attributes:
        source: Its location.
        folder: Its folder.
        config: Its configuration.
        tokenizer: Its tokenizer.
    """

    source: LLMSource
    folder: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def open_language_model(source: LLMSource) -> LanguageModel:
    """Read an LLM's configuration and tokenizer without running code from the folder."""
    folder = find_model_folder(source.name, revision=source.revision)
    if is_lora_alone(folder):
        raise ValueError(
            f"{source.name} is a LoRA, not a whole LLM. Pass the LoRA's base model as the LLM, and "
            "the LoRA as the LLM's LoRA."
        )
    config = load_without_code(AutoConfig, folder, local_files_only=True)
    config = config.get_text_config(decoder=True)
    require_decoder(config, source.name)
    tokenizer = load_without_code(AutoTokenizer, folder, local_files_only=True)
    require_own_tokenizer(config, tokenizer, source.name)
    config._name_or_path = public_name(source.name)
    if hasattr(config, "auto_map"):
        del config.auto_map  # refers to code in another repository
    return LanguageModel(source, folder, config, tokenizer)


def open_llm_weights(
    language: LanguageModel, inside: Mapping[str, LazyTensor], *, dtype: torch.dtype
) -> tuple[RenamedWeights, list[Path], list[dict[str, tuple[int, int]]]]:
    """Open the LLM's weights, named `text_model.…`, from its folder or the checkpoint itself.

    Weights in the checkpoint (`inside`) take precedence over the folder's, because the checkpoint
    was trained with them. `dtype` is the dtype of the saved model. Returns the weights, the weight
    files outside the checkpoint, and for each LoRA the counts from `merge_lora_weights`.
    """
    source = language.source
    if inside:
        if source.loras:
            raise ValueError(
                "The checkpoint already contains the LLM's weights with the LoRA merged. Remove "
                "the LoRA."
            )
        return apply_rules(inside, _RULES, _DROPS, source="The LLM in the checkpoint"), [], []
    files = list_weight_files(language.folder, names=WEIGHT_NAMES)
    weights, shown = open_weights(language.folder), f"The LLM {source.name}"
    renamed = apply_rules(weights, _RULES, _DROPS, source=shown)
    counts = []
    for lora in source.loras:
        name, revision = split_revision(lora)
        folder = find_model_folder(name, revision=revision)
        merged, counted = merge_lora_weights(
            {key.removeprefix(_PREFIX): value for key, value in renamed.weights.items()},
            folder,
            base=str(source.name),
            dtype=dtype,
        )
        renamed.weights |= {f"{_PREFIX}{key}": value for key, value in merged.items()}
        files += list_weight_files(folder, names=WEIGHT_NAMES)
        counts.append(counted)
    return renamed, files, counts
