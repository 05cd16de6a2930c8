"""SigLIP2 with timm's weight names; the checkpoint may include the LLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...configs.export_config import SourceFormat
from .layout import (
    Layout,
    count_blocks,
    count_heads,
    find_ratio,
    make_timm_config,
    rename,
    square_side,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .layout import Tensors

# Patches per side and patch size, published as SO400M for both 378 and 384 pixels.
_OF_SEVERAL_SIZES = ((27, 14),)


def _make_vision_config(
    tensors: Tensors, source_format: SourceFormat, _stated: PreTrainedConfig | None
) -> PreTrainedConfig:
    trunk = "visual.trunk."
    width, _, patch_size, _ = tensors[f"{trunk}patch_embed.proj.weight"].shape
    side = square_side(tensors[f"{trunk}pos_embed"].shape[1])
    image_size = _find_image_size(side, patch_size, source_format.image_size)
    inner = tensors[f"{trunk}blocks.0.mlp.fc1.weight"].shape[0]
    return make_timm_config(
        "vit_so400m_patch14_siglip_224",
        {
            "img_size": image_size,
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


def _find_image_size(side: int, patch_size: int, stated: int | None) -> int:
    """Return the image size in pixels; timm drops the pixels after the last whole patch."""
    if stated is None:
        if (side, patch_size) in _OF_SEVERAL_SIZES:
            raise ValueError(
                f"image_size is missing: the tower has {side} × {side} patches of {patch_size} "
                "pixels, like networks for both 378 and 384 pixels. Use the image_size that it was "
                "trained with."
            )
        return patch_size * side
    if stated // patch_size != side:
        raise ValueError(
            f"image_size={stated} gives {stated // patch_size} patches of {patch_size} pixels per "
            f"side, but the weights have {side}. Use {patch_size * side} to "
            f"{patch_size * (side + 1) - 1}, or remove image_size."
        )
    return stated


LAYOUT = Layout(
    choice="siglip2",
    # The official factory normalizes with OpenAI's mean and std, but the tower's own are 0.5. The
    # checkpoint does not record which it was trained with, so neither is the default.
    source_options={
        "layout": "siglip2",
        "normalize_text_before_adapter": False,
        "activation": "gelu",
        "preprocessing": None,
        "head_width": 72,
    },
    options=("head_width", "image_size"),
    activations=("quick_gelu", "gelu", "gelu_tanh", "silu"),
    needs_timm=True,
    marks=("visual.trunk.pos_embed", "visual.trunk.attn_pool.latent"),
    adapter_prefix="text.text_proj.text_adaptor.",
    rules=(rename(r"visual\.trunk\.(.*)", r"vision_model.timm_model.\1"),),
    make_vision_config=_make_vision_config,
    has_projection=False,
    llm_prefix="text.text.model.",
)
