"""Merges a LoRA into an LLM one weight at a time, all of it or nothing.

peft's own LoRA layers do the arithmetic, around one weight of the LLM at a time. So ranks and
scales per layer, DoRA and LoRAs of expert tensors come out as peft's `merge_and_unload` has them,
and the LLM need not be in memory. The sum is computed in float32 and rounded once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .._suggestions import list_first
from ..data.safetensors_files import read_metadata
from ..loading_llm2clip import build_tower
from ..model_folders.model_folder import LORA_CONFIG, find_model_folder
from ..model_folders.weights import LazyTensor, count_changed, open_weights, warn_of_rounding

# peft's wrapper around the LLM, and the LLM's name inside the class that has its head.
_WRAPPED, _INSIDE_HEADED = "base_model.model.", "model."
_ADAPTER = "default"
# Values of peft's `init_lora_weights` that leave the base as it is; others take a part out of it.
PLAIN_STARTS = (True, False, None, "gaussian")
# In the metadata of a LoRA's weights: SHA-256 of the weights of the LLM that it was trained on.
BASE_WEIGHTS = "base_weights"
# Starts that take a part out of the base, the same one each time. Others sample or need data.
_REPEATABLE_STARTS = ("pissa", "olora")
# What peft can train beside the low-rank matrices; neutral values.
_MATRICES_ALONE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "init_lora_weights": (*PLAIN_STARTS, *_REPEATABLE_STARTS),
}


def merge_lora(
    text_model: PreTrainedModel, lora: str | Path, *, accepted_base: str | None = None
) -> float:
    """Merge a LoRA into a loaded LLM without its head, in place, and warn if most is rounded away.

    The LoRA may have been trained on the class with the head (`…ForCausalLM`). Where an error is
    raised, nothing is changed. Returns the share of the entries of its weights that have another
    value now.
    """
    parameters = dict(text_model.named_parameters())
    merged, counts = merge_lora_weights(
        {name: LazyTensor.of(parameter) for name, parameter in parameters.items()},
        text_model.config,
        lora,
        base=str(text_model.config._name_or_path or ""),
        accepted_base=accepted_base,
        dtype=text_model.dtype,
    )
    for tensor in merged.values():
        tensor.read()  # raises before anything is changed, and counts
    for name, tensor in merged.items():
        parameters[name].data.copy_(tensor.read())
    return warn_of_rounding(counts.values(), text_model.dtype, what=f"Merging the LoRA {lora}")


def merge_lora_weights(
    weights: Mapping[str, LazyTensor],
    config: PreTrainedConfig,
    lora: str | Path,
    *,
    base: str,
    accepted_base: str | None = None,
    dtype: torch.dtype,
) -> tuple[dict[str, LazyTensor], dict[str, tuple[int, int]]]:
    """Return the weights of an LLM that a LoRA changes, float32, merged when they are read.

    `base` is compared with the base that the LoRA states, unless either has no name; a LoRA that
    names `accepted_base` is taken. Reading a weight raises where the sum is not finite, or where
    `dtype`, in which it is going to be saved, would round the change away. It also adds to the
    counts, by name: how many entries have another value in `dtype`, and how many before rounding.
    """
    folder = find_model_folder(str(lora))
    if not (folder / LORA_CONFIG).is_file():
        raise ValueError(f"{folder} has no {LORA_CONFIG}; it is not a LoRA that peft saved.")
    stated: dict[str, Any] = json.loads((folder / LORA_CONFIG).read_text(encoding="utf-8"))
    others = {
        name: stated[name]
        for name, neutral in _MATRICES_ALONE.items()
        if stated.get(name, neutral[0]) not in neutral
    }
    if others:
        raise ValueError(
            f"{lora} is more than the low-rank matrices of a LoRA ({others}), which is not merged "
            "here. Merge it with peft (merge_and_unload), save the LLM, and give that folder."
        )
    trained_on = stated.get("base_model_name_or_path")
    same = trained_on == accepted_base or is_same_base(str(trained_on), base)
    if base and trained_on and not same:  # both have a name to compare
        raise ValueError(
            f"The LoRA {lora} is for the base {trained_on!r}, but the LLM is {base!r}. Give that "
            "base; if both names are of the same weights, pass "
            f"accept_lora_base={trained_on!r}."
        )
    factors = {name: tensor.read().float() for name, tensor in open_weights(folder).items()}
    # peft saves an embedding table beside the LoRA of it.
    tables = {n: factors.pop(n) for n in list(factors) if n.endswith(".base_layer.weight")}
    adapted, prefix = _wrap(config, folder, factors, shown=base or "the LLM")
    layers = _list_layers(adapted, prefix)
    _require_places(layers, weights, lora=lora, base=base)
    _require_changes(layers, lora)
    merged, counts = {}, dict[str, tuple[int, int]]()
    for name, layer in layers.items():
        table = tables.get(f"{prefix}{name.removesuffix('.weight')}.base_layer.weight")
        weight = weights[name] if table is None else LazyTensor.of(table)
        read = partial(_merge, layer, weight, stated, f"{lora}: {name}", counts, dtype=dtype)
        merged[name] = LazyTensor(weights[name].shape, torch.float32, read)
    return merged, counts


class _Headed(PreTrainedModel):
    """Gives an LLM the names that it has inside the class with its head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.config)
        self.model = model


def _wrap(
    config: PreTrainedConfig, folder: Path, factors: Mapping[str, Tensor], *, shown: str
) -> tuple[nn.Module, str]:
    """Put a LoRA around an LLM without weights, and find what its module names begin with."""
    from peft import LoraConfig, get_peft_model

    lora_config = LoraConfig.from_pretrained(str(folder))
    lora_config.task_type = None  # a task's wrapper would ask for the head
    lora_config.base_model_name_or_path = None  # compared before; peft would warn of a path
    lora_config.init_lora_weights = False  # what a start takes out of the base: see `_merge`
    skeleton = _build_skeleton(config)
    has_head = any(key.startswith(_WRAPPED + _INSIDE_HEADED) for key in factors)
    has_head = has_head and not hasattr(skeleton, _INSIDE_HEADED.rstrip("."))
    model = _Headed(skeleton) if has_head else skeleton
    try:
        adapted: nn.Module = get_peft_model(model, lora_config)
    except ValueError as error:  # no layer of such a name
        raise ValueError(f"The LoRA {folder} does not fit {shown}: {error}") from error
    _load_factors(adapted, factors, folder)
    return adapted.eval(), _WRAPPED + (_INSIDE_HEADED if has_head else "")


def _build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build an LLM whose weights are one zero each, expanded to their shape.

    Not meta tensors: peft would move the LoRA to the device of its base, and lose it.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # every class has it, and none is run
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        skeleton = build_tower(config)
    for module in skeleton.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            _set_weight(module, name, torch.zeros(()).expand(parameter.shape))
    return skeleton


def _set_weight(module: nn.Module, name: str, weight: Tensor) -> None:
    setattr(module, name, nn.Parameter(weight, requires_grad=False))


def _load_factors(adapted: Any, factors: Mapping[str, Tensor], folder: Path) -> None:
    """Put a saved LoRA into its layers; every key must have its place, every place its key."""
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(adapted, dict(factors))
    except RuntimeError as error:  # another shape
        raise ValueError(
            f"The LoRA {folder} is for another LLM: {' '.join(str(error).split())} Give the LLM "
            "that it was trained on."
        ) from error
    missing = sorted(key for key in result.missing_keys if "lora_" in key)
    strange = sorted(result.unexpected_keys)
    if missing or strange:
        raise ValueError(
            f"The LoRA {folder} does not fit this LLM, so nothing is merged: {len(strange)} of "
            f"{len(factors)} weights have no place in it ({list_first(strange)}), "
            f"{len(missing)} are missing ({list_first(missing)}). Give the LLM that it was trained "
            "on."
        )


def _list_layers(adapted: nn.Module, prefix: str) -> dict[str, Any]:
    """List peft's LoRA layers by the name of the weight that each changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        f"{name.removeprefix(prefix).replace('.base_layer', '')}.{_name_weight(layer)}": layer
        for name, layer in adapted.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def _name_weight(layer: Any) -> str:
    return getattr(layer, "parameter_name", "weight")  # the first of a LoRA of an expert tensor


def _require_places(
    layers: Mapping[str, Any],
    weights: Mapping[str, LazyTensor],
    *,
    lora: str | Path,
    base: str,
) -> None:
    places = {name: (layer.get_base_layer(), _name_weight(layer)) for name, layer in layers.items()}
    shapes = {name: tuple(getattr(*place).shape) for name, place in places.items()}
    lost = sorted(set(shapes) - set(weights))
    misshapen = [
        f"{name}: the LoRA is for {shape}, the LLM has {weights[name].shape}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    if lost or misshapen:
        raise ValueError(
            f"The LoRA {lora} is for another base than {base or 'the LLM'}: {len(lost)} of "
            f"{len(shapes)} weights are not there ({list_first(lost)}), {len(misshapen)} have "
            f"another shape ({list_first(misshapen)}). Give the LLM that it was trained on."
        )


def _require_changes(layers: Mapping[str, Any], lora: str | Path) -> None:
    """Raise ValueError unless the LoRA is of a known variant, finite, and changes something."""
    variants = {type(x.lora_variant[_ADAPTER]).__name__ for x in layers.values() if x.lora_variant}
    if others := sorted(name for name in variants if not name.startswith("Dora")):
        raise ValueError(
            f"The LoRA {lora} is of the variants {others}, which are not merged here. Merge it "
            "with peft (merge_and_unload), save the LLM, and give that folder."
        )
    bad = [
        name
        for name, layer in layers.items()
        if not all(factor.isfinite().all() for factor in _list_factors(layer))
    ]
    if bad:
        raise ValueError(
            f"The LoRA {lora} cannot be merged: {len(bad)} of {len(layers)} parts have NaN or "
            f"infinity ({list_first(bad)}). Take its last weights without them."
        )
    changes = (all(factor.any() for factor in _list_factors(x)) for x in layers.values())
    if not variants and not any(changes):
        raise ValueError(
            f"The LoRA {lora} adds zero to all of its {len(layers)} weights: it was not trained."
        )


def _list_factors(layer: Any) -> list[Tensor]:
    return [p for name, p in layer.named_parameters() if name.startswith("lora_")]


@torch.no_grad()
def _merge(
    layer: Any,
    weight: LazyTensor,
    lora_config: Mapping[str, Any],
    name: str,
    counts: dict[str, tuple[int, int]],
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Merge one weight, in float32, and count what changes in a dtype."""
    base, parameter = layer.get_base_layer(), _name_weight(layer)
    before = weight.read()
    _set_weight(base, parameter, before.to(torch.float32, copy=True))
    try:
        # A start takes what the LoRA's matrices began with out of the base.
        start = lora_config.get("init_lora_weights")
        if start in _REPEATABLE_STARTS:
            saved = [factor.clone() for factor in _list_factors(layer)]
            layer.pissa_init(_ADAPTER, start) if start == "pissa" else layer.olora_init(_ADAPTER)
            for factor, value in zip(_list_factors(layer), saved, strict=True):
                factor.copy_(value)
        layer.merge(adapter_names=[_ADAPTER])
        layer.merged_adapters.clear()  # so that it can be merged again
        merged: Tensor = getattr(base, parameter).detach()
        if not merged.isfinite().all():
            raise ValueError(f"{name}: the sum is not finite. The LoRA cannot be merged.")
        counts[name] = count_changed(before, merged, dtype)
        if not counts[name][0] and layer.get_delta_weight(_ADAPTER).any():
            raise ValueError(f"{name}: the change is lost in the rounding of {dtype}. Use float32.")
    finally:
        _set_weight(base, parameter, torch.zeros(()).expand(before.shape))
    return merged


def is_same_base(stated: str, base: str) -> bool:
    """Return whether two names are of one LLM; owners and case are not compared."""
    first, second = (name.rstrip("/").rsplit("/", 1)[-1].casefold() for name in (stated, base))
    return first == second


def require_base_weights(file: Path, weights: str) -> None:
    """Refuse a LoRA that states that it was trained on other weights, by their SHA-256.

    The name does not show it: an LLM that a LoRA was merged into keeps its name. LoRAs that another
    package wrote state no weights.
    """
    trained_on = read_metadata(file).get(BASE_WEIGHTS)
    if trained_on is not None and trained_on != weights:
        raise ValueError(
            f"{file.parent} was trained on an LLM with other weights ({trained_on} then, {weights} "
            "now). Begin from it on that very model, which it must not be merged into."
        )
