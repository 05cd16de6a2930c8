"""A model with the tokenizer of the embedded SmolLM2, but few random layers."""

from __future__ import annotations

from pathlib import Path


def write_small_model(folder: Path, *, layers: int = 1, width: int | None = None) -> None:
    """Write the model; its vision tower has one small layer.

    Args:
        folder: target.
        layers: of the language model.
        width: of its states, a multiple of 64; None for that of SmolLM2.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
    )

    from modeling_llm2clip.building.build_model import join_towers
    from modeling_llm2clip.building.pretrained_towers import SMOLLM2, fetch_tower
    from modeling_llm2clip.configs.build_config import BuildConfig

    torch.manual_seed(0)
    llm = fetch_tower(SMOLLM2)
    config = AutoConfig.from_pretrained(llm)
    config.num_hidden_layers = layers
    if width is not None:
        config.hidden_size, config.intermediate_size = width, 2 * width
        config.num_attention_heads = config.num_key_value_heads = width // 64
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    vision = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, image_size=32, patch_size=16)
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    model, processor = join_towers(
        (vision, image_processor),
        (AutoModel.from_config(config), AutoTokenizer.from_pretrained(llm)),
        BuildConfig(prompt="chatml", projection_dim=32, text_adapter_layers=1),
    )
    # A server refuses untrained weights; training changes no speed.
    model.config.random_heads = []
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
