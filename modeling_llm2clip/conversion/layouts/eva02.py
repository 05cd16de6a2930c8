"""EVA02 as saved by the official training code, converted to timm's equivalent EVA02."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...configs.export_config import SourceFormat
from .layout import (
    Drop,
    Layout,
    count_blocks,
    find_ratio,
    make_timm_config,
    rename,
    square_side,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .layout import Tensors

_BLOCK = r"visual\.blocks\.(\d+)\."
_INTO = r"vision_model.timm_model.blocks.\1."
_PART = r"(weight|bias)"
# Buffers that the official code saves, once for the tower and once per block.
_ROTARY_TABLE = r"visual\.(?:blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)"
# Tables of the same size differ only by rounding to the dtype they are saved in; with another
# reference size, they differ by 0.1 or more.
_MOST_DIFFERENCE = 0.01
_LARGEST_REFERENCE = 64  # official checkpoints have 16


def _make_vision_config(
    tensors: Tensors, _source_format: SourceFormat, _stated: PreTrainedConfig | None
) -> PreTrainedConfig:
    width, _, patch_size, _ = tensors["visual.patch_embed.proj.weight"].shape
    side = square_side(tensors["visual.pos_embed"].shape[1] - 1)
    inner = tensors["visual.blocks.0.mlp.w1.weight"].shape[0]
    head_width, reference = _read_rotary_sizes(tensors, side)
    return make_timm_config(
        "eva02_large_patch14_clip_336",
        {
            "img_size": patch_size * side,
            "patch_size": patch_size,
            "embed_dim": width,
            "depth": count_blocks(tensors, "visual.blocks.{}.norm1.weight"),
            "num_heads": width // head_width,
            "mlp_ratio": find_ratio(inner, width),
            "qkv_fused": False,
            "swiglu_mlp": True,
            "scale_mlp": True,
            "scale_attn_inner": True,
            "use_rot_pos_emb": True,
            "ref_feat_shape": [reference] * 2,
            "global_pool": "token",
        },
    )


def _read_rotary_sizes(tensors: Tensors, side: int) -> tuple[int, int]:
    """Find the head width and reference size with which timm computes the same rotary tables."""
    from timm.layers import build_rotary_pos_embed

    tables = [
        (match[1], tensors[key].read().float())
        for key in tensors
        if (match := re.fullmatch(_ROTARY_TABLE, key))
    ]
    if {part for part, _ in tables} != {"cos", "sin"}:
        raise ValueError(
            "The checkpoint has no tables of rotary positions (visual.rope.freqs_cos and "
            "freqs_sin), which the official code saves and this tower needs: it was trained "
            "without them, or they were removed. Use the checkpoint as it was saved."
        )
    width = tables[0][1].shape[-1]
    for reference in range(1, _LARGEST_REFERENCE + 1):
        sin, cos = build_rotary_pos_embed(
            [side, side], dim=width, in_pixels=False, ref_feat_shape=[reference, reference]
        )
        computed = {"sin": sin, "cos": cos}
        if all(
            table.shape == computed[part].shape
            and table.allclose(computed[part], atol=_MOST_DIFFERENCE, rtol=0)
            for part, table in tables
        ):
            return width, reference
    raise ValueError(
        f"The checkpoint's rotary positions (visual.rope.freqs_cos and freqs_sin) do not match "
        f"{side} × {side} patches with any reference size up to {_LARGEST_REFERENCE} patches. Use "
        "the checkpoint as it was saved."
    )


# The activation is the gate of its SwiGLU.
LAYOUT = Layout(
    choice="eva02",
    source_options={"layout": "eva02", "activation": "silu"},
    activations=("silu",),
    needs_timm=True,
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
        # Older checkpoints store these two biases next to their matrices.
        rename(rf"{_BLOCK}attn\.([qv])_bias", rf"{_INTO}attn.\2_proj.bias"),
        rename(rf"{_BLOCK}attn\.inner_attn_ln\.{_PART}", rf"{_INTO}attn.norm.\2"),
        rename(rf"{_BLOCK}mlp\.w1\.{_PART}", rf"{_INTO}mlp.fc1_g.\2"),
        rename(rf"{_BLOCK}mlp\.w2\.{_PART}", rf"{_INTO}mlp.fc1_x.\2"),
        rename(rf"{_BLOCK}mlp\.w3\.{_PART}", rf"{_INTO}mlp.fc2.\2"),
        rename(rf"{_BLOCK}mlp\.ffn_ln\.{_PART}", rf"{_INTO}mlp.norm.\2"),
    ),
    drops=(
        Drop(
            _ROTARY_TABLE,
            "rotary frequencies, which the tower computes from its sizes",
        ),
    ),
    make_vision_config=_make_vision_config,
    projection_bias=True,
)
