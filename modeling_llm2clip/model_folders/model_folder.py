"""Finds the folder of a model by its path or Hub id, and files in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from .hub_access import explain_missing, fetch_hub_file, is_hub_id

# What a converted model was made of, written by its conversion.
RECORD_FILE = "conversion.json"
# The same, where the weights were trained since: they are no longer those of the listed files.
RECORD_BEFORE_TRAINING = "conversion_before_training.json"
_DEMO_MODEL = Path("..") / "llm2clip-demo" / "model"  # as a notebook in examples/ sees it
# Other formats of the same weights, which are read only where they are asked for by name.
_NOT_DOWNLOADED = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "onnx/*",
    "openvino/*",
]  # fmt: skip


def find_model_folder(
    source: str | Path, *, revision: str | None = None, only: Sequence[str] | None = None
) -> Path:
    """Return a local folder, or download a Hub repository and return its snapshot.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit of the Hub repository.
        only: Names of files: nothing else is downloaded, and these in any format.

    Returns:
        The folder.

    Raises:
        ValueError: The source is neither a folder nor a Hub id, or a folder with a revision.
        OSError: The download failed.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(
                f"{source} is a folder, which has no revision {revision!r}; leave it out."
            )
        return Path(source)
    require_there(source)
    try:
        return Path(
            snapshot_download(
                str(source),
                revision=revision,
                allow_patterns=None if only is None else list(only),
                ignore_patterns=_NOT_DOWNLOADED if only is None else None,
            )
        )
    except LocalEntryNotFoundError as error:  # which names no repository
        raise FileNotFoundError(f"{source} cannot be downloaded: {error}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{source}: no such folder here, and the Hub has no such repository, or a private one. "
            "Correct the name, or log in (hf auth login)."
        ) from error


def require_there(source: str | Path) -> None:
    """Refuse a source that is neither a folder nor a Hub repository that can be reached.

    Args:
        source: Folder or Hub id.

    Raises:
        ValueError: Neither is there; it is found out within seconds.
    """
    if not Path(source).is_dir() and (missing := explain_missing(source)):
        raise ValueError(f"{source}: {missing}. Correct the path or id.")


def find_demo_model() -> str:
    """Find the model that the notebooks use: `LLM2CLIP_MODEL`, or the folder that the demo wrote.

    Returns:
        Folder or Hub id.

    Raises:
        FileNotFoundError: there is no such model; the message names the command that writes one.
    """
    source = os.environ.get("LLM2CLIP_MODEL") or str(_DEMO_MODEL)
    if not is_hub_id(source) and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"There is no model in {source}. Run `llm2clip demo` at the root of the repository; it "
            "writes llm2clip-demo/model in a few minutes. Or set LLM2CLIP_MODEL to another model "
            "folder or Hub id."
        )
    return source


def find_source_file(source: str | Path, name: str, *, revision: str | None = None) -> Path | None:
    """Find a file of a tower: in its folder, beside its weight file, or on the Hub.

    Args:
        source: Folder, weight file, Hub id, or a `.gguf` file of a Hub repository.
        name: Name of the file.
        revision: Branch, tag or commit of the Hub repository.

    Returns:
        The file; None where there is none, or the Hub cannot be reached.
    """
    path = Path(source)
    if path.exists():
        file = (path if path.is_dir() else path.parent) / name
        return file if file.is_file() else None
    repository = path.parent if path.suffix == ".gguf" else path
    return fetch_hub_file(repository, name, revision=revision)


def is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file is a folder's own once all links are followed.

    Args:
        file: File in the folder.
        folder: A folder; of a snapshot in huggingface_hub's cache, the contents that this cache
            keeps for its repository are inside too.
    """
    content, root = file.resolve(), folder.resolve()
    in_snapshots = root.parent.name == "snapshots"
    return content.is_relative_to(root) or (
        in_snapshots and content.parent == root.parent.parent / "blobs"
    )


def list_uploaded_files() -> list[Path]:
    """List the package's files that are copied beside the weights, as remote code."""
    package = Path(__file__).parents[1]
    return sorted(path for path in package.glob("*.py") if not path.name.startswith("_"))


def find_records(folder: Path, *, trained_since: bool = False) -> dict[str, Path]:
    """Find the record of a folder's conversion.

    Args:
        folder: Model folder.
        trained_since: Whether the model that is written of this folder has other weights.

    Returns:
        Name in the folder that is written → file; empty where nothing was converted.
    """
    names = (RECORD_FILE, RECORD_BEFORE_TRAINING)
    found = {name: folder / name for name in names if (folder / name).is_file()}
    if trained_since and found:
        return {RECORD_BEFORE_TRAINING: next(iter(found.values()))}
    return found
