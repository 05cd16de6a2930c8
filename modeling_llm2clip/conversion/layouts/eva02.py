"""EVA02 as the official training code saves it; timm's EVA02 has the same mathematics."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...configs.source_format import SourceFormat
from .layout import (
    Drop,
    Layout,
    count_blocks,
    count_heads,
    find_ratio,
    make_timm_config,
    rename,
    square_side,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from .layout import Tensors

_BLOCK = r"visual\.blocks\.(\d+)\."
_INTO = r"vision_model.timm_model.blocks.\1."
_PART = r"(weight|bias)"
# Buffers that the official code saves, once for the tower and once for each block.
_ROTARY_TABLE = r"visual\.(?:blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)"
# Between two tables of one rule: rounding to the dtype that they are saved in. With another
# reference size or head width they differ by 0.1 and more.
_MOST_DIFFERENCE = 0.01


def _make_vision_config(
    tensors: Tensors, source_format: SourceFormat, _stated: PreTrainedConfig | None
) -> PreTrainedConfig:
    """Describe the tower by the shapes of its weights and the source format."""
    width, _, patch_size, _ = tensors["visual.patch_embed.proj.weight"].shape
    side = square_side(tensors["visual.pos_embed"].shape[1] - 1)
    inner = tensors["visual.blocks.0.mlp.w1.weight"].shape[0]
    _require_rotary_tables(tensors, source_format, side)
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


def _require_rotary_tables(tensors: Tensors, source_format: SourceFormat, side: int) -> None:
    """Require that the tower computes the checkpoint's rotary tables, which it does not load."""
    tables = {
        key: (match[1], tensors[key].read().float())
        for key in tensors
        if (match := re.fullmatch(_ROTARY_TABLE, key))
    }
    if {part for part, _ in tables.values()} != {"cos", "sin"}:
        raise ValueError(
            "The checkpoint has no tables of rotary positions (visual.rope.freqs_cos and "
            "freqs_sin), which the official code saves: it was trained without them, or they were "
            "removed. The tower here has rotary positions. Give the checkpoint as it was saved."
        )
    heads, reference = source_format.head_width, source_format.rope_reference_size
    for key, (part, table) in tables.items():
        if tuple(table.shape) != (side * side, heads):
            raise ValueError(
                f"{key} has shape {tuple(table.shape)}, but a tower of {side} × {side} patches "
                f"with heads of {heads} has {(side * side, heads)}. Give the head width that it "
                f"was trained with (--head-width {table.shape[-1]})."
            )
        computed = _compute_rotary_table(part, side, heads, reference)
        if not table.allclose(computed, atol=_MOST_DIFFERENCE, rtol=0):
            raise ValueError(
                f"{key} has other rotary positions than the tower would have with the reference "
                f"size {reference}. Give the one that it was trained with (--rope-reference-size)."
            )


def _compute_rotary_table(part: str, side: int, head_width: int, reference: int) -> Tensor:
    """Compute a table as timm's EVA02 does, (side * side, head_width)."""
    from timm.layers import build_rotary_pos_embed

    sine, cosine = build_rotary_pos_embed(
        [side, side], dim=head_width, in_pixels=False, ref_feat_shape=[reference, reference]
    )
    table: Tensor = cosine if part == "cos" else sine
    return table


# The activation is the gate of its SwiGLU.
LAYOUT = Layout(
    choice="eva02",
    source_options={"layout": "eva02", "activation": "silu"},
    options=("head_width", "rope_reference_size"),
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
            _ROTARY_TABLE,
            "rotary frequencies, equal to those that the tower computes from its sizes",
        ),
    ),
    make_vision_config=_make_vision_config,
    projection_bias=True,
)
