"""Merges a LoRA into weights one at a time, without loading either model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..building.lora_merging import read_adapter_settings, require_base
from ..model_folders.lora_base import PLAIN_STARTS
from .lazy_tensors import LazyTensor, open_weights

_KEY = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# Settings of peft that change the sum `W + scale · B A`; their neutral values.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": PLAIN_STARTS,
}


def merge_lora(
    weights: Mapping[str, LazyTensor],
    adapter: Path,
    *,
    base: str,
    accepted_base: str | None = None,
) -> dict[str, LazyTensor]:
    """Return the weights of an LLM with a LoRA added to them.

    Args:
        weights: by the names of the LLM without its head.
        adapter: folder of `adapter_config.json` and `adapter_model.safetensors`.
        base: name of the LLM, compared with the one that the adapter names.
        accepted_base: what the adapter calls its base, where you know that both are the same.
    Raises: ValueError when the LoRA is for another base, or is more than a plain LoRA.
    """
    settings = read_adapter_settings(adapter)
    _require_plain(settings, adapter)
    require_base(settings, base, adapter=adapter, accepted_base=accepted_base)
    pairs = _pair_factors(open_weights(adapter), adapter)
    _require_places(pairs, weights, adapter, base)
    rank_power = 0.5 if settings.get("use_rslora") else 1.0
    merged = dict(weights)
    for name, (down, up) in pairs.items():
        scale = settings["lora_alpha"] / down.shape[0] ** rank_power
        merged[name] = LazyTensor(
            weights[name].shape, partial(_add, weights[name], down, up, scale)
        )
    return merged


def _add(weight: LazyTensor, down: LazyTensor, up: LazyTensor, scale: float) -> Tensor:
    # In float32: half precision would round the sum's small part away.
    return weight.read().float() + scale * (up.read().float() @ down.read().float())


def _require_plain(settings: Mapping[str, Any], adapter: Path) -> None:
    others = {
        name: settings[name]
        for name, neutral in _PLAIN.items()
        if name in settings and settings[name] not in neutral
    }
    if others:
        raise ValueError(
            f"{adapter} is more than a plain LoRA ({others}), which is not merged here. Merge it "
            "with peft (merge_and_unload), save the LLM, and give that folder."
        )


def _pair_factors(
    factors: Mapping[str, LazyTensor], adapter: Path
) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    found: dict[str, dict[str, LazyTensor]] = {}
    strange = []
    for key, tensor in factors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            strange.append(key)
        else:
            found.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    strange += [name for name, pair in found.items() if set(pair) != {"A", "B"}]
    if strange or not found:
        raise ValueError(
            f"{adapter} has keys that are not pairs of LoRA factors, so nothing is merged:\n  "
            + "\n  ".join(sorted(strange))
        )
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _require_places(
    pairs: Mapping[str, tuple[LazyTensor, LazyTensor]],
    weights: Mapping[str, LazyTensor],
    adapter: Path,
    base: str,
) -> None:
    lost = sorted(set(pairs) - set(weights))
    misshapen = [
        f"{name}: the LoRA makes {(up.shape[0], down.shape[1])}, the LLM has {weights[name].shape}"
        for name, (down, up) in pairs.items()
        if name in weights and weights[name].shape != (up.shape[0], down.shape[1])
    ]
    if lost or misshapen:
        raise ValueError(
            f"The LoRA {adapter} is for another base than {base}: {len(lost)} of {len(pairs)} "
            f"weights are not there {lost[:5]}, {len(misshapen)} have another shape "
            f"{misshapen[:5]}. Give the LLM that it was trained on."
        )
