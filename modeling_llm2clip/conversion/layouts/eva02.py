"""EVA02 as the official training code saves it; timm's EVA02 has the same mathematics."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ...configs.source_format import SourceFormat
from ..key_mapping import Drop, rename
from .layout import (
    Layout,
    Tensors,
    count_blocks,
    count_heads,
    find_ratio,
    make_timm_config,
    square_side,
)

_BLOCK = r"visual\.blocks\.(\d+)\."
_INTO = r"vision_model.timm_model.blocks.\1."
_PART = r"(weight|bias)"


def _make_vision_config(
    tensors: Tensors, source_format: SourceFormat, _stated: PreTrainedConfig | None
) -> PreTrainedConfig:
    """Describe the tower by the shapes of its weights and the source format."""
    if source_format.activation != "silu":
        raise ValueError(
            "EVA02's gate is 'silu', the source format has "
            f"activation={source_format.activation!r}. Leave it out."
        )
    width, _, patch_size, _ = tensors["visual.patch_embed.proj.weight"].shape
    side = square_side(tensors["visual.pos_embed"].shape[1] - 1)
    inner = tensors["visual.blocks.0.mlp.w1.weight"].shape[0]
    return make_timm_config(
        "eva02_large_patch14_clip_336",
        {
            "img_size": patch_size * side,
            "patch_size": patch_size,
            "embed_dim": width,
            "depth": count_blocks(tensors, "visual.blocks.{}.norm1.weight"),
            "num_heads": count_heads(width, source_format),
            "mlp_ratio": find_ratio(inner, width),
            "qkv_fused": False,
            "swiglu_mlp": True,
            "scale_mlp": True,
            "scale_attn_inner": True,
            "use_rot_pos_emb": True,
            "ref_feat_shape": [source_format.rope_reference_size] * 2,
            "global_pool": "token",
        },
    )


EVA02 = Layout(
    name="eva02",
    marks=("visual.cls_token", "visual.pos_embed", "visual.head.weight"),
    adapter_prefix="text.text_adaptor.",
    rules=(
        rename(
            r"visual\.(cls_token|pos_embed|patch_embed\.proj\.(?:weight|bias)|norm\.(?:weight|bias))",
            r"vision_model.timm_model.\1",
        ),
        rename(rf"visual\.head\.{_PART}", r"visual_projection.\1"),
        rename(rf"{_BLOCK}(norm[12])\.{_PART}", rf"{_INTO}\2.\3"),
        rename(rf"{_BLOCK}attn\.(q_proj|v_proj|proj)\.{_PART}", rf"{_INTO}attn.\2.\3"),
        rename(rf"{_BLOCK}attn\.k_proj\.weight", rf"{_INTO}attn.k_proj.weight"),
        # Older checkpoints have the two biases beside their matrices.
        rename(rf"{_BLOCK}attn\.([qv])_bias", rf"{_INTO}attn.\2_proj.bias"),
        rename(rf"{_BLOCK}attn\.inner_attn_ln\.{_PART}", rf"{_INTO}attn.norm.\2"),
        rename(rf"{_BLOCK}mlp\.w1\.{_PART}", rf"{_INTO}mlp.fc1_g.\2"),
        rename(rf"{_BLOCK}mlp\.w2\.{_PART}", rf"{_INTO}mlp.fc1_x.\2"),
        rename(rf"{_BLOCK}mlp\.w3\.{_PART}", rf"{_INTO}mlp.fc2.\2"),
        rename(rf"{_BLOCK}mlp\.ffn_ln\.{_PART}", rf"{_INTO}mlp.norm.\2"),
    ),
    drops=(
        Drop(
            r"visual\.(?:blocks\.\d+\.attn\.)?rope\.freqs_(?:cos|sin)",
            "rotary frequencies, which the tower computes from its sizes",
        ),
    ),
    make_vision_config=_make_vision_config,
    projection_bias=True,
)
