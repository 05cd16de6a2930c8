"""Loads a model, or the part of one that becomes a tower, with an account of every key.

Errors name the source as the user gave it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .._suggestions import counted, list_first
from ..loading_llm2clip import build_tower, find_tower_class, load_without_code, naming_damage
from .text_layers import KEEP_ALL
from .tower_checks import list_layers

# Causal masks, which older checkpoints hold beside the weights.
_MASKS = ("attn.bias", "attention.bias")


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Name the source in transformers' errors about files that are not there."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{source} cannot be loaded: {error}") from error


def _load_with_account(
    model_class: Any, name: str | Path, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load as `from_pretrained` does, without its table of keys, which the caller judges.

    Returns the model and, among others, its `missing_keys` and `unexpected_keys`.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_needed)
    try:
        with naming_damage(name):
            loaded: tuple[PreTrainedModel, dict[str, Any]] = load_without_code(
                model_class, name, output_loading_info=True, **settings
            )
    finally:
        logger.removeFilter(_is_needed)
    return loaded


def load_part(
    name: str | Path,
    config: PreTrainedConfig,
    part_config: PreTrainedConfig,
    source: str | Path,
    *,
    beside: Sequence[str] = (),
    above: range = range(0),
    **settings: Any,
) -> tuple[PreTrainedModel, PreTrainedModel, list[str]]:
    """Load the part of a model that has this configuration, which may be all of it.

    Returns the part, the whole, and the names of weights that the source lacks: the part's, and
    those that begin with one of `beside`. Weights that the part does not read are refused, but for
    its layers of the numbers `above`, which it leaves out.
    """
    if above:
        settings["ignore_mismatched_sizes"] = True  # they are named below
    # As the whole, because only its class knows how published weights of the parts are named.
    whole, info = _load_with_account(find_tower_class(config), name, config=config, **settings)
    if misshapen := sorted(key for key, *_ in info["mismatched_keys"]):
        raise ValueError(
            f"{source} cannot be cut to {above.start} layers: {list_first(misshapen)} would be "
            f"of another shape, as weights that have a part for each layer. {KEEP_ALL}"
        )
    part, prefix = whole, ""
    if part_config is not config:
        with torch.device("meta"):  # takes no memory; the saved model is going to be of this class
            wanted = type(build_tower(part_config))
        prefix, part = _find_part(whole, wanted, source)
        part.config._name_or_path = whole.config._name_or_path
    if above:
        _account_for_layers(whole, part, above, info)
    if part_config.model_type != "timm_wrapper":  # in which a head left out is still a module
        _refuse_unread_weights(whole, part, info, source)
    needed = (prefix, *beside)
    return part, whole, sorted(key for key in info["missing_keys"] if key.startswith(needed))


def _find_part(
    whole: PreTrainedModel, wanted: type, source: str | Path
) -> tuple[str, PreTrainedModel]:
    for name, module in whole.named_modules():
        if type(module) is wanted and isinstance(module, PreTrainedModel):
            return f"{name}.", module
    raise ValueError(
        f"{source} is a {whole.config.model_type!r} without a {wanted.__name__}, which its "
        "configuration promises. Give the tower alone."
    )


def _account_for_layers(
    whole: PreTrainedModel, part: PreTrainedModel, above: range, info: dict[str, Any]
) -> None:
    """Remove the weights of layers that a part leaves out from the unexpected keys, in place."""
    layers = list_layers(part)
    places = [name for name, module in whole.named_modules() if module is layers]
    left_out = [f".{place}.{number}." for place in places for number in above]
    unread = info["unexpected_keys"]
    info["unexpected_keys"] = {k for k in unread if not any(one in f".{k}" for one in left_out)}


def _refuse_unread_weights(
    whole: PreTrainedModel, tower: PreTrainedModel, info: dict[str, Any], source: str | Path
) -> None:
    """Refuse weights in a module of the tower that the tower does not read.

    Other parts of the checkpoint, such as a head, are beside the tower's modules; buffers are not
    weights.
    """
    parts = set(tower.modules()) - {tower}
    inside = {
        name
        for name, module in whole.named_modules()
        if not isinstance(module, nn.ModuleList) and module in parts
    }
    unread = []
    for key in sorted(info["unexpected_keys"]):
        parents = accumulate(
            key.removeprefix(f"{whole.base_model_prefix}.").split(".")[:-1], "{}.{}".format
        )
        is_weight = key.endswith((".weight", ".bias")) and not key.endswith(_MASKS)
        if is_weight and not inside.isdisjoint(parents):
            unread.append(key)
    if unread:
        raise ValueError(
            f"{source} has {counted(len(unread), 'weight')} that {type(tower).__name__} does not "
            f"read, so it would give other hidden states: {list_first(unread)}. Correct "
            "config.json, or take the transformers version that the checkpoint names."
        )


def forget_code(holder: Any) -> Any:
    """Remove the name of a repository's code from a configuration or image processor."""
    holder.__dict__.pop("auto_map", None)
    return holder


def forget_origin(config: Any, source: str | Path) -> None:
    """Forget the path that a tower came from, since configurations are published, and its code."""
    if Path(source).exists():
        config._name_or_path = Path(source).name
    forget_code(config)


def _is_needed(record: logging.LogRecord) -> bool:
    """Drop tables of keys from the log, but for those that an error refers to."""
    text = record.getMessage()
    return "LOAD REPORT" not in text or "MISMATCH" in text or "CONVERSION" in text
