"""What loading both towers shares: an account of every key, and errors that name the source."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..loading_llm2clip import load_without_code

# Causal masks, which older checkpoints hold beside the weights.
_MASKS = ("attn.bias", "attention.bias")
_NAMES_SHOWN = 8


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Name the source in transformers' errors about files that are not there.

    Args:
        source: What the user gave.

    Raises:
        OSError: One was raised inside.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{source} cannot be loaded: {error}") from error


def load_with_account(
    model_class: Any, name: str | Path, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load as `from_pretrained` does, without its table of keys, which the caller judges.

    Args:
        model_class: Class with a `from_pretrained`.
        name: Folder or Hub id.
        **settings: As `from_pretrained` takes them.

    Returns:
        The model, and among others its `missing_keys` and `unexpected_keys`.

    Raises:
        ValueError: A weight file is truncated.
    """
    try:
        with _without_table_of_keys():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = load_without_code(
                model_class, name, output_loading_info=True, **settings
            )
    except SafetensorError as error:
        raise ValueError(
            f"{name}: a weight file is truncated or damaged ({error}). Download or save it again."
        ) from error
    return loaded


def refuse_unread_weights(
    whole: PreTrainedModel, tower: PreTrainedModel, info: dict[str, Any], source: str | Path
) -> None:
    """Refuse weights in a module of the tower that the tower does not read.

    Other parts of the checkpoint, such as a head, are beside the tower's modules; buffers are not
    weights.

    Args:
        whole: What was loaded: the tower itself, or a model around it.
        tower: The tower.
        info: What `load_with_account` returned with it.
        source: How errors name the checkpoint.

    Raises:
        ValueError: There are such weights; the tower would give other hidden states.
    """
    parts = set(tower.modules()) - {tower}
    inside = {
        name
        for name, module in whole.named_modules()
        if not isinstance(module, nn.ModuleList) and module in parts
    }
    base = f"{whole.base_model_prefix}."
    unread = sorted(
        key
        for key in info["unexpected_keys"]
        if key.endswith((".weight", ".bias"))
        and not key.endswith(_MASKS)
        and not inside.isdisjoint(_list_parents(key.removeprefix(base)))
    )
    if unread:
        raise ValueError(
            f"{source} has {len(unread)} weights that {type(tower).__name__} does not read, so it "
            f"would give other hidden states: {unread[:_NAMES_SHOWN]}. Correct config.json, or "
            "take the transformers version that the checkpoint names."
        )


def forget_code(holder: Any) -> Any:
    """Remove the name of a repository's code: transformers' own class was loaded.

    Args:
        holder: Configuration or image processor, changed in place and returned.
    """
    holder.__dict__.pop("auto_map", None)
    return holder


def name_without_path(model: PreTrainedModel, source: str | Path) -> None:
    """Keep a folder's name but not its path in a configuration, which gets published.

    Args:
        model: Tower, changed in place.
        source: Hub id, folder or file that it was loaded from.
    """
    if Path(source).exists():
        model.config._name_or_path = Path(source).name


def _list_parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


@contextmanager
def _without_table_of_keys() -> Iterator[None]:
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_needed)
    try:
        yield
    finally:
        logger.removeFilter(_is_needed)


def _is_needed(record: logging.LogRecord) -> bool:
    """Return whether it is not a table of keys, or one that an error of transformers refers to."""
    text = record.getMessage()
    return "LOAD REPORT" not in text or "MISMATCH" in text or "CONVERSION" in text
