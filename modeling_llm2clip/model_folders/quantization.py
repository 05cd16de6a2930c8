"""Loads the language model in 4 or 8 bits and leaves everything else as it is."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig

from ..quantization_llm2clip import KEPT_IN_FULL


def text_quantization_config(kind: str) -> BitsAndBytesConfig:
    """Return a `quantization_config` for `from_pretrained` that reaches the text tower alone.

    Any other configuration of bitsandbytes reaches it alone too. Quantize while a whole checkpoint
    is loaded: a model put together from an already quantized tower cannot be loaded again, and
    `save_pretrained` refuses it, as it does a 4-bit model that has run on a CPU.

    Args:
        kind: `"4bit"` (NF4, computed in bfloat16) or `"8bit"`.
    Raises: ValueError for another kind.
    """
    if kind == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=KEPT_IN_FULL,
        )
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT_IN_FULL)
    raise ValueError(f"kind={kind!r} must be '4bit' or '8bit'.")
