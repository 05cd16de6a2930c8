"""Tiny random towers, tokenizers and models, built in code without downloads or files.

Every builder gives the same weights each time it is called.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.building.vision_towers import image_processor_from_timm, join_vision_towers
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configuration_llm2clip import HEADS
from modeling_llm2clip.loading_llm2clip import build_tower
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

IMAGE_SIZE = 32
VOCABULARY_SIZE = 320
VISION_FAMILIES = (
    "clip", "siglip", "siglip2", "dinov2", "dinov3_vit", "vit", "timm", "eva02", "timm-siglip",
)  # fmt: skip
JOINED = "dinov2+timm-small"  # of two sizes and normalizations
# Run by fewer tests. Some are also given whole, as `tiny_dual_encoder` builds them.
MORE_VISION_FAMILIES = (
    "tipsv2", "metaclip_2", "aimv2", "chinese_clip", "altclip", "ijepa", "radio", "pe-core",
    "timm-radio", "naflexvit",
)  # fmt: skip
DUAL_ENCODERS = (
    "clip", "siglip", "siglip2", "tipsv2", "metaclip_2", "aimv2", "chinese_clip", "altclip",
)  # fmt: skip
LLM_FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "smollm3",
)  # fmt: skip

# The special tokens of every preset in `prompts.PROMPT_PRESETS`.
SPECIAL_TOKENS = (
    "<|pad|>", "<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
)  # fmt: skip
_TRAINING_TEXTS = (
    "a dog sits on a mat", "two red apples on a wooden table", "a cat sleeps by the window",
    "a photo of a red car", "the sky over the sea at night", "user system assistant",
)  # fmt: skip

# More than the usual 0.02, so that a change of one token or flag clearly changes embeddings.
_INITIALIZER_RANGE = 0.2
_TRANSFORMER_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": _INITIALIZER_RANGE,
}
_IMAGE_SIZE = {"image_size": IMAGE_SIZE, "patch_size": 8}
_MLP_AND_IMAGE_SIZE = {"intermediate_size": 48, **_IMAGE_SIZE}
_VISION_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, _MLP_AND_IMAGE_SIZE) for name in ("dinov3_vit", "vit", "ijepa")},
    **{
        name: (f"{name}_vision_model", _MLP_AND_IMAGE_SIZE)
        for name in ("clip", "siglip", "metaclip_2", "aimv2", "chinese_clip", "altclip")
    },
    "siglip2": (
        "siglip2_vision_model",
        {"intermediate_size": 48, "patch_size": 8, "num_patches": 16},
    ),
    "dinov2": ("dinov2", {"mlp_ratio": 2, **_IMAGE_SIZE}),
    "tipsv2": ("tipsv2_vision_model", {"mlp_ratio": 2, **_IMAGE_SIZE}),
    "radio": ("radio", {"mlp_ratio": 2.0, "max_img_size": 64, **_IMAGE_SIZE}),
}
# Towers without a pooled output.
VISION_POOLINGS = {"ijepa": "mean"}
# The networks of the paper, with fewer and narrower layers.
_TIMM_SIZE = {
    "img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
}  # fmt: skip
_TIMM_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "timm": ("test_vit", {"img_size": IMAGE_SIZE}),
    "timm-small": ("test_vit", {"img_size": IMAGE_SIZE // 2}),
    # Rotary positions count in the grid it was trained on, as in the towers for 336 pixels.
    "eva02": ("eva02_base_patch16_clip_224", {**_TIMM_SIZE, "ref_feat_shape": [3, 3]}),
    "timm-siglip": ("vit_so400m_patch14_siglip_224", _TIMM_SIZE),
    "pe-core": ("vit_pe_core_tiny_patch16_384", _TIMM_SIZE),
    "timm-radio": ("vit_base_patch16_radio_v3", _TIMM_SIZE),
    "naflexvit": (
        "naflexvit_base_patch16_siglip",
        {name: value for name, value in _TIMM_SIZE.items() if name != "img_size"},
    ),
    "timm with batch norm": ("test_efficientnet", {}),
    # These read the weight of their `qkv` themselves.
    "eva": ("eva_giant_patch14_224", _TIMM_SIZE),
    "beit": ("beit_base_patch16_224", _TIMM_SIZE),
    "beitv2": ("beitv2_base_patch16_224", _TIMM_SIZE),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"img_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
         "num_heads": [2, 2], "window_size": 4},
    ),
}  # fmt: skip
_LLM_EXTRAS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "llama4_text": {
        "attention_chunk_size": 8, "head_dim": 8, "moe_layers": [], "intermediate_size_mlp": 64,
    },
}  # fmt: skip


def tiny_tokenizer(
    *,
    vocabulary_size: int = VOCABULARY_SIZE,
    begins: bool = True,
    texts: tuple[str, ...] = _TRAINING_TEXTS,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that can write any text, as an LLM's own tokenizer does.

    Args:
        vocabulary_size: at least 267; the special tokens have the first 11 ids.
        begins: whether it puts `<|begin|>` in front of every text, as Llama's does.
        texts: what the merges are learned from; other texts give another tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A",
            special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )


def tiny_vision(family: str = "clip", *, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """Build a vision tower of 32 × 32 pixels and its image processor; see `VISION_FAMILIES`.

    A test of a family that this version of transformers lacks is skipped. "A+B" joins two.
    """
    if "+" in family:
        return join_vision_towers([tiny_vision(part) for part in family.split("+")])
    if family in _TIMM_NETWORKS:
        return tiny_timm(*_TIMM_NETWORKS[family], seed=seed)
    model_type, extras = _VISION_CONFIGS[family]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type!r}")
    model = _build(AutoConfig.for_model(model_type, **_TRANSFORMER_SIZE, **extras), seed)
    if family == "siglip2":
        return model, Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    return model, CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False
    )


def tiny_dual_encoder(
    family: str, *, seed: int = 0, **text_settings: Any
) -> tuple[PreTrainedModel, Any]:
    """Build a vision tower and a text encoder as one model, and the image processor."""
    tower, image_processor = tiny_vision(family)
    text = {name: value for name, value in _TRANSFORMER_SIZE.items() if name != "initializer_range"}
    text |= {"intermediate_size": 48, "vocab_size": 64, "bos_token_id": 2, "eos_token_id": 3}
    text |= ({"project_dim": 32} if family == "altclip" else {}) | text_settings
    config = AutoConfig.for_model(family, vision_config=tower.config.to_dict(), text_config=text)
    return _build(config, seed), image_processor


def tiny_llm(
    family: str = "llama",
    *,
    vocabulary_size: int = VOCABULARY_SIZE,
    hidden_size: int = _TRANSFORMER_SIZE["hidden_size"],
    num_layers: int = _TRANSFORMER_SIZE["num_hidden_layers"],
    seed: int = 0,
    **others: Any,
) -> PreTrainedModel:
    """Build a causal decoder without its head; see `LLM_FAMILIES` and `_LLM_EXTRAS`."""
    grouped = {} if family == "phi" else {"num_key_value_heads": 2}
    config = AutoConfig.for_model(
        family,
        **{**_TRANSFORMER_SIZE, "hidden_size": hidden_size, "num_hidden_layers": num_layers},
        **grouped,
        **others,
        **({"head_dim": 8} if family.startswith(("gemma", "qwen3")) else {}),
        **_LLM_EXTRAS.get(family, {}),
        intermediate_size=64,
        vocab_size=vocabulary_size,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _build(config, seed)


def tiny_model(
    vision: str = "clip",
    llm: str = "llama",
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    **arguments: Any,
) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    """Build a model and its processor from two tiny towers, or copy the first one built like this.

    Args:
        trained: whether its config says so, as if its weights came of a training.
        arguments: of `BuildConfig`; by default the llama-3 prompt, at most 32 tokens, a
            shared space as wide as the LLM (so that `text_projection` is square), two adapter
            blocks.
    """
    if tokenizer is None:
        model, processor = copy.deepcopy(_join_tiny(vision, llm, dtype=dtype, **arguments))
    else:
        model, processor = _join_tiny.__wrapped__(
            vision, llm, tokenizer=tokenizer, dtype=dtype, **arguments
        )
    model.config.random_heads = [*HEADS] * (not trained)
    return model, processor


@cache  # the checks of a build take twenty times as long as a copy
def _join_tiny(
    vision: str,
    llm: str,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype,
    **arguments: Any,
) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    chosen = {
        "projection_dim": 32,
        "max_text_length": 32,
        "text_adapter_layers": 2,
        **({"vision_pooling": VISION_POOLINGS[vision]} if vision in VISION_POOLINGS else {}),
        **({} if {"prompt_prefix", "prompt_suffix"} & set(arguments) else {"prompt": "llama-3"}),
        **arguments,
    }
    vision_model, image_processor = tiny_vision(vision)
    tokenizer = tokenizer or tiny_tokenizer()
    text_model = tiny_llm(llm, vocabulary_size=len(tokenizer))
    return join_towers(
        (_cast_parameters(vision_model, dtype), image_processor),
        (_cast_parameters(text_model, dtype), tokenizer),
        BuildConfig(**chosen),
    )


def tiny_images(count: int = 2) -> list[Image.Image]:
    """Plain images of different colors and sizes."""
    return [
        Image.new("RGB", (40 + 8 * i, 48), (255 * i // max(count - 1, 1), 60 * i % 256, 90))
        for i in range(count)
    ]


def draw_noise(height: int = 40, width: int = 56, *, seed: int = 0) -> Image.Image:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast as loading does: buffers, such as the frequencies of rotary positions, stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def tiny_timm(
    architecture: str, model_args: dict[str, Any], *, seed: int = 0
) -> tuple[PreTrainedModel, Any]:
    """Build a network of timm and its image processor.

    A test of a network that this version of timm lacks is skipped.
    """
    timm: Any = pytest.importorskip("timm")
    if not timm.is_model(architecture):
        pytest.skip(f"timm {timm.__version__} has no {architecture!r}")
    side = model_args.get("img_size", IMAGE_SIZE)
    pretrained_cfg = {
        "input_size": [3, side, side],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    config = AutoConfig.for_model(
        "timm_wrapper",
        architecture=architecture,
        model_args=model_args,
        pretrained_cfg=pretrained_cfg,
    )
    return _build(config, seed), image_processor_from_timm(pretrained_cfg)


def _build(config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_tower(config)
    return model.float().eval()
