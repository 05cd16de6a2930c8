"""Quantization by bitsandbytes reaches the LLM alone, and is saved only as it was loaded.

Uploaded with the weights.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig

# What is not the LLM: its embeddings are what the checkpoint promises, and it is small beside it.
KEPT_IN_FULL = [
    "vision_model",
    "visual_projection",
    "text_adapter",
    "text_projection",
    "logit_scale",
]
_QUANTIZED_WEIGHTS = ("Params4bit", "Int8Params")  # of bitsandbytes, which need not be installed
_DICTIONARY_KEYS = ("load_in_4bit", "load_in_8bit")


def quantize_llm_only(quantization_config: Any, *, class_name: str, has_llm: bool) -> Any:
    """Return a `quantization_config` for `from_pretrained` that leaves all but the LLM alone.

    Args:
        quantization_config: the caller's, which is not changed. Other methods than bitsandbytes'
            are returned as they are.
        class_name: of the model that is loaded.
        has_llm: whether that class has an LLM.

    Raises:
        ValueError: bitsandbytes is asked for, and there is no LLM to quantize.
    """
    config = quantization_config
    if isinstance(config, dict) and any(config.get(key) for key in _DICTIONARY_KEYS):
        config = BitsAndBytesConfig.from_dict(config)
    if not isinstance(config, BitsAndBytesConfig):
        return config
    if not has_llm:
        raise ValueError(
            f"{class_name} has no LLM, and only an LLM is quantized by bitsandbytes: vision tower "
            "and projections would give other embeddings. Leave quantization_config out; "
            "dtype=torch.bfloat16 halves the memory."
        )
    config = copy.deepcopy(config)
    config.llm_int8_skip_modules = [
        *(config.llm_int8_skip_modules or ()),
        *(part for part in KEPT_IN_FULL if part not in (config.llm_int8_skip_modules or ())),
    ]
    return config


def require_restorable(model: nn.Module) -> None:
    """Raise ValueError for a model that bitsandbytes would load again with other weights."""
    quantized = {
        name: module
        for name, module in model.named_modules()
        if type(getattr(module, "weight", None)).__name__ in _QUANTIZED_WEIGHTS
    }
    if not quantized:
        return
    if getattr(model, "hf_quantizer", None) is None:
        raise ValueError(
            f"{len(quantized)} layers are quantized by bitsandbytes (first: "
            f"{next(iter(quantized))}), but the model was not loaded with a quantization_config, "
            "so config.json would not say how to load them. Save the model with an LLM in full "
            "precision, and quantize it while loading that folder."
        )
    # bitsandbytes reorders 4-bit weights for the CPU in their first pass there, rounds their
    # scales to bfloat16, and does not undo all of it on saving.
    reordered = [name for name, module in quantized.items() if _was_reordered(module)]
    if reordered:
        raise ValueError(
            f"{len(reordered)} 4-bit layers have run on a CPU (first: {reordered[0]}), for which "
            "bitsandbytes reordered their weights; it would save other weights than it loaded. "
            "Load the model again and save it before its first pass, or run it on a GPU."
        )


def _was_reordered(module: nn.Module) -> bool:
    state = getattr(module.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False)) or hasattr(
        state, "original_qshape"
    )
