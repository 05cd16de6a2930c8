"""Which kind of model lies somewhere, told from its files and never from its name.

| files | kind |
| --- | --- |
| `config.json` with `model_type` `llm2clip` | `llm2clip` |
| `modules.json` | `sentence-transformers` |
| `config.json` with `model_type` `clip`, `siglip` or `siglip2` | `transformers` |
| `open_clip_config.json` | `open_clip` |
| `texts.safetensors`, `images.safetensors`, or a store of `llm2clip extract` | `embeddings` |

The first line that fits is taken; another kind can be asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.records import CaptionedImage
from ...model_folders.model_folder import find_model_folder
from .clip_siglip import FAMILIES, ClipSiglipEncoder
from .encoder import Encoder, EncoderSettings
from .llm2clip import LLM2CLIPEncoder
from .open_clip_models import CONFIG_FILE as OPEN_CLIP_CONFIG
from .open_clip_models import WEIGHT_FILES, OpenClipEncoder, has_weights
from .sentence_transformers_models import SentenceTransformerEncoder
from .stored_embeddings import StoredEmbeddingsEncoder, holds_embeddings

KINDS = ("llm2clip", "sentence-transformers", "transformers", "open_clip", "embeddings")


def load_encoder(
    source: str | Path,
    settings: EncoderSettings | None = None,
    *,
    kind: str | None = None,
    revision: str | None = None,
    architecture: str | None = None,
    activation: str | None = None,
    records: Sequence[CaptionedImage] | None = None,
    head: str | Path | None = None,
) -> Encoder:
    """Open a model for evaluation; its weights are loaded when they are needed.

    Args:
        source: folder, Hub id, or (open_clip only) a weights file.
        kind: one of `KINDS`; None to tell it from the files.
        revision: of a Hub repository.
        architecture: open_clip's name of what a weights file holds.
        activation: of a weights file, where its architecture leaves it open.
        records, head: for stores of `llm2clip extract`; see `StoredEmbeddingsEncoder`.
    Raises: ValueError when there is no such model, its kind cannot be told, or an argument is for
        another kind.
    """
    settings = settings or EncoderSettings()
    if kind is not None and kind not in KINDS:
        raise ValueError(f"No kind is called {kind!r}; known are {list(KINDS)}.")
    is_file = Path(source).is_file()
    path = Path(source) if is_file else find_model_folder(source, revision=revision)
    kind = kind or ("open_clip" if is_file else detect_model_type(path))
    if kind == "open_clip" and not (is_file or Path(source).is_dir() or has_weights(path)):
        # Older repositories hold them in another format alone, which nothing else reads. A snapshot
        # is called by its commit, so that configuration and weights are of one.
        path = find_model_folder(source, revision=path.name, only=WEIGHT_FILES)
    if is_file and kind != "open_clip":
        raise ValueError(f"{source} is a file; {kind} takes a folder or a Hub id.")
    _refuse_foreign(kind, open_clip={"architecture": architecture, "activation": activation},
                    embeddings={"records": records, "head": head})  # fmt: skip
    name = str(source)
    if kind == "llm2clip":
        return LLM2CLIPEncoder(path, settings, source=name)
    if kind == "sentence-transformers":
        return SentenceTransformerEncoder(path, settings, source=name)
    if kind == "transformers":
        return ClipSiglipEncoder(path, settings, source=name)
    if kind == "open_clip":
        return OpenClipEncoder(
            path, settings, source=name, architecture=architecture, activation=activation
        )
    head_folder = None if head is None else find_model_folder(head)
    return StoredEmbeddingsEncoder(path, settings, source=name, records=records, head=head_folder)


def detect_model_type(folder: Path) -> str:
    """Tell the kind of what lies in a folder.

    Raises: ValueError naming what was found and what was looked for.
    """
    model_type = _read_model_type(folder)
    if model_type == "llm2clip":
        return "llm2clip"
    if (folder / "modules.json").is_file():
        return "sentence-transformers"
    if model_type in FAMILIES:
        return "transformers"
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    if holds_embeddings(folder):
        return "embeddings"
    found = "no config.json" if model_type is None else f"model_type {model_type!r}"
    raise ValueError(
        f"{folder} has {found} and is of no kind that can be told from its files: {list(KINDS)}. "
        "Name the model type (--model-type) if it is one of them."
    )


def _read_model_type(folder: Path) -> str | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file} is damaged ({error}). Get it again.") from error
    return str(content.get("model_type")) if isinstance(content, dict) else None


def _refuse_foreign(kind: str, **arguments_of: dict[str, Any]) -> None:
    for other, arguments in arguments_of.items():
        given = [f"`{name}`" for name, value in arguments.items() if value is not None]
        if given and other.replace("_", "-") != kind and other != kind:
            raise ValueError(
                f"{', '.join(given)} is for {other}, and this is {kind}. Leave it out."
            )
