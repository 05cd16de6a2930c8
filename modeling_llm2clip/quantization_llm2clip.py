"""Quantization by bitsandbytes: applies to the LLM alone, and is saved only as it was loaded.

Uploaded with the weights.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig

# All parts but the LLM. They are small, and quantizing them would change image embeddings.
KEPT_IN_FULL = [
    "vision_model",
    "visual_projection",
    "text_adapter",
    "text_projection",
    "logit_scale",
]
_QUANTIZED_WEIGHTS = ("Params4bit", "Int8Params")  # classes of bitsandbytes, which is optional
_DICTIONARY_KEYS = ("load_in_4bit", "load_in_8bit")


def quantize_llm_only(quantization_config: Any, *, class_name: str, has_llm: bool) -> Any:
    """Return a `quantization_config` for `from_pretrained` that quantizes the LLM alone.

    Args:
        quantization_config: the caller's configuration, which is not changed. One for another
            library than bitsandbytes is returned as it is.
        class_name: name of the class that is loaded, for the error message.
        has_llm: whether that class has an LLM.

    Raises:
        ValueError: bitsandbytes is requested, and the class has no LLM.
    """
    config = quantization_config
    if isinstance(config, dict) and any(config.get(key) for key in _DICTIONARY_KEYS):
        config = BitsAndBytesConfig.from_dict(config)
    if not isinstance(config, BitsAndBytesConfig):
        return config
    if not has_llm:
        raise ValueError(
            f"{class_name} has no LLM, and only an LLM may be quantized by bitsandbytes: a "
            "quantized vision tower or projection would give other embeddings. Leave "
            "quantization_config out; dtype=torch.bfloat16 needs half the memory."
        )
    config = copy.deepcopy(config)
    config.llm_int8_skip_modules = [
        *(config.llm_int8_skip_modules or ()),
        *(part for part in KEPT_IN_FULL if part not in (config.llm_int8_skip_modules or ())),
    ]
    return config


def require_restorable(model: nn.Module) -> None:
    """Check that bitsandbytes would load the same weights that it saves.

    Args:
        model: the model that is going to be saved.

    Raises:
        ValueError: it was not loaded with its quantization, or has run 4-bit layers on a CPU.
    """
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
            "so config.json would not record how to load them. Save the model with an LLM in full "
            "precision, and quantize it while loading that folder."
        )
    # In the first pass on a CPU, bitsandbytes reorders 4-bit weights and rounds their scales to
    # bfloat16. Saving does not fully undo that.
    reordered = [name for name, module in quantized.items() if _was_reordered(module)]
    if reordered:
        raise ValueError(
            f"{len(reordered)} 4-bit layers have run on a CPU (first: {reordered[0]}), where "
            "bitsandbytes reorders their weights, so it would save other weights than it loaded. "
            "Load the model again and save it before its first pass, or run it on a GPU."
        )


def _was_reordered(module: nn.Module) -> bool:
    state = getattr(module.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False)) or hasattr(
        state, "original_qshape"
    )
