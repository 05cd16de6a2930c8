"""Loads a tower's weights with an account of every key: what is missing, and what nobody read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from ..loading_llm2clip import build_tower, load_without_code

# Causal masks, which older checkpoints hold beside the weights.
_MASKS = ("attn.bias", "attention.bias")
_MOST_NAMED = 8


def load_with_account(
    model_class: Any, name: str | Path, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load as `from_pretrained` does, without its table of keys, which the caller judges.

    Returns: the model, and `missing_keys` and `unexpected_keys` among others.
    Raises: ValueError when a weight file is cut.
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


def load_decoder(
    name: str | Path, config: PreTrainedConfig, source: str | Path, **settings: Any
) -> PreTrainedModel:
    """Load an LLM without its head; of a model that also sees or hears, its LLM alone.

    Args:
        config: what the checkpoint has as its configuration, maybe with an LLM's inside.
        source: how errors call the checkpoint.
    Raises: ValueError when weights of the LLM are missing, or it has some that its class does not
        read and would compute without.
    """
    text_config = config.get_text_config(decoder=True)
    if text_config is config:
        whole, info = load_with_account(AutoModel, name, config=config, **settings)
        decoder, prefix = whole, ""
    else:
        with torch.device("meta"):  # costs nothing, and the saved model will be of this class
            wanted = type(build_tower(text_config))
        whole, info = load_with_account(AutoModel, name, config=config, **settings)
        prefix, decoder = _find_part(whole, wanted, source)
    missing = sorted(key for key in info["missing_keys"] if key.startswith(prefix))
    if missing:
        raise ValueError(f"{source} lacks weights of its LLM: {missing[:_MOST_NAMED]}.")
    refuse_unread_weights(whole, decoder, info, source)
    decoder.config._name_or_path = whole.config._name_or_path
    return decoder


def refuse_unread_weights(
    whole: PreTrainedModel, tower: PreTrainedModel, info: dict[str, Any], source: str | Path
) -> None:
    """Raise ValueError for weights that lie in a module of the tower and that it does not read.

    Other parts of the checkpoint lie elsewhere, a head beside the tower's modules; buffers are no
    weights.

    Args:
        whole: what was loaded, the tower itself or a model around it.
        info: what `load_with_account` returned with it.
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
            f"would give other hidden states: {unread[:_MOST_NAMED]}. Correct config.json, or take "
            "the transformers version that the checkpoint names."
        )


def _find_part(
    whole: PreTrainedModel, wanted: type, source: str | Path
) -> tuple[str, PreTrainedModel]:
    for name, module in whole.named_modules():
        if type(module) is wanted and isinstance(module, PreTrainedModel):
            return f"{name}.", module
    raise ValueError(
        f"{source} is a {whole.config.model_type!r} without a {wanted.__name__}, which its "
        "configuration promises. Give the language model alone."
    )


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
    """Whether it is no table of keys, or one that an error of transformers points to."""
    text = record.getMessage()
    return "LOAD REPORT" not in text or "MISMATCH" in text or "CONVERSION" in text
