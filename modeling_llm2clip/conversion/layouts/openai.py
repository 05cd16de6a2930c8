"""Weight names of OpenAI's CLIP, as in an OpenAI tower saved by the official training code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...configs.export_config import SourceFormat
from .layout import Layout, Rule, count_blocks, count_heads, rename, square_side

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .layout import Make, Tensors

_BLOCK = r"visual\.transformer\.resblocks\.(\d+)\."
_INTO = r"vision_model.encoder.layers.\1."
_PART = r"(weight|bias)"


def _split(part: str) -> Rule:
    def take(number: int) -> Make:
        return lambda stacked: stacked.chunk(3, dim=0)[number]

    return Rule(
        rf"{_BLOCK}attn\.in_proj_{part}",
        tuple((rf"{_INTO}self_attn.{name}_proj.{part}", take(n)) for n, name in enumerate("qkv")),
    )


def _make_vision_config(
    tensors: Tensors, source_format: SourceFormat, _stated: PreTrainedConfig | None
) -> PreTrainedConfig:
    from transformers import CLIPVisionConfig

    width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
    num_positions = tensors["visual.positional_embedding"].shape[0]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=count_blocks(tensors, "visual.transformer.resblocks.{}.ln_1.weight"),
        num_attention_heads=count_heads(width, source_format),
        image_size=patch_size * square_side(num_positions - 1),
        patch_size=patch_size,
        projection_dim=tensors["visual.proj"].shape[1],
        hidden_act=source_format.activation,
        layer_norm_eps=1e-5,  # eva_clip/transformer.py: torch's default
    )


LAYOUT = Layout(
    choice="openai",
    source_options={"layout": "openai"},
    options=("head_width",),
    marks=("visual.conv1.weight", "visual.proj"),
    adapter_prefix="text.text_adaptor.",
    rules=(
        rename(r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
        rename(
            r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"
        ),
        rename(r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
        rename(rf"visual\.ln_pre\.{_PART}", r"vision_model.pre_layrnorm.\1"),
        rename(rf"visual\.ln_post\.{_PART}", r"vision_model.post_layernorm.\1"),
        rename(rf"{_BLOCK}ln_([12])\.{_PART}", rf"{_INTO}layer_norm\2.\3"),
        _split("weight"),
        _split("bias"),
        rename(rf"{_BLOCK}attn\.out_proj\.{_PART}", rf"{_INTO}self_attn.out_proj.\2"),
        rename(rf"{_BLOCK}mlp\.c_fc\.{_PART}", rf"{_INTO}mlp.fc1.\2"),
        rename(rf"{_BLOCK}mlp\.c_proj\.{_PART}", rf"{_INTO}mlp.fc2.\2"),
        rename(r"visual\.proj", "visual_projection.weight", lambda matrix: matrix.T),
    ),
    make_vision_config=_make_vision_config,
)
