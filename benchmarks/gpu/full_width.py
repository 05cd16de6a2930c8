"""Models in the sizes of the paper, with random weights, and captions of typical lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

_LLMS: dict[str, dict[str, int]] = {
    # Llama-3.2-1B, arXiv:2407.21783 and its config.json
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    # Llama-3-8B, the same
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
_VISION: dict[str, dict[str, int]] = {
    # CLIP ViT-L/14 at 336 pixels, arXiv:2103.00020
    "L/14-336": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    },
}  # fmt: skip
WIDTHS = {name: sizes["hidden_size"] for name, sizes in (_LLMS | _VISION).items()}
PROJECTION_DIM = 1280
_PROMPT_TOKENS = 18


def make_llm_config(size: str, *, vocabulary: int = 128_256) -> Any:
    """Make the configuration of a Llama.

    Args:
        size: 1B, 8B or tiny.
        vocabulary: Number of its tokens.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        **_LLMS[size], vocab_size=vocabulary, max_position_embeddings=8192, rope_theta=500_000.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def make_vision_config(size: str) -> Any:
    """Make the configuration of a CLIP vision tower.

    Args:
        size: L/14-336 or tiny.
    """
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**_VISION[size])


def make_config(llm: str, vision: str = "L/14-336") -> Any:
    """Make the configuration of a whole model, without a prompt.

    Args:
        llm: Size of the LLM.
        vision: Size of the vision tower.
    """
    from modeling_llm2clip.configuration_llm2clip import LLM2CLIPConfig

    return LLM2CLIPConfig(
        text_config=make_llm_config(llm), vision_config=make_vision_config(vision),
        projection_dim=PROJECTION_DIM, text_adapter_layers=4,
    )  # fmt: skip


def draw_lengths(kind: str, count: int, *, seed: int = 0) -> list[int]:
    """Draw numbers of tokens of captions, prompt included.

    The means are those of `scale_plan.py`: 30 of a short caption, 110 of a long one.

    Args:
        kind: "short", or "mixed" for half short and half long.
        count: Number of captions.
        seed: Of the random numbers.
    """
    generator = np.random.default_rng(seed)
    short = _PROMPT_TOKENS + generator.lognormal(np.log(11.5), 0.33, count).clip(5, 50)
    long = generator.lognormal(np.log(100), 0.45, count).clip(30, 512)
    is_long = (generator.random(count) < 0.5) & (kind == "mixed")
    return [int(length) for length in np.where(is_long, long, short).round()]
