"""Options that depend on the modality: those the other one refuses, and the stores of `align`."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..configs.encoding_config import EncodingConfig

# Options that a modality has no use for, with their defaults; a command may lack some.
_FOREIGN: dict[str, dict[str, object]] = {
    "text": {"batch_size": None, "num_workers": None, "skip_invalid": False},
    "image": {"token_budget": None},
}


def refuse_foreign_options(config: EncodingConfig, modality: str) -> None:
    """Raise ValueError for options that a modality has no use for.

    Args:
        config: Options of the command.
        modality: text or image.
    """
    foreign = _FOREIGN[modality]
    given = [name for name, default in foreign.items() if getattr(config, name, default) != default]
    if given:
        other = "text" if modality == "image" else "image"
        raise ValueError(
            f"{', '.join(given)}: for --modality {other} alone. Leave it out, or choose that."
        )


def suggest_align(model: str, data: str, store: Path, *, modality: str) -> str:
    """Return the command that aligns a model on a new store and on that of the other modality.

    Args:
        model: Model that made the store.
        data: Captioned images.
        store: Folder of the new store.
        modality: Modality of the new store, text or image.
    """
    stores = {"text": "captions", "image": "images"} | {modality: str(store)}
    words = ["llm2clip", "align", model, data, "aligned"]
    words += ["--caption-store", stores["text"], "--image-store", stores["image"]]
    return shlex.join(words)
