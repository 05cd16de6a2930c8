"""Models in the sizes of the paper, with random weights, and captions of typical lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

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
_WORDS = 30_000
PROMPT_TOKENS = 18
PROMPT_PREFIX, PROMPT_SUFFIX = "w1 " * (PROMPT_TOKENS - 1), " w2"


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
    short = PROMPT_TOKENS + generator.lognormal(np.log(11.5), 0.33, count).clip(5, 50)
    long = generator.lognormal(np.log(100), 0.45, count).clip(30, 512)
    is_long = (generator.random(count) < 0.5) & (kind == "mixed")
    return [int(length) for length in np.where(is_long, long, short).round()]


def draw_texts(kind: str, count: int, *, seed: int = 0) -> list[str]:
    """Draw different captions with the lengths of `draw_lengths`, in words of `write_model`.

    Args:
        kind: "short" or "mixed".
        count: Number of captions.
        seed: Of the random numbers.
    """
    generator = np.random.default_rng(seed)
    return [
        " ".join(f"w{number}" for number in generator.integers(0, _WORDS, length - PROMPT_TOKENS))
        for length in draw_lengths(kind, count, seed=seed)
    ]


def make_tokenizer() -> Any:
    """Make the tokenizer of `write_model`, to which one word is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(_WORDS))]
    numbered = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_model(
    folder: Path,
    llm: str,
    vision: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    layers: tuple[int, int],
) -> None:
    """Write a whole model with random weights.

    Args:
        folder: Target.
        llm: Size of the LLM.
        vision: Size of the vision tower.
        device: Where the weights are made.
        dtype: Of the saved weights.
        layers: Most layers of the LLM and of the vision tower.
    """
    from modeling_llm2clip.configuration_llm2clip import LLM2CLIPConfig
    from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel

    tiny, processor = _join_tiny(vision)
    config = tiny.config.to_dict()
    text = config["text_config"] | _LLMS[llm]
    text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    towers = ("text_config", text), ("vision_config", _VISION[vision])
    for (name, tower), most in zip(towers, layers, strict=True):
        config[name] |= tower
        config[name]["num_hidden_layers"] = min(most, tower["num_hidden_layers"])
    config |= {"projection_dim": 64 if llm == "tiny" else PROJECTION_DIM, "dtype": str(dtype)[6:]}
    torch.manual_seed(0)
    with device:
        model = LLM2CLIPModel(LLM2CLIPConfig.from_dict(config)).to(dtype).eval()
    model.config.random_heads = []  # a server refuses untrained weights; training changes no speed
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _join_tiny(vision: str) -> tuple[Any, Any]:
    """Build a tiny model for images of the size of another vision tower."""
    from transformers import AutoModel, CLIPImageProcessor, CLIPVisionModel

    from modeling_llm2clip.building.build_model import join_towers
    from modeling_llm2clip.configs.build_config import BuildConfig

    tokenizer = make_tokenizer()
    side = _VISION[vision]["image_size"]
    tower = make_vision_config("tiny")
    tower.image_size, tower.patch_size = side, _VISION[vision]["patch_size"]
    size = {"height": side, "width": side}
    return join_towers(
        (
            CLIPVisionModel(tower),
            CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size),
        ),
        (AutoModel.from_config(make_llm_config("tiny", vocabulary=len(tokenizer))), tokenizer),
        BuildConfig(
            prompt_prefix=PROMPT_PREFIX, prompt_suffix=PROMPT_SUFFIX, text_adapter_layers=4,
            projection_dim=64, max_text_length=512,
        ),
    )  # fmt: skip
