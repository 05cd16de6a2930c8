"""SigLIP2 in timm's names, with the LLM inside the checkpoint or beside it."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ...configs.source_format import SourceFormat
from ..key_mapping import rename
from .layout import (
    Layout,
    Tensors,
    count_blocks,
    count_heads,
    find_ratio,
    make_timm_config,
    square_side,
)


def _make_vision_config(
    tensors: Tensors, source_format: SourceFormat, _stated: PreTrainedConfig | None
) -> PreTrainedConfig:
    """Describe the tower, attention pooling included, by the shapes of its weights."""
    trunk = "visual.trunk."
    width, _, patch_size, _ = tensors[f"{trunk}patch_embed.proj.weight"].shape
    side = square_side(tensors[f"{trunk}pos_embed"].shape[1])
    inner = tensors[f"{trunk}blocks.0.mlp.fc1.weight"].shape[0]
    return make_timm_config(
        "vit_so400m_patch14_siglip_224",
        {
            "img_size": patch_size * side,
            "patch_size": patch_size,
            "embed_dim": width,
            "depth": count_blocks(tensors, trunk + "blocks.{}.norm1.weight"),
            "num_heads": count_heads(width, source_format),
            "mlp_ratio": find_ratio(inner, width),
            "class_token": False,
            "global_pool": "map",
            "act_layer": source_format.activation,
        },
    )


SIGLIP2 = Layout(
    name="siglip2",
    marks=("visual.trunk.pos_embed", "visual.trunk.attn_pool.latent"),
    adapter_prefix="text.text_proj.text_adaptor.",
    rules=(rename(r"visual\.trunk\.(.*)", r"vision_model.timm_model.\1"),),
    drops=(),
    make_vision_config=_make_vision_config,
    has_projection=False,
    llm_prefix="text.text.model.",
)
