"""The checkpoint to convert: where it is, its weights, and which family they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers import AutoConfig, PreTrainedConfig

from ..loading_llm2clip import list_weight_files, load_without_code
from ..model_folders.model_folder import find_model_folder
from ..model_folders.weights import WEIGHT_NAMES, LazyTensor, open_weights
from .layouts import LAYOUTS
from .layouts.layout import Layout

_KEYS_SHOWN = 6
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Where huggingface_hub notes what it downloaded into a folder that a user named.
_NOTES = Path(".cache") / "huggingface" / "download"


@dataclass(frozen=True)
class CheckpointSource:
    """Where a checkpoint is.

    Attributes:
        name: A weight file, a folder, or a Hub id.
        file: Name of the weight file inside a folder or Hub repository; None where it has the names
            that transformers gives.
        revision: Branch, tag or commit of the Hub repository.
    """

    name: str | Path
    file: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, whose weights are still on the disk.

    Attributes:
        source: Where it is.
        files: Its weight files.
        tensors: Its weights, by their keys.
        stated_config: The repository's own configuration; None where there is none.
    """

    source: CheckpointSource
    files: list[Path]
    tensors: dict[str, LazyTensor]
    stated_config: PreTrainedConfig | None


def open_checkpoint(source: CheckpointSource) -> Checkpoint:
    """Open a checkpoint; a Hub repository is downloaded first.

    Args:
        source: Where it is.

    Raises:
        ValueError: No checkpoint is there, it is damaged, or a local one is given a revision.
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
    files = list_weight_files(path, names=WEIGHT_NAMES)
    return Checkpoint(source, files, open_weights(path), stated)


def require_layout(checkpoint: Checkpoint, layout: Layout) -> None:
    """Refuse a checkpoint whose keys are not those of a layout, and name the one they are of."""
    fitting = [one for one in LAYOUTS if all(mark in checkpoint.tensors for mark in one.marks)]
    if fitting == [layout]:
        return
    source = checkpoint.source.name
    if len(fitting) == 1:
        raise ValueError(
            f"{source} has keys of the family {fitting[0].name!r}, the source format is for "
            f"{layout.name!r}. Choose the source format {fitting[0].choice!r}."
        )
    shown, families = sorted(checkpoint.tensors)[:_KEYS_SHOWN], sorted(one.name for one in LAYOUTS)
    raise ValueError(
        f"{source} has keys of {len(fitting)} known families, wanted one of {families}. Its first "
        f"keys: {shown}. A checkpoint of plain CLIP or of another code base cannot be converted; "
        "build a new model from its tower instead (llm2clip build)."
    )


def public_name(source: str | Path) -> str:
    """Return a Hub id, or the name of a local file or folder without its path.

    What a written model states of its sources gets published, so it holds no paths.

    Args:
        source: Hub id, file or folder.
    """
    return Path(source).name if Path(source).exists() else str(source)


def require_no_revision(source: str | Path, revision: str | None) -> None:
    """Refuse a revision of a local source, which has none.

    Args:
        source: Hub id, file or folder.
        revision: Branch, tag or commit; None is always fine.

    Raises:
        ValueError: The source is local and a revision is given.
    """
    if revision is not None and Path(source).exists():
        raise ValueError(
            f"{source} is a local file or folder, which has no revision {revision!r}; leave it out."
        )


def split_revision(source: str | Path) -> tuple[str | Path, str | None]:
    """Split `owner/name@revision` into Hub id and revision; an existing path is never split.

    Args:
        source: Hub id with or without a revision, or a folder.

    Raises:
        ValueError: There is no revision after the `@`, or the source is local.
    """
    if isinstance(source, Path) or "@" not in source or Path(source).exists():
        return source, None
    name, _, revision = source.partition("@")
    if not revision:
        raise ValueError(f"{source} has no revision after its '@'. Write one, or leave it out.")
    require_no_revision(name, revision)
    return name, revision


def find_commit(source: str | Path, paths: Iterable[Path]) -> str | None:
    """Find the commit at which files of a Hub repository were downloaded.

    Args:
        source: Hub id, file or folder.
        paths: Files and folders, some of them in the repository's snapshot in huggingface_hub's
            cache: `models--owner--name/snapshots/COMMIT`.

    Returns:
        The commit; None where none of them is in a snapshot, as with local sources.
    """
    cache = f"models--{str(source).replace('/', '--')}"
    for path in paths:
        parts = path.parts
        if cache in parts:
            folder, *rest = parts[parts.index(cache) + 1 :]
            if folder == "snapshots" and rest:
                return rest[0]
    return None


def find_published_hash(file: Path) -> str | None:
    """Find the SHA-256 that the Hub had for a file when it was downloaded.

    Args:
        file: File in huggingface_hub's cache, whose contents are named by their hashes, or in a
            folder that `hf download --local-dir` wrote, which notes them beside its files.

    Returns:
        64 hexadecimal digits; None where none is recorded, as for small files and other folders.
    """
    content = file.resolve()
    if content.parent.name == "blobs":
        return content.name if _SHA256.fullmatch(content.name) else None
    for folder in file.absolute().parents:
        notes = folder / _NOTES / f"{file.absolute().relative_to(folder)}.metadata"
        if notes.is_file():  # commit, hash and time, a line each
            lines = notes.read_text(encoding="utf-8").splitlines()
            return next((line for line in lines[1:2] if _SHA256.fullmatch(line)), None)
    return None
