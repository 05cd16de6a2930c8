"""Merges a LoRA into an LLM one weight at a time, either completely or not at all.

A LoRA adds `scale * B @ A` to the weight of a linear layer. The sum is computed in float32 and
rounded once, and the LLM does not have to be in memory. Other kinds of LoRAs are refused; merge
them with peft's `merge_and_unload`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._suggestions import list_first
from ..data.safetensors_files import read_metadata
from ..data.sources.json_files import read_object
from ..loading_llm2clip import naming_fields
from ..model_folders.model_folder import LORA_CONFIG, find_model_folder
from ..model_folders.weights import LazyTensor, count_changed, open_weights, warn_of_rounding
from .pretrained_towers import find_origin

# peft's wrapper around the LLM, then the LLM's name inside the class with the head.
_KEY = re.compile(r"base_model\.model\.((?:model\.)?)(.+)\.lora_([AB])\.weight")
# Values of peft's `init_lora_weights` that leave the base unchanged; others modify its weights.
PLAIN_STARTS = (True, False, None, "gaussian")
# Metadata key of a LoRA's weights: SHA-256 of the weights of the LLM that it was trained on.
BASE_WEIGHTS = "base_weights"
# Settings with which peft trains more than the low-rank matrices, and their neutral values.
_MATRICES_ALONE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "init_lora_weights": PLAIN_STARTS,
}


def merge_lora(text_model: PreTrainedModel, lora: str | Path) -> float:
    """Merge a LoRA into a loaded LLM in place, and warn if rounding loses most of it.

    The LLM has no head, but the LoRA may have been trained on the class with a head
    (`…ForCausalLM`). If an error is raised, the LLM is unchanged. Returns the fraction of changed
    entries that survive rounding.
    """
    parameters = dict(text_model.named_parameters())
    merged, counts = merge_lora_weights(
        {name: LazyTensor.of(parameter) for name, parameter in parameters.items()},
        lora,
        base=str(text_model.config._name_or_path or ""),
        dtype=text_model.dtype,
    )
    for tensor in merged.values():
        tensor.read()  # raises before anything is changed, and counts
    for name, tensor in merged.items():
        parameters[name].data.copy_(tensor.read())
    return warn_of_rounding(counts.values(), text_model.dtype, what=f"Merging the LoRA {lora}")


def merge_lora_weights(
    weights: Mapping[str, LazyTensor],
    lora: str | Path,
    *,
    base: str,
    dtype: torch.dtype,
) -> tuple[dict[str, LazyTensor], dict[str, tuple[int, int]]]:
    """Return the LLM weights that a LoRA changes, in float32; each is merged when it is read.

    `base` is compared with the base named in the LoRA's configuration, unless either name is
    missing. Reading a weight raises an error if the sum is not finite, or if rounding to `dtype`,
    the dtype for saving, would lose the change. Reading also records two counts per weight: the
    entries that changed in `dtype`, and the entries that changed before rounding.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    folder = find_model_folder(str(lora))
    if not (folder / LORA_CONFIG).is_file():
        raise ValueError(f"{folder} has no {LORA_CONFIG}, so it is not a LoRA saved by peft.")
    with naming_fields(lora):
        _require_plain(folder, lora, base=base)
        config = LoraConfig.from_pretrained(str(folder))
        inside, factors = _read_factors(folder, lora)
        trained = {
            name
            for name in weights
            if name.endswith(".weight")
            and check_target_module_exists(config, inside + name.removesuffix(".weight"))
        }
        errors = {
            "are not in the LLM": [n for n in factors if n not in weights],
            "are missing": [n for n in trained | set(factors) if len(factors.get(n, ())) < 2],
        }
        _refuse(errors, f"The LoRA {lora} does not fit {base or 'the LLM'}", len(factors))
        merged, counts, misshapen = {}, dict[str, tuple[int, int]](), []
        for name, pair in factors.items():
            module, rank = inside + name.removesuffix(".weight"), len(pair["A"])
            alpha_key = get_pattern_key(list(config.alpha_pattern), module)
            alpha = config.alpha_pattern.get(alpha_key, config.lora_alpha)
            scale = alpha / (rank**0.5 if config.use_rslora else rank)
            fits = rank == pair["B"].shape[1]
            shape: tuple[int, ...] = (len(pair["B"]), pair["A"].shape[1]) if fits else ()
            shape = shape[::-1] if config.fan_in_fan_out else shape
            if shape != weights[name].shape:
                misshapen.append(f"{name}: {shape} for {weights[name].shape}")
            multiply = partial(_multiply, pair, scale, transposes=bool(config.fan_in_fan_out))
            change = LazyTensor(shape, torch.float32, multiply)
            read = partial(_merge, weights[name], change, f"{lora}: {name}", counts, dtype=dtype)
            merged[name] = LazyTensor(weights[name].shape, torch.float32, read)
        _refuse(
            {"have another shape": misshapen}, f"The LoRA {lora} is for another LLM", len(factors)
        )
        return merged, counts


def _multiply(pair: Mapping[str, Tensor], scale: float, *, transposes: bool) -> Tensor:
    """Multiply the matrices; transpose the product if weights are (in, out), as in GPT-2."""
    change = (pair["B"] @ pair["A"]) * scale
    return change.T if transposes else change


def _require_plain(folder: Path, lora: str | Path, *, base: str) -> None:
    """Refuse a LoRA that has more than low-rank matrices, or that names another base LLM."""
    stated = read_object(folder / LORA_CONFIG)
    others = {
        name: stated[name]
        for name, neutral in _MATRICES_ALONE.items()
        if stated.get(name, neutral[0]) not in neutral
    }
    if others:
        raise ValueError(
            f"The LoRA {lora} cannot be merged here, because it contains more than low-rank "
            f"matrices of linear layers ({others}). Merge it with peft (merge_and_unload), save "
            "the merged LLM, and pass that folder."
        )
    trained_on = stated.get("base_model_name_or_path")
    if base and trained_on and not is_same_base(str(trained_on), base):
        raise ValueError(
            f"The LoRA {lora} is for the base {trained_on!r}, but the LLM is {base!r}. Use the "
            "LoRA's base. If both names mean the same weights, correct base_model_name_or_path in "
            f"{LORA_CONFIG} in a copy of the LoRA."
        )


def _read_factors(folder: Path, lora: str | Path) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """Read the matrices A and B in float32, by the name of the weight that each pair changes.

    The first return value is the prefix of the LLM's modules inside the class with the head.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    inside, strange, bad = "", [], []
    for key, tensor in open_weights(folder).items():
        match = _KEY.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        inside, name, part = match.groups()
        value = factors.setdefault(f"{name}.weight", {})[part] = tensor.read().float()
        if not value.isfinite().all():
            bad.append(key)
    what = f"The LoRA {lora} cannot be merged"
    _refuse({"are not matrices of linear layers": strange, "have NaN": bad}, what, len(factors))
    if not any(all(part.any() for part in pair.values()) for pair in factors.values()):
        raise ValueError(
            f"The LoRA {lora} adds zero to all {len(factors)} of its weights: it was not trained."
        )
    return inside, factors


def _refuse(errors: Mapping[str, list[str]], what: str, total: int) -> None:
    if any(errors.values()):
        listed = "; ".join(
            f"{len(names)} {error} ({list_first(sorted(names))})"
            for error, names in errors.items()
            if names
        )
        raise ValueError(
            f"{what}, so nothing is merged. Of {total} weights: {listed}. Use the LLM that the "
            "LoRA was trained on. For other kinds of LoRAs, use peft's merge_and_unload."
        )


@torch.no_grad()
def _merge(
    weight: LazyTensor,
    change: LazyTensor,
    name: str,
    counts: dict[str, tuple[int, int]],
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Merge one weight in float32, and count the entries that change in `dtype`."""
    before, difference = weight.read(), change.read()
    merged = before.float() + difference
    if not merged.isfinite().all():
        raise ValueError(f"{name}: the merged weight is not finite, so the LoRA cannot be merged.")
    counts[name] = count_changed(before, merged, dtype)
    if not counts[name][0] and difference.any():
        raise ValueError(f"{name}: rounding to {dtype} loses the LoRA's change. Use float32.")
    return merged


def is_same_base(stated: str, base: str) -> bool:
    """Return whether two names refer to the same LLM, ignoring owner and case."""
    names = (find_origin(name.rstrip("/").rsplit("/", 1)[-1]) for name in (stated, base))
    first, second = (name.rsplit("/", 1)[-1].casefold() for name in names)
    return first == second


def require_base_weights(file: Path, weights: str) -> None:
    """Refuse a LoRA whose recorded base weights (SHA-256) differ from `weights`.

    Comparing the LLM's name is not enough, because merging a LoRA does not change the name. LoRAs
    written by other packages record no weights.
    """
    trained_on = read_metadata(file).get(BASE_WEIGHTS)
    if trained_on is not None and trained_on != weights:
        raise ValueError(
            f"{file.parent} was trained on an LLM with other weights (SHA-256 {trained_on} then, "
            f"{weights} now). Use the model that the LoRA was trained on, not one that it is "
            "merged into."
        )
