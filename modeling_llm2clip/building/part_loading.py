"""Loads a model, or the part of it that becomes a tower, and checks every key of the checkpoint.

An LLM can be cut to its first layers and its final norm. A tower with N layers returns exactly the
hidden states of layer N of the whole LLM, after the final norm. To verify this, the same weights
are run in an LLM built with N layers and in one cut to N layers. Errors name the source as the user
wrote it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .._suggestions import counted, list_first
from ..loading_llm2clip import build_tower, find_tower_class, load_without_code, naming_damage
from .tower_checks import MODEL_ERRORS, list_layers, make_texts, run_texts

KEEP_ALL = "Remove text_layers to keep all layers, or use another LLM."
# transformers' field for settings of individual layers, by layer number.
_OVERRIDES = "per_layer_config"
# Causal masks, which older checkpoints store next to the weights.
_MASKS = ("attn.bias", "attention.bias")


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Name the source in transformers' errors about missing files."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{source} cannot be loaded: {error}") from error


def _load_with_account(
    model_class: Any, name: str | Path, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load like `from_pretrained`, but leave the check of the keys to the caller.

    Returns the model and its loading info, including `missing_keys` and `unexpected_keys`.
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
    """Load the part of a model that `part_config` describes, which may be the whole model.

    Returns the part, the whole model, and the names of missing weights that belong to the part or
    begin with one of the prefixes in `beside`. Raises ValueError for weights of the part that the
    network does not read, except in the layers `above`, which are skipped.
    """
    if above:
        settings["ignore_mismatched_sizes"] = True  # reported below
    # Loaded as a whole, because only the whole model's class maps the names of published weights.
    whole, info = _load_with_account(find_tower_class(config), name, config=config, **settings)
    if misshapen := sorted(key for key, *_ in info["mismatched_keys"]):
        raise ValueError(
            f"{source} cannot be cut to {above.start} layers: {list_first(misshapen)} would have "
            f"another shape, because these weights have a part for each layer. {KEEP_ALL}"
        )
    part, prefix = whole, ""
    if part_config is not config:
        with torch.device("meta"):  # takes no memory; the saved model will have this class
            tower_class = type(build_tower(part_config))
        prefix, part = _find_part(whole, tower_class, source)
        part.config._name_or_path = whole.config._name_or_path
    if above:
        layers = list_layers(part)
        places = [name for name, module in whole.named_modules() if module is layers]
        left_out = tuple(f".{place}.{number}." for place in places for number in above)
        info["unexpected_keys"] = {
            key for key in info["unexpected_keys"] if not any(n in f".{key}" for n in left_out)
        }
    if part_config.model_type != "timm_wrapper":  # where a removed head is still a module
        _refuse_unread_weights(whole, part, info, source)
    needed = (prefix, *beside)
    return part, whole, sorted(key for key in info["missing_keys"] if key.startswith(needed))


def _find_part(
    whole: PreTrainedModel, tower_class: type, source: str | Path
) -> tuple[str, PreTrainedModel]:
    for name, module in whole.named_modules():
        if type(module) is tower_class and isinstance(module, PreTrainedModel):
            return f"{name}.", module
    raise ValueError(
        f"{source}: its configuration declares a {tower_class.__name__}, but the loaded "
        f"{whole.config.model_type!r} has none. Pass a checkpoint of only the tower."
    )


def _refuse_unread_weights(
    whole: PreTrainedModel, tower: PreTrainedModel, info: dict[str, Any], source: str | Path
) -> None:
    """Refuse weights inside the tower's modules that the tower does not read.

    Other parts of the checkpoint, such as a head, are outside the tower's modules, and buffers are
    not weights.
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
            f"read, so its hidden states would be wrong: {list_first(unread)}. Correct "
            "config.json, or install the transformers version that the checkpoint names."
        )


def forget_code(holder: Any) -> Any:
    """Remove the reference to a repository's code from a configuration or image processor."""
    holder.__dict__.pop("auto_map", None)
    return holder


def forget_origin(config: Any, source: str | Path) -> None:
    """Remove a tower's local path and code reference, because configurations are published."""
    if Path(source).exists():
        config._name_or_path = Path(source).name
    forget_code(config)


def _is_needed(record: logging.LogRecord) -> bool:
    """Filter transformers' load reports out of the log, except those that an error refers to."""
    text = record.getMessage()
    return "LOAD REPORT" not in text or "MISMATCH" in text or "CONVERSION" in text


def cut_layers(text_model: PreTrainedModel, num_layers: int) -> None:
    uncut, layers = copy.deepcopy(text_model.config), list_layers(text_model)
    cut_config(text_model.config, num_layers, "The LLM")
    del layers[num_layers:]
    for config in (uncut, text_model.config):  # the original, and what the saved model loads
        require_same_states(text_model, config, "The LLM")


def cut_config(config: PreTrainedConfig, num_layers: int, source: str | Path) -> None:
    """Cut a configuration to the first layers, in place, including its per-layer lists."""
    total = getattr(config, "num_hidden_layers", 0)
    if num_layers > total:
        raise ValueError(
            f"{source} has {total} layers, so it cannot keep {num_layers}. Set text_layers to at "
            f"most {total}, or remove it to keep all layers."
        )
    stated = config.to_dict()
    lists = [n for n, v in stated.items() if isinstance(v, list) and len(v) == total]
    lists = [name for name in lists if not name.endswith("_token_id")]
    for name in lists:
        setattr(config, name, stated[name][:num_layers])
    config.num_hidden_layers = num_layers
    if overrides := stated.get(_OVERRIDES):
        kept = {number: value for number, value in overrides.items() if int(number) < num_layers}
        setattr(config, _OVERRIDES, kept)
    loaded = type(config).from_dict(config.to_dict())
    for name in lists:  # some families require a certain type for the last layer
        setattr(config, name, getattr(loaded, name))


@torch.no_grad()
def require_same_states(
    text_model: PreTrainedModel, config: PreTrainedConfig, source: str | Path
) -> None:
    """Refuse a cut LLM whose hidden states differ from the same layer's in the whole LLM.

    Runs the same weights in an LLM built with few layers, and in an LLM built from the whole
    `config` and then cut. The hidden states differ if a layer depends on the number of layers, as
    with shared keys and values. The omitted layers take no memory.
    """
    num_layers = text_model.config.num_hidden_layers
    reason = "its hidden states depend on the number of layers"
    try:
        other = _build_on(text_model, config)
        ids, _ = make_texts(text_model)
        states, expected = run_texts(text_model, ids), run_texts(other, ids)
    except MODEL_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(". ")
    else:
        if torch.equal(states, expected):
            return
    raise ValueError(f"{source} cannot be cut to {num_layers} layers: {reason}. {KEEP_ALL}")


def _build_on(text_model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config._attn_implementation = text_model.config._attn_implementation
    with init_empty_weights(include_buffers=False):
        other = build_tower(config)
    del list_layers(other)[text_model.config.num_hidden_layers :]
    other.load_state_dict(text_model.state_dict(), assign=True)
    same = dict(text_model.named_buffers())
    for name, buffer in list(other.named_buffers()):  # including non-persistent ones
        module_name, _, own_name = name.rpartition(".")
        buffer = same.get(name, buffer).to(text_model.device)
        setattr(other.get_submodule(module_name), own_name, buffer)
    return other.eval()  # type: ignore[no-any-return]
