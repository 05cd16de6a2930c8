"""Merges a LoRA into a loaded LLM, all of it or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model_folders.lora_base import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    PLAIN_STARTS,
    is_same_base,
)
from ..model_folders.model_folder import find_model_folder

# peft's wrapper around the LLM, and the LLM's own place inside the class that has its head.
_WRAPPED, _INSIDE_HEADED = "base_model.model.", "model."
# What peft can train beside the low-rank matrices; their neutral values.
_MATRICES_ALONE: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    # The last two take a part out of the base, the same one every time; others that do draw at
    # random or need data.
    "init_lora_weights": (*PLAIN_STARTS, "pissa", "olora"),
}


def merge_lora(
    text_model: PreTrainedModel, adapter: str | Path, *, accepted_base: str | None = None
) -> PreTrainedModel:
    """Merge a LoRA into an LLM without its head, and return a plain LLM.

    A LoRA trained on the class with the head (`…ForCausalLM`), whose keys say `model.` once
    more, is taken for what it is.

    Args:
        text_model: changed in place.
        adapter: Hub id or folder of `adapter_config.json` and `adapter_model.safetensors`.
        accepted_base: what the adapter calls its base, where that is this LLM under another
            name.
    Raises: ValueError when the LoRA is for another base, trains more than low-rank matrices, has
        keys without a place here or none for a layer that it names, is not finite, or leaves a
        weight as it was that it should change.
    """
    from peft import LoraConfig, get_peft_model  # a dependency of few

    folder = find_model_folder(str(adapter))
    settings = read_adapter_settings(folder)
    _require_low_rank_alone(settings, adapter)
    base = str(text_model.config._name_or_path or "")
    if base and settings.get("base_model_name_or_path"):  # both have a name to compare
        require_base(settings, base, adapter=adapter, accepted_base=accepted_base)
    config = LoraConfig.from_pretrained(str(folder))
    config.task_type = None  # a task's wrapper would ask for the head
    config.base_model_name_or_path = None  # compared above; peft would warn of a folder's path
    if not isinstance(config.target_modules, str):
        config.target_modules = {_strip_head(t, text_model) for t in config.target_modules or ()}
    try:
        adapted = get_peft_model(text_model, config)
    except ValueError as error:  # no layer of such a name
        raise ValueError(f"The LoRA {adapter} does not fit {base or 'the LLM'}: {error}") from error
    _load_weights(adapted, folder)
    _require_changes(adapted, adapter)
    merged: PreTrainedModel = adapted.merge_and_unload()
    merged.eval()
    return merged


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`; ValueError where there is none."""
    path = folder / ADAPTER_SETTINGS
    if not path.is_file():
        raise ValueError(f"{folder} has no {ADAPTER_SETTINGS}; it is not a LoRA that peft saved.")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def require_base(
    settings: Mapping[str, Any],
    base: str,
    *,
    adapter: str | Path,
    accepted_base: str | None = None,
) -> None:
    """Raise ValueError when an adapter names another base; owners and case are not compared."""
    stated = str(settings.get("base_model_name_or_path"))
    if accepted_base is not None and stated == accepted_base:
        return
    if not is_same_base(stated, base):
        raise ValueError(
            f"The LoRA {adapter} is for the base {stated!r}, but the LLM is {base!r}. Give that "
            "base; if they are the same weights under two names, say so with "
            f"accept_lora_base={stated!r}."
        )


def _require_low_rank_alone(settings: Mapping[str, Any], adapter: str | Path) -> None:
    others = {
        name: settings[name]
        for name, neutral in {**_MATRICES_ALONE, "peft_type": ("LORA",)}.items()
        if settings.get(name, neutral[0]) not in neutral
    }
    if others:
        raise ValueError(
            f"{adapter} is not a LoRA alone ({others}). Merge it with peft (merge_and_unload), "
            "save the LLM, and give that folder."
        )


def _strip_head(name: str, text_model: nn.Module) -> str:
    """A module's name without the place that the LLM has in the class with its head."""
    has_own = hasattr(text_model, _INSIDE_HEADED.rstrip("."))
    return name if has_own else name.removeprefix(_INSIDE_HEADED)


def _load_weights(adapted: Any, folder: Path) -> None:
    """Put a saved adapter into LoRA layers; every key must have its place, every place its key."""
    from peft import set_peft_model_state_dict

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(
            f"{folder} has no {ADAPTER_WEIGHTS}. Save the adapter again, with safetensors."
        )
    weights = load_file(folder / ADAPTER_WEIGHTS)
    text_model = adapted.get_base_model()
    weights = {
        _WRAPPED + _strip_head(key.removeprefix(_WRAPPED), text_model): value
        for key, value in weights.items()
    }
    try:
        result = set_peft_model_state_dict(adapted, weights)
    except RuntimeError as error:  # another shape
        raise ValueError(f"The LoRA {folder} is for another LLM: {error}") from error
    missing = sorted(key for key in result.missing_keys if "lora_" in key)
    strange = sorted(result.unexpected_keys)
    if missing or strange:
        raise ValueError(
            f"The LoRA {folder} does not fit this LLM, so nothing is merged: {len(strange)} of "
            f"{len(weights)} weights have no place in it {strange[:3]}, {len(missing)} are "
            f"missing {missing[:3]}. Give the LLM that it was trained on."
        )


def _require_changes(adapted: Any, adapter: str | Path) -> None:
    """Raise ValueError unless the sum is finite and moves every weight that it has a part for."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {n: m for n, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)}
    errors, num_changed = [], 0
    for name, layer in layers.items():
        error, changes = _examine_change(layer)
        num_changed += changes
        if error:
            errors.append(f"{name.removeprefix(_WRAPPED)}: {error}")
    if errors:
        raise ValueError(f"The LoRA {adapter} cannot be merged: {'; '.join(errors[:4])}.")
    if not num_changed:
        raise ValueError(
            f"The LoRA {adapter} adds zero to all of its {len(layers)} weights: it was not trained."
        )


@torch.no_grad()
def _examine_change(layer: nn.Module) -> tuple[str, bool]:
    """What is wrong with one layer's sum, and whether it changes the weight."""
    weight: Tensor = layer.get_base_layer().weight  # type: ignore[operator]
    change: Tensor = layer.get_delta_weight("default")  # type: ignore[operator]
    if not change.isfinite().all():
        return "not finite", False
    if not change.any():
        return "", False  # an expert, say, that no caption came to
    if torch.equal((weight + change).to(weight.dtype), weight):
        return f"lost in the rounding of {weight.dtype}; load the LLM in float32", False
    return "", True
